// attention_decode, for kernels of any kind.
//
// A Backend tells how its kernels are called:
//   kContents                             whether lengths, pages and scales are checked before
//   check_query(query)                    that this is a tensor for its kernels
//   run_decode(inputs, params, results)   fills the results
#pragma once
#include "bindings/decode_inputs.h"
#include "bindings/schemas.h"

namespace attn_ext::bindings {

struct DecodeResults {
  Tensor out, lse;
};

template <class Backend>
void attention_decode(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  DecodeInputs inputs(Backend::kContents);
  DeviceDecodeParams params;
  inputs.take(arguments, params);
  Backend::check_query(inputs.query);
  inputs.check(params);
  const AttentionShape& shape = params.shape;
  const int32_t statistics = torch_dtype(statistics_dtype(params.dtype));
  DecodeResults results{
      .out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim}),
      .lse = empty({shape.batch, shape.heads, shape.query_len}, {0, 1, 2}, statistics, inputs.device)};
  params.out = view(results.out);
  params.lse = results.lse.data();
  Backend::run_decode(inputs, params, results);
  give(stack, results.out, results.lse);
}

}  // namespace attn_ext::bindings
