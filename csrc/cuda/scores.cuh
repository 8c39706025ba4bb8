// What becomes of the products of queries and keys before the softmax, and of the weights after it (core/params.h,
// ScoreParams and DropoutParams): everything but a positive scale, which costs nothing.
#pragma once
#include "core/dropout.h"
#include "core/mask.h"
#include "core/online_softmax.h"
#include "cuda/accumulators.cuh"
#include "cuda/score_factors.h"

namespace attn_ext::cuda {

// To about 2^-22 of the larger of 1/8 and the result, at a third of tanhf's cost.
DEVICE float fast_tanh(float x) {
  const float square = x * x;
  const float near_zero = x * fused(square, fused(square, 2.f / 15, -1.f / 3), 1.f);
  const float elsewhere = 1.f - __fdividef(2.f, 1.f + ex2_approx(x * static_cast<float>(2 * kLog2E)));
  return fabsf(x) < 0.125f ? near_zero : elsewhere;
}

// Which of N keys dropout keeps for a query, in the bits of visible_keys.cuh.  One call of the generator decides over what a
// thread holds of 32 keys.
template <int N>
DEVICE uint32_t kept_keys(const AttentionParams& p, int batch, int head, int query, int key0) {
  static_assert(N % DropoutIndex::kBlock == 0 || N == DropoutIndex::kBlock / 2);
  constexpr int kRuns = N / 8;  // of 8 keys, kWords of which a call decides over
  const uint64_t seed = p.dropout.key();
  uint32_t kept = 0;
  UNROLL for (int run = 0; run < kRuns; run += DropoutIndex::kWords) {
    const DropoutIndex index = DropoutIndex::of(key0 + run * 8 + lane_index() % 4 * 2);
    uint32_t words[4] = {index.call, static_cast<uint32_t>(query), static_cast<uint32_t>(head), static_cast<uint32_t>(batch)};
    Philox<ScalarPhilox>::generate(words, seed);
    if (kRuns < DropoutIndex::kWords && index.word) words[0] = words[2], words[1] = words[3];  // the second half of 32 keys
    UNROLL for (int word = 0; word < DropoutIndex::kWords && run + word < kRuns; ++word)
      UNROLL for (int half = 0; half < 2; ++half) {
        const bool keeps = static_cast<int32_t>(words[word] >> 16 * half & 0xffff) < p.dropout.threshold;
        kept |= static_cast<uint32_t>(keeps) << (2 * (run + word) + half);
      }
  }
  return kept;
}

// Of a warp's tile; Place says which queries and keys it has.
template <class Place>
class ScoreTerms {
  using Scores = Accumulators<Place::MI, Place::NJ>;
  const AttentionParams& p_;
  const ScoreFactors& factors_;
  int batch_, head_;
  int query0_;

  // Loads for one query after the other do not wait for another, but for all of many they would want as many registers.
  DEVICE static void take_turns(int q) {
    if (q > 0 && q % 4 == 0) __syncwarp();
  }
  template <class T>
  DEVICE void add_bias(Scores& s, int key0) const {
    const ConstTensorView& bias = p_.score.bias;
    const int key = key0 + Place::first_key(), existing = static_cast<int>(p_.shape.kv_len) - key;
    const T* const first = static_cast<const T*>(bias.data) + batch_ * bias.stride_batch + head_ * bias.stride_head +
                           key * bias.stride_column;
    UNROLL for (int q = 0; q < Place::kQueries; ++q) {
      take_turns(q);
      const T* const row = first + query(q) * bias.stride_row;
      UNROLL for (int k = 0; k < Place::kKeys; ++k) {
        if (Place::key_offset(k) >= existing) continue;
        const float value = bias_in_log2<float>(to_float(row[Place::key_offset(k) * bias.stride_column]));
        float& score = Place::at(s, q, k);
        score = value == -INFINITY ? value : score + value;  // what the key is does not matter then
      }
    }
  }
  DEVICE void subtract_alibi(Scores& s, int key0) const {
    const ScoreParams& score = p_.score;
    const double* const slopes = score.alibi_slopes + batch_ * score.alibi_stride_batch + head_ * score.alibi_stride_head;
    const int key = key0 + Place::first_key();
    UNROLL for (int q = 0; q < Place::kQueries; ++q) {
      take_turns(q);
      const int64_t i = query(q);
      const int64_t position = score.alibi_positions ? score.alibi_positions[i] : i + p_.shape.kv_len - p_.shape.query_len;
      const float slope = static_cast<float>(slopes[i * score.alibi_stride_row]) * static_cast<float>(kLog2E);
      const float distance = static_cast<float>(position - key);
      UNROLL for (int k = 0; k < Place::kKeys; ++k)
        Place::at(s, q, k) -= slope * fabsf(distance - static_cast<float>(Place::key_offset(k)));
    }
  }
  DEVICE void cap(Scores& s) const {
    for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) = fast_tanh(Place::at(s, q, k) * factors_.to_cap); });
  }
  DEVICE void scale_capped(Scores& s) const {
    for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) *= factors_.cap_log2; });
  }
  DEVICE void scale(Scores& s) const {
    for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) *= factors_.scale_log2; });
  }

 public:
  DEVICE ScoreTerms(const AttentionParams& p, const ScoreFactors& factors, int batch, int head, int query0)
      : p_(p), factors_(factors), batch_(batch), head_(head), query0_(query0) {}

  // Rows past the end count as the last one: they are dropped.
  DEVICE int query(int q) const {
    return min(query0_ + Place::first_query() + Place::query_offset(q), static_cast<int>(p_.shape.query_len) - 1);
  }

  // Products become scores in units of log2.  Where there is a bias, every tile is partial.
  template <bool kPartial>
  DEVICE void apply(Scores& s, int key0) const {
    apply<kPartial>(s, key0, [](const Scores&) {});
  }
  // The same; take(slopes) gets those of the softcap, if there is one.
  template <bool kPartial, class Take>
  DEVICE void apply(Scores& s, int key0, const Take& take) const {
    if (p_.score.softcap > 0) {
      cap(s);
      Scores slopes;
      for_pairs<Place>([&](int q, int k) { Place::at(slopes, q, k) = 1.f - Place::at(s, q, k) * Place::at(s, q, k); });
      take(slopes);
      scale_capped(s);
    } else {
      scale(s);
    }
    add<kPartial>(s, key0);
  }

 private:
  template <bool kPartial>
  DEVICE void add(Scores& s, int key0) const {
    const ScoreParams& score = p_.score;
    if constexpr (kPartial) {
      if (score.bias.data && score.bias_dtype == DType::float32) add_bias<float>(s, key0);
      if (score.bias.data && score.bias_dtype == DType::float16) add_bias<Float16>(s, key0);
      if (score.bias.data && score.bias_dtype == DType::bfloat16) add_bias<BFloat16>(s, key0);
    }
    if (score.alibi_slopes) subtract_alibi(s, key0);
  }

 public:
  // Weights that are dropped become 0; of tiles whose rows are queries.
  DEVICE void drop(Scores& weights, int key0) const {
    UNROLL for (int q = 0; q < Place::kQueries; ++q) {
      const uint32_t kept = kept_keys<4 * Place::kKeys>(p_, batch_, head_, query(q), key0);
      UNROLL for (int k = 0; k < Place::kKeys; ++k)
        if (!(kept >> k & 1)) Place::at(weights, q, k) = 0.f;
    }
  }
};

}  // namespace attn_ext::cuda
