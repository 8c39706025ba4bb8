// The CUDA kernels as bindings see them.  No torch, no CUDA runtime: what includes this builds with any C++ compiler.
#pragma once
#include "core/params.h"

namespace attn_ext::cuda {

// What of a device decides which kernel runs on it.
struct Device {
  int index = 0;          // of the CUDA runtime
  int arch = 0;           // 10 * major + minor: 80 is compute capability 8.0
  int shared_memory = 0;  // bytes a block may have, opted in
  int processors = 0;     // streaming multiprocessors
};

struct Stream {
  Device device;
  void* handle = nullptr;  // cudaStream_t
};

Device device(int index);  // throws what the CUDA runtime says

// Why no kernel does this on such a device; null: forward() does.  Looks at sizes, strides, addresses and which options are
// there, never at what device memory holds.
const char* unsupported(const ForwardParams& params, const Device& device);

const char* unsupported(const BackwardParams& params, const Device& device);

// Bytes of device memory, aligned to 256, that backward() works in: asks for a supported call.
int64_t backward_workspace(const BackwardParams& params, const Device& device);

// Enqueues the kernel.  Nothing waits, allocates or reads device memory on the host, so a CUDA graph can capture it.  Throws
// std::runtime_error that names the kernel; asks for a supported call.
void forward(const ForwardParams& params, const Stream& stream);
void backward(const BackwardParams& params, void* workspace, const Stream& stream);
void make_dropout_mask(const DropoutMaskParams& params, const Stream& stream);

// The same of a step of decoding.
const char* unsupported(const DecodeParams& params, const Device& device);

// The append, the ranges of keys, and their merge: of params that plan() of cuda/decode_plan.h has completed.
void decode(const DeviceDecodeParams& params, const Stream& stream);

}  // namespace attn_ext::cuda
