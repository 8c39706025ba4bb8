// What the CUDA runtime says of a device.
#include <array>
#include <mutex>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace attn_ext::cuda {
namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, what, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

Device device(int index) {
  static std::mutex mutex;
  static std::array<Device, 64> known;  // arch is 0 until it is asked for
  const std::lock_guard<std::mutex> lock(mutex);
  Device asked;
  Device& device = index < static_cast<int>(known.size()) ? known[index] : asked;
  if (device.arch == 0) {
    device = {.index = index,
              .arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index),
              .shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
              .processors = attribute(cudaDevAttrMultiProcessorCount, index)};
  }
  return device;
}

}  // namespace attn_ext::cuda
