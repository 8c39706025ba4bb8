// The CUDA kernels of torch.ops.attn_ext.*.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/aligned_backward.h"
#include "bindings/aligned_forward.h"
#include "bindings/decode_launch.h"
#include "bindings/dropout_mask.h"
#include "bindings/support.h"

namespace attn_ext::bindings {
namespace {

// The stream torch works on.  Only libtorch_cuda knows it, and a torch without CUDA, which can load this extension as well,
// has no such library: nothing may be linked against it.
void* current_stream(int32_t device_index) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    STD_TORCH_CHECK(library != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
    const auto found = reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(found != nullptr, "libtorch_cuda.so does not tell the current stream");
    return found;
  }();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device_index, &stream));
  return stream;
}

struct Cuda {
  static constexpr Contents kContents = Contents::unchecked;

  static void check_query(const Tensor& query) {
    STD_TORCH_CHECK(query.device().type == aoti_torch_device_type_cuda(), "query must be a CUDA tensor");
  }
  static void run(Inputs& inputs, ForwardParams& params, ForwardResults& results) {
    const int32_t index = inputs.device.index;
    const torch::stable::accelerator::DeviceGuard guard(index);
    const cuda::Device device = cuda::device(index);
    run_aligned(inputs, params, results, device, [&](const ForwardParams& aligned, const ForwardResults&) {
      cuda::forward(aligned, {.device = device, .handle = current_stream(index)});
    });
  }
  static void run(Inputs& inputs, BackwardParams& params, BackwardTensors& tensors) {
    const int32_t index = inputs.device.index;
    const torch::stable::accelerator::DeviceGuard guard(index);
    const cuda::Device device = cuda::device(index);
    run_aligned(inputs, params, tensors, device, [&](const BackwardParams& aligned, const BackwardTensors&, const Tensor& workspace) {
      cuda::backward(aligned, workspace.data(), {.device = device, .handle = current_stream(index)});
    });
  }
  static void check_seed(const Tensor& seed) {
    STD_TORCH_CHECK(seed.device().type == aoti_torch_device_type_cuda(), "dropout_seed must be a CUDA tensor");
  }
  static void run(const DropoutMaskParams& params, const Tensor&, const Tensor& seed) {
    const int32_t index = seed.device().index;
    const torch::stable::accelerator::DeviceGuard guard(index);
    cuda::make_dropout_mask(params, {.device = cuda::device(index), .handle = current_stream(index)});
  }
  static void run_decode(DecodeInputs& inputs, DeviceDecodeParams& params, DecodeResults&) {
    const int32_t index = inputs.device.index;
    const torch::stable::accelerator::DeviceGuard guard(index);
    const cuda::Device device = cuda::device(index);
    run_planned(inputs, params, device, [&](const DeviceDecodeParams& planned, const DecodeWorkspace&) {
      cuda::decode(planned, {.device = device, .handle = current_stream(index)});
    });
  }
};

struct CudaDevices {
  static cuda::Device get(int index) { return cuda::device(index); }
};

}  // namespace
}  // namespace attn_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CUDA, library) {
  attn_ext::bindings::implement_forward<attn_ext::bindings::Cuda>(library);
  attn_ext::bindings::implement_backward<attn_ext::bindings::Cuda>(library);
  attn_ext::bindings::implement_dropout_mask<attn_ext::bindings::Cuda>(library);
  library.impl("attention_decode", attn_ext::bindings::attention_decode<attn_ext::bindings::Cuda>);
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, Meta, library) {
  attn_ext::bindings::implement_support<attn_ext::bindings::CudaDevices>(library);
}
