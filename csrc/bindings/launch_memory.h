// The memory that a kernel of cuda/ may touch, tensor by tensor, for what runs it on the CPU.
#pragma once
#include "bindings/backward.h"
#include "bindings/forward.h"

namespace attn_ext::bindings {

// Calls f(address, bytes, is_result).  From a tensor's first byte to its last: what lies around is another's.
template <class F>
void for_memory(const Tensor& tensor, bool is_result, F&& f) {
  if (!tensor || tensor.elements() == 0) return;
  int64_t last = 0;
  for (int d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  f(tensor.data(), (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype_code())), is_result);
}
template <class F>
void for_launch_memory(const Inputs& inputs, F&& f) {
  const BlockTensors& blocks = inputs.blocks;
  for (const Tensor* tensor :
       {&inputs.query, &inputs.key, &inputs.value, &inputs.bias, &inputs.sinks, &inputs.mask, &inputs.key_ranges,
        &inputs.query_segments, &inputs.kv_segments, &inputs.alibi_slopes, &inputs.alibi_positions,
        &inputs.dropout_seed, &blocks.offsets, &blocks.indices, &blocks.tiles, &blocks.bits})
    for_memory(*tensor, false, f);
}
template <class F>
void for_launch_memory(const Inputs& inputs, const ForwardResults& results, F&& f) {
  for_launch_memory(inputs, f);
  for (const Tensor* tensor : {&results.out, &results.lse, &results.lse_residual}) for_memory(*tensor, true, f);
}
template <class F>
void for_launch_memory(const Inputs& inputs, const BackwardTensors& tensors, const Tensor& workspace, F&& f) {
  for_launch_memory(inputs, f);
  for (const Tensor* tensor : {&tensors.grad_out, &tensors.grad_lse, &tensors.out, &tensors.lse, &tensors.lse_residual})
    for_memory(*tensor, false, f);
  for (const Tensor* tensor : {&tensors.grad_query, &tensors.grad_key, &tensors.grad_value, &tensors.grad_bias, &tensors.grad_sinks,
                               &workspace})
    for_memory(*tensor, true, f);
}

}  // namespace attn_ext::bindings
