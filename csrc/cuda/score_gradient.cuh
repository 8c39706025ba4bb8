// From products of queries and keys to weights, and from dP to dS: what the kernels of the backward pass do between products.
//
//   P = 2^(s - normalizer),   dS = P * (dP - D_i),   both of a warp's tile; Place says which queries and keys it has
#pragma once
#include "cuda/backward.h"
#include "cuda/scores.cuh"

namespace attn_ext::cuda {

// Of one head.
class RowNormalizers {
  const float *lse_, *residual_;
  int rows_;

 public:
  DEVICE RowNormalizers(const BackwardParams& p, int batch, int head) : rows_(static_cast<int>(p.shape.query_len)) {
    const int64_t first = (static_cast<int64_t>(batch) * p.shape.heads + head) * p.shape.query_len;
    lse_ = static_cast<const float*>(p.lse) + first, residual_ = static_cast<const float*>(p.lse_residual) + first;
  }
  // In two parts: one float rounds away what is a factor in all weights of the row.
  DEVICE float2 operator()(int row) const {
    const float lse = row < rows_ ? lse_[row] : -INFINITY;
    return lse == -INFINITY ? make_float2(INFINITY, 0.f) : make_float2(RowStatistics<float>::to_log2(lse), residual_[row]);
  }
};

// Scores in units of log2 become weights.  query0: the warp's first.  Hidden keys, of partial tiles, weigh 0 whatever the
// normalizer is.
template <class Place, bool kPartial>
DEVICE void precise_weights(Accumulators<Place::MI, Place::NJ>& s, const RowNormalizers& normalizers, int query0) {
  UNROLL for (int q = 0; q < Place::kQueries; ++q) {
    const float2 normalizer = normalizers(query0 + Place::first_query() + Place::query_offset(q));
    UNROLL for (int k = 0; k < Place::kKeys; ++k) {
      float& p = Place::at(s, q, k);
      p = kPartial && p == -INFINITY ? 0.f : ex2_approx((p - normalizer.x) - normalizer.y);
    }
  }
}
// Products become weights where no normalizer is so large that rounding shows.  factor brings them to units of log2.
template <class Place, bool kPartial, class Normalizer>
DEVICE void weights(Accumulators<Place::MI, Place::NJ>& s, float factor, const Normalizer& normalizer) {
  for_pairs<Place>([&](int q, int k) {
    float& p = Place::at(s, q, k);
    p = kPartial && p == -INFINITY ? 0.f : ex2_approx(fused(p, factor, -normalizer(q)));
  });
}

// dP - D_i becomes dS.  What a mask hides weighs 0, and dP may be anything there.
template <bool kPartial, int MI, int NJ>
DEVICE void score_gradient(Accumulators<MI, NJ>& dp, const Accumulators<MI, NJ>& weights) {
  for_elements<MI, NJ>([&](int mi, int h, int j, int e) {
    const float weight = weights[mi][j][2 * h + e];
    float& ds = dp[mi][j][2 * h + e];
    ds = kPartial && weight == 0.f ? 0.f : weight * ds;
  });
}

// A number for each pair of a thread's queries and keys, between 0 and 1: where it is rounded to T's precision in the end, in
// half the registers.
template <class Place, class T>
class PairFactors {
  static constexpr bool kPacked = sizeof(T) == 2;
  static constexpr int kPairs = Place::kQueries * Place::kKeys;
  std::conditional_t<kPacked, uint32_t, float> words_[kPacked ? kPairs / 2 : kPairs];

 public:
  DEVICE void set(const Accumulators<Place::MI, Place::NJ>& x) {
    for_pairs<Place>([&](int q, int k) {
      const int pair = q * Place::kKeys + k;
      if constexpr (!kPacked) words_[pair] = Place::at(x, q, k);
      else if (k % 2 == 1) words_[pair / 2] = pack<Float16>(Place::at(x, q, k - 1), Place::at(x, q, k));
    });
  }
  DEVICE float at(int q, int k) const {
    const int pair = q * Place::kKeys + k;
    if constexpr (!kPacked) return words_[pair];
    else return to_float(Float16{static_cast<uint16_t>(words_[pair / 2] >> 16 * (pair % 2))});
  }
};

// Scores that are modified, and dropout: what P, dP and dS need of them.
template <class Place, class T>
class ModifiedScores {
  using Scores = Accumulators<Place::MI, Place::NJ>;
  static_assert(Place::kQueries * Place::kKeys <= 32);
  const BackwardArguments& a_;
  uint32_t kept_ = 0;              // by dropout: bit q * kKeys + k
  PairFactors<Place, T> slopes_;   // of the softcap, if there is one

  DEVICE bool keeps(int q, int k) const { return kept_ >> (q * Place::kKeys + k) & 1; }

 public:
  DEVICE explicit ModifiedScores(const BackwardArguments& a) : a_(a) {}

  // kept(q) has a bit for each of the thread's keys.
  template <class Kept>
  DEVICE void set_kept(const Kept& kept) {
    if (a_.params.dropout.enabled()) UNROLL for (int q = 0; q < Place::kQueries; ++q) kept_ |= kept(q) << (q * Place::kKeys);
  }
  // Products become scores in units of log2.
  template <bool kPartial>
  DEVICE void apply(Scores& s, const ScoreTerms<Place>& terms, int key0) {
    terms.template apply<kPartial>(s, key0, [&](const Scores& slopes) { slopes_.set(slopes); });
  }
  // The weights that values are summed with, but for a common factor.
  DEVICE void drop(Scores& weights) const {
    if (!a_.params.dropout.enabled()) return;
    for_pairs<Place>([&](int q, int k) {
      if (!keeps(q, k)) Place::at(weights, q, k) = 0.f;
    });
  }
  // P, times the slope: what makes of dP the gradient of the scaled product instead of that of the score.
  DEVICE void through_softcap(Scores& weights) const {
    if (!(a_.params.score.softcap > 0)) return;
    for_pairs<Place>([&](int q, int k) {
      float& weight = Place::at(weights, q, k);
      if (weight != 0.f) weight *= slopes_.at(q, k);
    });
  }
  // dP, of the weights that are left, becomes dS.
  template <bool kPartial, class MinusDelta>
  DEVICE void gradient(Scores& dp, const Scores& weights, const MinusDelta& minus_delta) const {
    for_pairs<Place>([&](int q, int k) {
      float& ds = Place::at(dp, q, k);
      if (a_.params.dropout.enabled()) ds = keeps(q, k) ? ds * a_.inverse_keep : 0.f;
      ds += minus_delta(q);
    });
    score_gradient<kPartial>(dp, weights);
  }
};

}  // namespace attn_ext::cuda
