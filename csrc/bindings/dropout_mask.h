// dropout_mask, for kernels of any kind.
//
// A Backend is that of bindings/forward.h, with
//   run(params, mask, seed)   fills the mask
#pragma once
#include "bindings/inputs.h"
#include "bindings/schemas.h"

namespace attn_ext::bindings {

// dropout_mask(dropout_seed, dropout_p, batch, heads, query_begin, query_end, kv_len) -> bool, true = kept
template <class Backend>
void dropout_mask(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor seed = arguments.tensor();
  const double dropout_p = arguments.number();
  DropoutMaskParams params;
  params.batch = arguments.integer(), params.heads = arguments.integer();
  params.query_begin = arguments.integer(), params.query_end = arguments.integer();
  params.kv_len = arguments.integer();
  Backend::check_seed(seed);
  params.dropout = Inputs::checked_dropout(dropout_p, seed, seed.device(), Backend::kContents);
  STD_TORCH_CHECK(params.batch >= 0 && params.heads >= 0 && 0 <= params.query_begin && params.query_begin <= params.query_end &&
                      params.kv_len >= 0,
                  "sizes must not be negative");
  Tensor mask = empty({params.batch, params.heads, params.query_end - params.query_begin, params.kv_len}, {0, 1, 2, 3},
                      torch_dtype(DType::boolean), seed.device());
  params.mask = static_cast<uint8_t*>(mask.data());
  Backend::run(params, mask, seed);
  give(stack, mask);
}

template <class Backend, class Library>
void implement_dropout_mask(Library& library) {
  library.impl("dropout_mask", dropout_mask<Backend>);
}

}  // namespace attn_ext::bindings
