// Online softmax of score tiles in registers (accumulators.cuh).
//
// The maximum of core/online_softmax.h, plus a headroom, is the exponent that weights are taken relative to.  It may be any
// number near the row's maximum, the result is the same; so it moves only where weights would grow beyond 2^kSlack of what
// the headroom allows, and most tiles leave the sums as they are (FlashAttention-4 does so too; on normally distributed
// scores 1.6 % of the tiles move it).
#pragma once
#include "core/online_softmax.h"
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

// The arithmetic of core/online_softmax.h, a row in each thread.
struct ThreadMath {
  using Value = float;
  DEVICE static float splat(float x) { return x; }
  DEVICE static float max(float a, float b) { return fmaxf(a, b); }
  DEVICE static float exp2(float x) { return ex2_approx(x); }
  DEVICE static float weight(float x) { return ex2_approx(x); }
};

// Weights may grow by so many powers of two before the maximum moves.
constexpr float kSlack = 8.f;

// How far below 1 the weights of a row's largest score start, in powers of two.  Values of bf16 and fp32 may be near the
// largest number of fp32, and their weighted sum must not overflow (core/online_softmax.h, kHeadroom).  For bf16 the maximum
// carries it at no cost; in fp32 that would round the exponents, and weights are multiplied.  Values of fp16 cannot overflow
// fp32, and fp16 weights need their bits.
template <class T>
struct Headroom {
  static constexpr float kExponent = 0.f, kFactor = 1.f;
};
template <>
struct Headroom<BFloat16> {
  static constexpr float kExponent = kHeadroom + kSlack, kFactor = 1.f;
};
template <>
struct Headroom<float> {
  static constexpr float kExponent = 0.f, kFactor = 0x1p-28f;
};

template <class T, int MI>
class TileSoftmax {
  static constexpr float kExponent = Headroom<T>::kExponent, kFactor = Headroom<T>::kFactor;
  // From here on products of scores are rounded before the maximum is subtracted: the error of one that is not would be a
  // factor in every weight of the row.
  static constexpr float kHuge = 1 << 24;
  // From here on adding the exponent's headroom to the maximum changes nothing, and weights are multiplied.
  static constexpr float kAbsorbs = 1 << 29;
  // By how much scores may exceed the maximum before it moves.
  static constexpr float kBound = kSlack - kExponent;

  OnlineSoftmax<float, ThreadMath> row_[MI][2];  // l over this thread's columns
  const float factor_;                           // > 0, what brings scores to units of log2
  // Of each block of 16 rows, whatever others a warp has: kBound, or -inf while scores are huge, and every tile takes the long way.
  float bound_[MI];

 public:
  DEVICE explicit TileSoftmax(float factor) : factor_(factor) {
    UNROLL for (int mi = 0; mi < MI; ++mi) bound_[mi] = kBound;
  }

  // After one score, in units of log2, whose value is 0.
  DEVICE void sink(float score) {
    UNROLL for (int mi = 0; mi < MI; ++mi)
      UNROLL for (int h = 0; h < 2; ++h) {
        row_[mi][h].raise(score + kExponent);
        if (lane_index() % 4 == 0) row_[mi][h].add(weight(score - row_[mi][h].m));
      }
    if (fabsf(score) > kHuge) UNROLL for (int mi = 0; mi < MI; ++mi) bound_[mi] = -INFINITY;
  }

  // Scores become weights; the output so far moves along.
  template <int NJ, int DJ>
  DEVICE void step(Accumulators<MI, NJ>& s, Accumulators<MI, DJ>& o) {
    float top[MI][2];
    bool outgrown = false;
    UNROLL for (int mi = 0; mi < MI; ++mi)
      UNROLL for (int h = 0; h < 2; ++h) {
        float x = fmaxf(s[mi][0][2 * h], s[mi][0][2 * h + 1]);
        UNROLL for (int j = 1; j < NJ; ++j) x = fmaxf(fmaxf(x, s[mi][j][2 * h]), s[mi][j][2 * h + 1]);
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
        top[mi][h] = x;
        outgrown |= fused(x, factor_, -row_[mi][h].m) > bound_[mi];
      }
    if (__any_sync(kAllLanes, outgrown)) {
      raise(top, o);
      for_huge([&](int mi) {
        for_elements<1, NJ>([&](int, int h, int j, int e) { s[mi][j][2 * h + e] *= factor_; });
      });
    }
    float factor[MI];  // that is left
    UNROLL for (int mi = 0; mi < MI; ++mi) factor[mi] = bound_[mi] == kBound ? factor_ : 1.f;
    for_elements<MI, NJ>([&](int mi, int h, int j, int e) {
      float& p = s[mi][j][2 * h + e];
      p = weight(fused(p, factor[mi], -row_[mi][h].m));
      row_[mi][h].add(p);
    });
    if constexpr (kExponent > 0.f) {
      for_huge([&](int mi) {
        for_elements<1, NJ>([&](int, int h, int j, int e) { s[mi][j][2 * h + e] *= output_factor(mi, h); });
      });
    }
  }

  // The output becomes what it is, times `keep`, and is 0 where there was nothing to attend to.
  template <int DJ>
  DEVICE void finish(Accumulators<MI, DJ>& o, float keep, RowStatistics<float> (&statistics)[MI][2]) {
    UNROLL for (int mi = 0; mi < MI; ++mi)
      UNROLL for (int h = 0; h < 2; ++h) {
        float l = row_[mi][h].l;
        l += __shfl_xor_sync(kAllLanes, l, 1);
        l += __shfl_xor_sync(kAllLanes, l, 2);
        // The exponent's headroom is taken off first: log2(l) is most precise near 0.  That is exact up to huge maxima, whose
        // last place is more than it.
        const float m = row_[mi][h].m, headroom = fabsf(m) > kHuge ? 0.f : kExponent;
        statistics[mi][h] = RowStatistics<float>::of(m - headroom, l, log2f(l / kFactor * exp2f(headroom)));
        scale_row(o, mi, h, l == 0.f ? 0.f : __fdividef(keep, l * output_factor(mi, h)));
      }
  }

 private:
  DEVICE static float weight(float x) { return ThreadMath::weight(x) * kFactor; }
  // What weights are multiplied by for the output's sake, beyond what l knows.
  DEVICE float output_factor(int mi, int h) const {
    return kExponent > 0.f && fabsf(row_[mi][h].m) > kAbsorbs ? 0x1p-28f : 1.f;
  }
  template <int DJ>
  DEVICE static void scale_row(Accumulators<MI, DJ>& o, int mi, int h, float factor) {
    UNROLL for (int j = 0; j < DJ; ++j) o[mi][j][2 * h] *= factor, o[mi][j][2 * h + 1] *= factor;
  }
  // Calls f(mi) for the blocks of rows whose scores are huge.
  template <class F>
  DEVICE void for_huge(const F& f) const {
    UNROLL for (int mi = 0; mi < MI; ++mi)
      if (bound_[mi] != kBound) f(mi);
  }
  // Rows decide for themselves, so that what they are does not depend on their neighbours.
  template <int DJ>
  DEVICE void raise(const float (&top)[MI][2], Accumulators<MI, DJ>& o) {
    UNROLL for (int mi = 0; mi < MI; ++mi) {
      bool huge = false;
      UNROLL for (int h = 0; h < 2; ++h) {
        const float score = top[mi][h] * factor_;
        const bool grows = fused(top[mi][h], factor_, -row_[mi][h].m) > kBound || fabsf(score) > kHuge;
        scale_row(o, mi, h, row_[mi][h].raise(grows ? score + kExponent : -INFINITY));
        huge |= row_[mi][h].m != std::numeric_limits<float>::lowest() && fabsf(row_[mi][h].m) > kHuge;
      }
      bound_[mi] = __any_sync(kAllLanes, huge) ? -INFINITY : kBound;
    }
  }
};

}  // namespace attn_ext::cuda
