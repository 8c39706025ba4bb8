// The CUDA kernels as operators of CPU tensors, torch.ops.attn_ext_emulated.*: run by the emulator (emulation/emulator.h),
// called as bindings/cuda.cpp calls them.  For tests; no wheel has it.
#include <cstring>

#include "bindings/aligned_backward.h"
#include "bindings/aligned_forward.h"
#include "bindings/decode_launch.h"
#include "bindings/dropout_mask.h"
#include "bindings/launch_memory.h"
#include "bindings/support.h"
#include "cuda/variant.h"

extern "C" {  // emulation/api.cpp
void attn_ext_emulation_register_memory(const void* pointer, size_t bytes, int access);
void attn_ext_emulation_forget_memory();
const char* attn_ext_emulation_report();
}

namespace attn_ext::bindings {
namespace {

enum Access : int { kReadOnly = 0, kReadWrite = 1, kUndefined = 2 };

cuda::Device emulated_device;
const cuda::ForwardVariant* forced_variant = nullptr;  // null: the selector's choice

struct Emulated {
  static constexpr Contents kContents = Contents::unchecked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run(Inputs& inputs, ForwardParams& params, ForwardResults& results) {
    run_aligned(inputs, params, results, emulated_device, [&](const ForwardParams& aligned, const ForwardResults& to) {
      for_launch_memory(inputs, to, register_memory);
      if (forced_variant) forced_variant->launch(aligned, {.device = emulated_device}, *forced_variant);
      else cuda::forward(aligned, {.device = emulated_device});
      finish();
    });
  }
  static void run(Inputs& inputs, BackwardParams& params, BackwardTensors& tensors) {
    run_aligned(inputs, params, tensors, emulated_device, [&](const BackwardParams& aligned, const BackwardTensors& to, const Tensor& workspace) {
      for_launch_memory(inputs, to, workspace, register_memory);
      cuda::backward(aligned, workspace.data(), {.device = emulated_device});
      finish();
    });
  }
  static void check_seed(const Tensor& seed) { check_cpu(seed, "dropout_seed"); }
  static void run(const DropoutMaskParams& params, const Tensor& mask, const Tensor& seed) {
    for_memory(mask, true, register_memory);
    for_memory(seed, false, register_memory);
    cuda::make_dropout_mask(params, {.device = emulated_device});
    finish();
  }
  static void run_decode(DecodeInputs& inputs, DeviceDecodeParams& params, DecodeResults& results) {
    run_planned(inputs, params, emulated_device, [&](const DeviceDecodeParams& planned, const DecodeWorkspace& workspace) {
      for_decode_memory(inputs, planned, results, workspace, [](void* address, int64_t bytes, MemoryUse use) {
        const Access access = use == MemoryUse::read ? kReadOnly : use == MemoryUse::written ? kReadWrite : kUndefined;
        attn_ext_emulation_register_memory(address, static_cast<size_t>(bytes), access);
      });
      cuda::decode(planned, {.device = emulated_device});
      finish();
    });
  }

 private:
  static void register_memory(void* address, int64_t bytes, bool is_result) {
    attn_ext_emulation_register_memory(address, static_cast<size_t>(bytes), is_result ? kUndefined : kReadOnly);
  }
  static void finish() {
    attn_ext_emulation_forget_memory();
    const char* faults = attn_ext_emulation_report();
    STD_TORCH_CHECK(*faults == '\0', faults);
  }
};

struct EmulatedDevices {
  static cuda::Device get(int) { return emulated_device; }
};

}  // namespace
}  // namespace attn_ext::bindings

extern "C" {

// The device from now on.
void attn_ext_emulated_device(int arch, int shared_memory, int processors) {
  attn_ext::bindings::emulated_device = {.index = 0, .arch = arch, .shared_memory = shared_memory, .processors = processors};
}

// The kernel from now on: one with this name, and room for the heads it is given; null: the selector decides.  Whether there
// is one.
int attn_ext_emulated_force(const char* name) {
  using namespace attn_ext::bindings;
  forced_variant = nullptr;
  for (const auto* variant : attn_ext::cuda::forward_variants())
    if (name && std::strcmp(name, variant->name) == 0) forced_variant = variant;
  return !name || forced_variant != nullptr;
}
}

STABLE_TORCH_LIBRARY(attn_ext_emulated, library) {
  library.def(attn_ext::bindings::kAttentionForward);
  library.def(attn_ext::bindings::kAttentionOutput);
  library.def(attn_ext::bindings::kAttentionBackward);
  library.def(attn_ext::bindings::kDropoutMask);
  library.def(attn_ext::bindings::kAttentionDecode);
  library.def(attn_ext::bindings::kAttentionSupport);
  library.def(attn_ext::bindings::kDecodeSupport);
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext_emulated, Meta, library) {
  attn_ext::bindings::implement_support<attn_ext::bindings::EmulatedDevices>(library);
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext_emulated, CPU, library) {
  attn_ext::bindings::implement_forward<attn_ext::bindings::Emulated>(library);
  attn_ext::bindings::implement_backward<attn_ext::bindings::Emulated>(library);
  attn_ext::bindings::implement_dropout_mask<attn_ext::bindings::Emulated>(library);
  library.impl("attention_decode", attn_ext::bindings::attention_decode<attn_ext::bindings::Emulated>);
}
