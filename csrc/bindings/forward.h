// attention_forward and attention_output, for kernels of any kind.
//
// A Backend tells how its kernels are called:
//   kContents                      whether what tensors hold is checked before
//   check_query(query)             that this is a tensor for its kernels
//   run(inputs, params, results)   fills the results; of the params, the views of rows are missing
#pragma once
#include "bindings/inputs.h"
#include "bindings/schemas.h"

namespace attn_ext::bindings {

struct ForwardResults {
  Tensor out, lse, lse_residual;  // the statistics may be missing
};

template <class Backend>
void run_forward(Inputs& inputs, ForwardParams& params, ForwardResults& results) {
  const AttentionShape& shape = params.shape;
  results.out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  Backend::run(inputs, params, results);
}

template <class Backend>
void attention_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Inputs inputs(Backend::kContents);
  ForwardParams params;
  inputs.take_tensors(arguments);
  inputs.take_options(arguments);
  inputs.set_numbers(arguments, params);
  Backend::check_query(inputs.query);
  inputs.check(params);
  const int64_t rows[3] = {params.shape.batch, params.shape.heads, params.shape.query_len};
  const int32_t statistics = torch_dtype(statistics_dtype(params.dtype));
  ForwardResults results;
  results.lse = empty(rows, {0, 1, 2}, statistics, inputs.device);
  results.lse_residual = empty(rows, {0, 1, 2}, statistics, inputs.device);
  params.lse = results.lse.data();
  params.lse_residual = results.lse_residual.data();
  run_forward<Backend>(inputs, params, results);
  give(stack, results.out, results.lse, results.lse_residual);
}

// The usual inference: fewer arguments and results take a small call less time.
template <class Backend>
void attention_output(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Inputs inputs(Backend::kContents);
  ForwardParams params;
  inputs.take_tensors(arguments);
  inputs.bias = arguments.optional_tensor(), inputs.mask = arguments.optional_tensor();
  inputs.key_ranges = arguments.optional_tensor();
  params.score.scale = arguments.number();
  params.mask.band_lower = arguments.optional_int().value_or(MaskParams::no_lower);
  params.mask.band_upper = arguments.optional_int().value_or(MaskParams::no_upper);
  Backend::check_query(inputs.query);
  inputs.check(params);
  ForwardResults results;
  run_forward<Backend>(inputs, params, results);
  give(stack, results.out);
}

template <class Backend, class Library>
void implement_forward(Library& library) {
  library.impl("attention_forward", attention_forward<Backend>);
  library.impl("attention_output", attention_output<Backend>);
}

}  // namespace attn_ext::bindings
