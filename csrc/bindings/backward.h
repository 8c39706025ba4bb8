// attention_backward, for kernels of any kind.
//
// A Backend is that of bindings/forward.h, with
//   run(inputs, params, tensors)   fills the gradients; of the params, the views of rows are missing
#pragma once
#include "bindings/inputs.h"
#include "bindings/schemas.h"

namespace attn_ext::bindings {

struct BackwardTensors {
  Tensor grad_out, grad_lse, out, lse, lse_residual;                       // grad_lse may be missing
  Tensor grad_query, grad_key, grad_value, grad_bias, grad_sinks;  // the last two without elements where not wanted

  void check(const Inputs& inputs, BackwardParams& params) {
    const AttentionShape& shape = params.shape;
    const auto check_like_out = [&](const Tensor& tensor, const char* name) {
      check_device(tensor, name, inputs.device);
      check_dtype(tensor, name, params.dtype, "the dtype of query");
      check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
    };
    check_like_out(out, "out");
    check_like_out(grad_out, "grad_out");
    const auto checked_statistics = [&](Tensor& tensor, const char* name) {
      check_device(tensor, name, inputs.device);
      check_dtype(tensor, name, statistics_dtype(params.dtype), "dtype float64 for float64 inputs and float32 for all others");
      check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len});
      tensor = contiguous(std::move(tensor));
      return static_cast<const void*>(tensor.data());
    };
    params.lse = checked_statistics(lse, "lse");
    params.lse_residual = checked_statistics(lse_residual, "lse_residual");
    if (grad_lse) params.grad_lse = checked_statistics(grad_lse, "grad_lse");
  }
  void allocate(const Inputs& inputs, BackwardParams& params, bool wants_grad_bias, bool wants_grad_sinks) {
    const AttentionShape& shape = params.shape;
    const DType statistics = statistics_dtype(params.dtype);
    grad_query = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.head_dim});
    grad_key = empty_in_order_of(inputs.key, {shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim});
    grad_value = empty_in_order_of(inputs.value, {shape.batch, shape.kv_heads, shape.kv_len, shape.value_dim});
    grad_bias = nothing(statistics, inputs.device);
    grad_sinks = nothing(DType::float64, inputs.device);
    if (wants_grad_bias) {
      const Tensor& bias = inputs.bias;
      STD_TORCH_CHECK(static_cast<bool>(bias), "the gradient of a bias that is not there");
      grad_bias = empty({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, {0, 1, 2, 3}, torch_dtype(statistics),
                        inputs.device);
      const ConstTensorView grad = broadcast_view(grad_bias);
      params.grad_bias = {grad_bias.data(), grad.stride_batch, grad.stride_head, grad.stride_row, grad.stride_column};
      params.grad_bias_elements = bias.elements();
    }
    if (wants_grad_sinks) {
      STD_TORCH_CHECK(static_cast<bool>(inputs.sinks), "the gradient of sinks that are not there");
      grad_sinks = empty({shape.heads}, {0}, torch_dtype(DType::float64), inputs.device);
      params.grad_sinks = static_cast<double*>(grad_sinks.data());
    }
  }
  void set_gradients(BackwardParams& params) const {
    params.grad_query = view(grad_query);
    params.grad_key = view(grad_key);
    params.grad_value = view(grad_value);
  }
};

template <class Backend>
void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  BackwardTensors tensors;
  tensors.grad_out = arguments.tensor(), tensors.grad_lse = arguments.optional_tensor();
  Inputs inputs(Backend::kContents);
  BackwardParams params;
  inputs.take_tensors(arguments);
  tensors.out = arguments.tensor(), tensors.lse = arguments.tensor(), tensors.lse_residual = arguments.tensor();
  inputs.take_options(arguments);
  inputs.set_numbers(arguments, params);
  const bool wants_grad_bias = arguments.flag(), wants_grad_sinks = arguments.flag();
  Backend::check_query(inputs.query);
  inputs.check(params);
  tensors.check(inputs, params);
  tensors.allocate(inputs, params, wants_grad_bias, wants_grad_sinks);
  Backend::run(inputs, params, tensors);
  give(stack, tensors.grad_query, tensors.grad_key, tensors.grad_value, tensors.grad_bias, tensors.grad_sinks);
}

template <class Backend, class Library>
void implement_backward(Library& library) {
  library.impl("attention_backward", attention_backward<Backend>);
}

}  // namespace attn_ext::bindings
