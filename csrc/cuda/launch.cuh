// Starting a kernel: its shared memory, its stream, its errors.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/platform.h"
#include "cuda/variant.h"

namespace attn_ext::cuda {

#ifdef ATTN_EXT_EMULATE
template <auto kKernel, class Params>
void launch(const char* name, int64_t blocks, int threads, int shared_bytes, const Stream&, const Params& params) {
  emulation::launch(name, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, [=] { kKernel(params); });
}
#else
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

template <auto kKernel, class Params>
void launch(const char* name, int64_t blocks, int threads, int shared_bytes, const Stream& stream, const Params& params) {
  // Once for each kernel and device, since it costs as much as the launch.
  static std::atomic<uint64_t> prepared = 0;
  const uint64_t bit = uint64_t{1} << stream.device.index % 64;
  if (!(prepared & bit)) {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
    prepared |= bit;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                         shared_bytes, static_cast<cudaStream_t>(stream.handle)),
        name);
}
#endif

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float> ? DType::float32 : std::is_same_v<T, Float16> ? DType::float16 : DType::bfloat16;
}

}  // namespace attn_ext::cuda
