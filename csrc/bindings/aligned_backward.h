// How the backward kernels of cuda/ are called.
#pragma once
#include "bindings/aligned_rows.h"
#include "bindings/backward.h"
#include "cuda/kernels.h"

namespace attn_ext::bindings {

// Enqueues the kernels by `launch(params, tensors, workspace)`.
template <class Launch>
void run_aligned(Inputs& inputs, BackwardParams& params, BackwardTensors& tensors, const cuda::Device& device, Launch&& launch) {
  align_inputs(inputs, params);
  params.out = aligned_view(tensors.out);
  params.grad_out = aligned_view(tensors.grad_out);
  const AttentionShape& shape = params.shape;
  AlignedResult query(tensors.grad_query, shape.head_dim), key(tensors.grad_key, shape.head_dim);
  AlignedResult value(tensors.grad_value, shape.value_dim);
  tensors.set_gradients(params);
  check_supported(params, device);
  const int64_t bytes[1] = {cuda::backward_workspace(params, device)};
  const Tensor workspace = empty(bytes, {0}, aoti_torch_dtype_uint8(), inputs.device);
  launch(params, tensors, workspace);
  tensors.grad_query = query.dense(std::move(tensors.grad_query));
  tensors.grad_key = key.dense(std::move(tensors.grad_key));
  tensors.grad_value = value.dense(std::move(tensors.grad_value));
}

}  // namespace attn_ext::bindings
