// Makes a line of core/variants.def a kernel.
#pragma once
#include "cuda/flash_forward.cuh"
#include "cuda/launch.cuh"

namespace attn_ext::cuda {

template <class F>
constexpr ForwardVariant forward_variant_of(const char* name) {
  return {.name = name,
          .dtype = dtype_of<typename F::T>(),
          .key_columns = F::Key::kColumns,
          .value_columns = F::Value::kColumns,
          .queries = F::M,
          .shared_bytes = F::kSharedBytes,
          .modified = F::kModified,
          .launch = [](const ForwardParams& p, const Stream& stream, const ForwardVariant& variant) {
            const int64_t tiles = (p.shape.query_len + F::M - 1) / F::M;
            launch<flash_forward<F>>(variant.name, tiles * p.shape.heads * p.shape.batch, F::kThreads, F::kSharedBytes, stream, p);
          }};
}

}  // namespace attn_ext::cuda

#define FORWARD(name, ...)                                                                                            \
  namespace attn_ext::cuda {                                                                                          \
  extern const ForwardVariant forward_##name;                                                                         \
  constexpr ForwardVariant forward_##name = forward_variant_of<ForwardTraits<__VA_ARGS__>>("flash_forward_" #name); \
  }
