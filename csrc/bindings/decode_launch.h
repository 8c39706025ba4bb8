// How the decoding kernels of cuda/ are called.
#pragma once
#include "bindings/decode.h"
#include "bindings/unsupported.h"
#include "cuda/decode_plan.h"

namespace attn_ext::bindings {

// What the kernels leave for each other: one allocation.
struct DecodeWorkspace {
  Tensor floats;

  DecodeWorkspace(DeviceDecodeParams& p, Device device) {
    const int64_t rows = cuda::partial_rows(p);
    floats = empty({rows, p.partial_columns + 2}, {0, 1}, torch_dtype(DType::float32), device);
    p.partial_out = static_cast<float*>(floats.data());
    p.partial_state = p.partial_out + rows * p.partial_columns;
  }
};

// Enqueues the kernels by `launch(params, workspace)`.
template <class Launch>
void run_planned(const DecodeInputs& inputs, DeviceDecodeParams& params, const cuda::Device& device, Launch&& launch) {
  check_supported(static_cast<const DecodeParams&>(params), device);
  cuda::plan(params, device);
  const DecodeWorkspace workspace(params, inputs.device);
  launch(params, workspace);
}

// The memory that the kernels may touch, tensor by tensor: calls f(address, bytes, access), from a tensor's first byte to its
// last.
enum class MemoryUse { read, written, result };

template <class F>
void for_decode_memory(const DecodeInputs& inputs, const DeviceDecodeParams& params, const DecodeResults& results,
                       const DecodeWorkspace& workspace, F&& f) {
  const auto call = [&](const Tensor& tensor, MemoryUse use) {
    if (!tensor || tensor.elements() == 0) return;
    int64_t last = 0;
    for (int d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    f(tensor.data(), (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype_code())), use);
  };
  for (const Tensor* tensor : {&inputs.query, &inputs.cache_seqlens, &inputs.block_table, &inputs.new_key, &inputs.new_value,
                               &inputs.rotary_cos, &inputs.rotary_sin, &inputs.key_scale, &inputs.value_scale,
                               &inputs.alibi_slopes, &inputs.sinks})
    call(*tensor, MemoryUse::read);
  for (const Tensor* tensor : {&inputs.key_cache, &inputs.value_cache})
    call(*tensor, params.shape.kv_len > 0 ? MemoryUse::written : MemoryUse::read);
  for (const Tensor* tensor : {&results.out, &results.lse, &workspace.floats}) call(*tensor, MemoryUse::result);
}

}  // namespace attn_ext::bindings
