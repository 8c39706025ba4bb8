// The memory that a kernel of cuda/ may touch, tensor by tensor, for what runs it on the CPU.
#pragma once
#include "bindings/forward.h"

namespace attn_ext::bindings {

// Calls f(address, bytes, is_result).  From a tensor's first byte to its last: what lies around is another's.
template <class F>
void for_launch_memory(const Inputs& inputs, const ForwardResults& results, F&& f) {
  const auto call = [&](const Tensor& tensor, bool is_result) {
    if (!tensor || tensor.elements() == 0) return;
    int64_t last = 0;
    for (int d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    f(tensor.data(), (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype_code())), is_result);
  };
  const BlockTensors& blocks = inputs.blocks;
  for (const Tensor* tensor :
       {&inputs.query, &inputs.key, &inputs.value, &inputs.bias, &inputs.sinks, &inputs.mask, &inputs.key_ranges,
        &inputs.query_segments, &inputs.kv_segments, &inputs.alibi_slopes, &inputs.alibi_positions,
        &inputs.dropout_seed, &blocks.offsets, &blocks.indices, &blocks.tiles, &blocks.bits})
    call(*tensor, false);
  for (const Tensor* tensor : {&results.out, &results.lse, &results.lse_residual}) call(*tensor, true);
}

}  // namespace attn_ext::bindings
