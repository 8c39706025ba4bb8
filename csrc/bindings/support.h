// attention_support and decode_support: a call up to where kernels start, of tensors that have sizes and no memory.  So the
// answer is that of the call, and nothing is read, copied or allocated.
//
// Devices::get(index) tells the device, or throws std::exception with what is wrong with it.
#pragma once
#include "bindings/aligned_backward.h"
#include "bindings/aligned_forward.h"
#include "bindings/decode_launch.h"

namespace attn_ext::bindings {

inline void check_no_memory(const Tensor& query) {
  STD_TORCH_CHECK(query.device().type == aoti_torch_device_type_meta(), "query must be a meta tensor");
}

// Calls ask(device), and hands over why it throws Unsupported.
template <class Devices, class Ask>
void give_reason(StableIValue* stack, int64_t index, Ask&& ask) {
  std::string reason;
  cuda::Device device;
  try {
    device = Devices::get(static_cast<int>(index));
  } catch (const std::exception& error) {
    reason = error.what();
  }
  try {
    if (reason.empty()) ask(device);
  } catch (const Unsupported& error) {
    reason = error.reason;
  }
  *stack = torch::stable::detail::from(reason);
}

template <class Devices>
void attention_support(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Inputs inputs(Contents::unchecked);
  ForwardParams forward;
  inputs.take_tensors(arguments);
  inputs.take_options(arguments);
  inputs.set_numbers(arguments, forward);
  const bool wants_grad_bias = arguments.flag(), wants_grad_sinks = arguments.flag();
  const int64_t derivatives = arguments.integer(), index = arguments.integer();
  check_no_memory(inputs.query);
  inputs.check(forward);
  give_reason<Devices>(stack, index, [&](const cuda::Device& device) {
    const AttentionShape shape = forward.shape;  // of the call: inputs become wider where columns are added
    BackwardParams backward;
    static_cast<AttentionParams&>(backward) = forward;
    ForwardResults results;
    results.out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
    BackwardTensors tensors;
    if (derivatives > 0) {
      tensors.out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
      tensors.grad_out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
      tensors.allocate(inputs, backward, wants_grad_bias, wants_grad_sinks);
    }
    run_aligned(inputs, forward, results, device, [](const auto&...) {});
    if (derivatives > 0) run_aligned(inputs, backward, tensors, device, [](const auto&...) {});
  });
}

template <class Devices>
void decode_support(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  DecodeInputs inputs(Contents::unchecked);
  DeviceDecodeParams params;
  inputs.take(arguments, params);
  const int64_t index = arguments.integer();
  check_no_memory(inputs.query);
  inputs.check(params);
  give_reason<Devices>(stack, index, [&](const cuda::Device& device) {
    run_planned(inputs, params, device, [](const auto&...) {});
  });
}

template <class Devices, class Library>
void implement_support(Library& library) {
  library.impl("attention_support", attention_support<Devices>);
  library.impl("decode_support", decode_support<Devices>);
}

}  // namespace attn_ext::bindings
