// What a library with kernels of one kind lacks, so that bindings/emulated.cpp links: sources that have them come first.
#include "cuda/decode_plan.h"
#include "cuda/variant.h"

#define ABSENT __attribute__((weak))

namespace attn_ext::cuda {

ABSENT const char* unsupported(const ForwardParams&, const Device&) { return "no forward kernels"; }
ABSENT const char* unsupported(const BackwardParams&, const Device&) { return "no backward kernels"; }
ABSENT const char* unsupported(const DecodeParams&, const Device&) { return "no decoding kernels"; }
ABSENT std::span<const ForwardVariant* const> forward_variants() { return {}; }
ABSENT int64_t backward_workspace(const BackwardParams&, const Device&) { return 0; }
ABSENT void forward(const ForwardParams&, const Stream&) {}
ABSENT void backward(const BackwardParams&, void*, const Stream&) {}
ABSENT void decode(const DeviceDecodeParams&, const Stream&) {}
ABSENT void make_dropout_mask(const DropoutMaskParams&, const Stream&) {}

}  // namespace attn_ext::cuda
