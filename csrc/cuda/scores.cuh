// What becomes of the products of queries and keys before the softmax, and of the weights after it (core/params.h,
// ScoreParams and DropoutParams): everything but a positive scale, which costs nothing.
#pragma once
#include "core/dropout.h"
#include "core/online_softmax.h"
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

// To about 2^-22 of the larger of 1/8 and the result, at a third of tanhf's cost.
DEVICE float fast_tanh(float x) {
  const float square = x * x;
  const float near_zero = x * fused(square, fused(square, 2.f / 15, -1.f / 3), 1.f);
  const float elsewhere = 1.f - __fdividef(2.f, 1.f + ex2_approx(x * static_cast<float>(2 * kLog2E)));
  return fabsf(x) < 0.125f ? near_zero : elsewhere;
}

// Of 16 * MI rows of a warp.
template <int MI>
class ScoreTerms {
  const AttentionParams& p_;
  int batch_, head_;
  int query0_;

  // Rows past the end count as the last one: they are dropped.
  DEVICE int64_t query(int mi, int h) const {
    return min_i64(query0_ + mi * 16 + h * 8 + lane_index() / 4, p_.shape.query_len - 1);
  }

  template <class T, int NJ>
  DEVICE void add_bias(Accumulators<MI, NJ>& s, int key0) const {
    const ConstTensorView& bias = p_.score.bias;
    const int column = key0 + lane_index() % 4 * 2, existing = static_cast<int>(p_.shape.kv_len) - column;
    const T* const first = static_cast<const T*>(bias.data) + batch_ * bias.stride_batch + head_ * bias.stride_head +
                           column * bias.stride_column;
    UNROLL for (int mi = 0; mi < MI; ++mi)
      UNROLL for (int h = 0; h < 2; ++h) {
        const T* at = first + query(mi, h) * bias.stride_row;
        UNROLL for (int j = 0; j < NJ; ++j, at += 8 * bias.stride_column)
          UNROLL for (int e = 0; e < 2; ++e) {
            if (8 * j + e >= existing) continue;
            const float value = bias_in_log2<float>(to_float(at[e * bias.stride_column]));
            float& score = s[mi][j][2 * h + e];
            score = value == -INFINITY ? value : score + value;  // what the key is does not matter then
          }
      }
  }
  template <int NJ>
  DEVICE void subtract_alibi(Accumulators<MI, NJ>& s, int key0) const {
    const ScoreParams& score = p_.score;
    const double* const slopes = score.alibi_slopes + batch_ * score.alibi_stride_batch + head_ * score.alibi_stride_head;
    const int column = key0 + lane_index() % 4 * 2;
    UNROLL for (int mi = 0; mi < MI; ++mi)
      UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t i = query(mi, h);
        const int64_t position = score.alibi_positions ? score.alibi_positions[i] : i + p_.shape.kv_len - p_.shape.query_len;
        const float slope = static_cast<float>(slopes[i * score.alibi_stride_row]) * static_cast<float>(kLog2E);
        const float distance = static_cast<float>(position - column);
        UNROLL for (int j = 0; j < NJ; ++j)
          UNROLL for (int e = 0; e < 2; ++e) s[mi][j][2 * h + e] -= slope * fabsf(distance - static_cast<float>(8 * j + e));
      }
  }

 public:
  DEVICE ScoreTerms(const AttentionParams& p, int batch, int head, int query0)
      : p_(p), batch_(batch), head_(head), query0_(query0) {}

  // Products become scores in units of log2.  Where there is a bias, every tile is partial.
  template <bool kPartial, int NJ>
  DEVICE void apply(Accumulators<MI, NJ>& s, int key0) const {
    const ScoreParams& score = p_.score;
    if (score.softcap > 0) {
      const float to_cap = static_cast<float>(score.scale / score.softcap), cap_log2 = static_cast<float>(score.softcap * kLog2E);
      for_elements<MI, NJ>([&](int mi, int h, int j, int e) {
        s[mi][j][2 * h + e] = cap_log2 * fast_tanh(s[mi][j][2 * h + e] * to_cap);
      });
    } else {
      const float scale_log2 = static_cast<float>(score.scale * kLog2E);
      for_elements<MI, NJ>([&](int mi, int h, int j, int e) { s[mi][j][2 * h + e] *= scale_log2; });
    }
    if constexpr (kPartial) {
      if (score.bias.data && score.bias_dtype == DType::float32) add_bias<float>(s, key0);
      if (score.bias.data && score.bias_dtype == DType::float16) add_bias<Float16>(s, key0);
      if (score.bias.data && score.bias_dtype == DType::bfloat16) add_bias<BFloat16>(s, key0);
    }
    if (score.alibi_slopes) subtract_alibi(s, key0);
  }

  // Weights that are dropped become 0.  One call of the generator decides over what a thread holds of 32 keys.
  template <int NJ>
  DEVICE void drop(Accumulators<MI, NJ>& weights, int key0) const {
    const uint64_t seed = p_.dropout.key();
    static_assert(NJ % DropoutIndex::kWords == 0);
    UNROLL for (int mi = 0; mi < MI; ++mi)
      UNROLL for (int h = 0; h < 2; ++h)
        UNROLL for (int block = 0; block < NJ; block += DropoutIndex::kWords) {
          const uint32_t call = DropoutIndex::of(key0 + block * 8 + lane_index() % 4 * 2).call;
          uint32_t words[4] = {call, static_cast<uint32_t>(query(mi, h)), static_cast<uint32_t>(head_), static_cast<uint32_t>(batch_)};
          Philox<ScalarPhilox>::generate(words, seed);
          UNROLL for (int word = 0; word < DropoutIndex::kWords; ++word)
            UNROLL for (int half = 0; half < 2; ++half) {
              const bool kept = static_cast<int32_t>(words[word] >> 16 * half & 0xffff) < p_.dropout.threshold;
              if (!kept) weights[mi][block + word][2 * h + half] = 0.f;
            }
        }
  }
};

}  // namespace attn_ext::cuda
