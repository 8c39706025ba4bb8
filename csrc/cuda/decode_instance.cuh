// Makes a line of core/variants.def a kernel.
#pragma once
#include "cuda/flash_decode.cuh"
#include "cuda/launch.cuh"

namespace attn_ext::cuda {

template <class F>
constexpr DecodeVariant decode_variant_of(const char* name) {
  using T = typename F::T;
  return {.name = name,
          .dtype = std::is_same_v<T, float> ? DType::float32 : std::is_same_v<T, Float16> ? DType::float16 : DType::bfloat16,
          .columns = F::kColumns,
          .shared_bytes = F::kSharedBytes,
          .quantised = F::kQuantised,
          .launch = [](const DeviceDecodeParams& p, const Stream& stream, const DecodeVariant& variant) {
            const int64_t blocks = p.shape.batch * p.shape.kv_heads * decode_row_blocks(p) * p.blocks;
            launch<flash_decode<F>>(variant.name, blocks, F::kThreads, F::kSharedBytes, stream, p);
          }};
}

}  // namespace attn_ext::cuda

#define DECODE(name, ...)                                                                                      \
  namespace attn_ext::cuda {                                                                                   \
  extern const DecodeVariant decode_##name;                                                                    \
  constexpr DecodeVariant decode_##name = decode_variant_of<DecodeTraits<__VA_ARGS__>>("flash_decode_" #name); \
  }
