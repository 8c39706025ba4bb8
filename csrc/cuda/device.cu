// What the CUDA runtime says of a device.
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
  return {.index = index,
          .arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index),
          .shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          .processors = attribute(cudaDevAttrMultiProcessorCount, index)};
}

}  // namespace attn_ext::cuda
