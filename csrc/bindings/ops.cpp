// torch.ops.attn_ext.*, and their kernels of the CPU.
#include "bindings/forward.h"
#include "bindings/torch_executor.h"
#include "core/dropout.h"
#include "cpu/kernel_table.h"

namespace attn_ext::bindings {
namespace {

struct Cpu {
  static constexpr Contents kContents = Contents::checked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run(Inputs& inputs, ForwardParams& params, ForwardResults& results) {
    inputs.set_views(params);
    params.out = view(results.out);
    cpu::kernel_table().forward[static_cast<int>(params.dtype)](params, torch_executor());
  }
};

void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor grad_out = arguments.tensor(), grad_lse = arguments.optional_tensor();
  Inputs inputs(Contents::checked);
  BackwardParams params;
  inputs.take_tensors(arguments);
  Tensor out = arguments.tensor(), lse = arguments.tensor(), lse_residual = arguments.tensor();
  inputs.take_options(arguments);
  inputs.set_numbers(arguments, params);
  const bool wants_grad_bias = arguments.flag(), wants_grad_sinks = arguments.flag();
  check_cpu(inputs.query, "query");
  inputs.check(params);
  const AttentionShape& shape = params.shape;
  const DType dtype = params.dtype, statistics = statistics_dtype(dtype);

  const auto check_like_out = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, name, inputs.device);
    check_dtype(tensor, name, dtype, "the dtype of query");
    check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  };
  check_like_out(out, "out");
  check_like_out(grad_out, "grad_out");
  const auto checked_statistics = [&](Tensor& tensor, const char* name) {
    check_device(tensor, name, inputs.device);
    check_dtype(tensor, name, statistics, "dtype float64 for float64 inputs and float32 for all others");
    check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len});
    tensor = contiguous(std::move(tensor));
    return static_cast<const void*>(tensor.data());
  };
  params.lse = checked_statistics(lse, "lse");
  params.lse_residual = checked_statistics(lse_residual, "lse_residual");
  if (grad_lse) params.grad_lse = checked_statistics(grad_lse, "grad_lse");

  Tensor grad_query = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.head_dim});
  Tensor grad_key = empty_in_order_of(inputs.key, {shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim});
  Tensor grad_value = empty_in_order_of(inputs.value, {shape.batch, shape.kv_heads, shape.kv_len, shape.value_dim});
  params.grad_query = view(grad_query);
  params.grad_key = view(grad_key);
  params.grad_value = view(grad_value);

  Tensor grad_bias = nothing(statistics, cpu()), grad_sinks = nothing(DType::float64, cpu());
  if (wants_grad_bias) {
    const Tensor& bias = inputs.bias;
    STD_TORCH_CHECK(static_cast<bool>(bias), "the gradient of a bias that is not there");
    grad_bias = empty({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, {0, 1, 2, 3}, torch_dtype(statistics), cpu());
    const ConstTensorView grad = broadcast_view(grad_bias);
    params.grad_bias = {grad_bias.data(), grad.stride_batch, grad.stride_head, grad.stride_row, grad.stride_column};
    params.grad_bias_elements = bias.elements();
  }
  if (wants_grad_sinks) {
    STD_TORCH_CHECK(static_cast<bool>(inputs.sinks), "the gradient of sinks that are not there");
    grad_sinks = empty({shape.heads}, {0}, torch_dtype(DType::float64), cpu());
    params.grad_sinks = static_cast<double*>(grad_sinks.data());
  }

  inputs.set_views(params);
  for (auto [tensor, input] : {std::pair{&out, &params.out}, std::pair{&grad_out, &params.grad_out}}) {
    *tensor = with_adjacent_columns(std::move(*tensor));
    *input = const_view(*tensor);
  }
  cpu::kernel_table().backward[static_cast<int>(dtype)](params, torch_executor());
  give(stack, grad_query, grad_key, grad_value, grad_bias, grad_sinks);
}

// dropout_mask(dropout_seed, dropout_p, batch, heads, query_begin, query_end, kv_len) -> bool, true = kept
void dropout_mask(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor seed = arguments.tensor();
  const DropoutParams dropout = Inputs::checked_dropout(arguments.number(), seed, cpu(), Contents::checked);
  const int64_t batch = arguments.integer(), heads = arguments.integer(), begin = arguments.integer();
  const int64_t end = arguments.integer(), kv_len = arguments.integer();
  STD_TORCH_CHECK(batch >= 0 && heads >= 0 && 0 <= begin && begin <= end && kv_len >= 0, "sizes must not be negative");
  Tensor mask = empty({batch, heads, end - begin, kv_len}, {0, 1, 2, 3}, torch_dtype(DType::boolean), cpu());
  auto* kept = static_cast<uint8_t*>(mask.data());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < kv_len; ++j) *kept++ = keeps_weight(dropout, b, h, i, j);
  give(stack, mask);
}

}  // namespace
}  // namespace attn_ext::bindings

STABLE_TORCH_LIBRARY(attn_ext, library) {
  library.def(attn_ext::bindings::kAttentionForward);
  library.def(attn_ext::bindings::kAttentionOutput);
  library.def(attn_ext::bindings::kAttentionBackward);
  library.def(attn_ext::bindings::kDropoutMask);
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, library) {
  attn_ext::bindings::implement_forward<attn_ext::bindings::Cpu>(library);
  library.impl("attention_backward", attn_ext::bindings::attention_backward);
  library.impl("dropout_mask", attn_ext::bindings::dropout_mask);
}
