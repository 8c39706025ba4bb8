// The online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; FlashAttention,
// Dao et al. 2022, section 3.1): the only place in the library where a running maximum is moved.
//
// Scores are in units of log2: s * log2(e).  Weights are 2^(s - m - kHeadroom): up to 2^kHeadroom of them, times values,
// sum to no more than the largest value, so that a sum cannot overflow where the output does not.  The factor cancels.
// Value is a scalar, or a vector whose lanes are independent rows; Math names it and supplies splat, max, exp2 and
// weight(x) = 2^(x - kHeadroom).  Both must be 0 at -inf.
//
// The maximum starts at the lowest finite number.  A masked score is -inf and so never moves it, gets the weight
// 0, and no step ever computes inf - inf; a row whose scores are all masked ends with l = 0.
#pragma once
#include <limits>
#include <type_traits>

#include "core/host_device.h"

namespace attn_ext {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kHeadroom = 20;
constexpr float kHeadroomFactor = 1 << kHeadroom;

template <class Scalar, class Math>
struct OnlineSoftmax {
  using Value = typename Math::Value;
  Value m;  // running maximum
  Value l;  // sum of the weights

  ATTN_HD OnlineSoftmax() : m(Math::splat(std::numeric_limits<Scalar>::lowest())), l(Math::splat(0)) {}
  // After one score, whose value is 0: an attention sink.
  ATTN_HD explicit OnlineSoftmax(Value sink) : OnlineSoftmax() {
    raise(sink);
    add(weight(sink));
  }

  // Moves the maximum up to cover `scores_max`; returns the factor for everything summed so far.
  ATTN_HD Value raise(Value scores_max) {
    const Value m_new = Math::max(scores_max, m);
    const Value alpha = Math::exp2(m - m_new);
    m = m_new;
    l = l * alpha;
    return alpha;
  }
  ATTN_HD Value weight(Value s) const { return Math::weight(s - m); }
  ATTN_HD void add(Value weights) { l = l + weights; }

  // Joins the state of the same rows over other keys.  Outputs combine as own * (factor for own) + other's * (theirs).
  ATTN_HD Value merge(const OnlineSoftmax& other, Value* factor_other) {
    const Value own = raise(other.m);
    *factor_other = Math::exp2(other.m - m);
    l = l + other.l * *factor_other;
    return own;
  }
};

// What a row leaves behind for the backward pass and for the caller.
//
// lse = log(sum of exp(scores)) alone is not enough: once |lse| is large, adding log(l) to m is lost in rounding
// (m = -2e38, a row masked by the lowest finite number: entirely) and the backward's 2^(s - lse) is wrong by the factor
// l.  The residual keeps the lost part: in units of log2 the row's normaliser is  to_log2(lse) + residual.
template <class Scalar>
struct RowStatistics {
  Scalar lse, residual;

  // A natural logarithm in units of log2, rounded as every user of it must round it.
  ATTN_HD static Scalar to_log2(Scalar x) { return x * static_cast<Scalar>(kLog2E); }
  // The largest mask value: to_log2 of it is finite.
  ATTN_HD static constexpr Scalar largest() {
    return std::numeric_limits<Scalar>::max() / Scalar(1.4427);
  }

  // Of the final state; log2_l is log2(l * 2^kHeadroom), taken of the product: it is small where log2(l) is not, and
  // its rounding is the error of every weight of the backward pass.
  ATTN_HD static RowStatistics of(Scalar m, Scalar l, Scalar log2_l) {
    if (l == 0) return {-std::numeric_limits<Scalar>::infinity(), 0};
    Scalar lse = (m + log2_l) * static_cast<Scalar>(kLn2);
    // Where even m - to_log2(lse) would swallow log2(l), it has to be 0.  m is then a mask value, to_log2(x) of some x
    // next to lse.
    constexpr Scalar step = std::numeric_limits<Scalar>::epsilon();
    if (m * step > 1 || m * step < -1) {
      const Scalar near = lse;
      for (int k = -4; k <= 4; k++) {  // every neighbour: half a step is at most one unit in the last place
        const Scalar x = near + near * (k * step / 2);
        if (to_log2(x) == m) lse = x;
      }
    }
    return {lse, (m - to_log2(lse)) + log2_l};
  }
};

// A value that is added to scores, in units of log2.  Finite values stay finite: a row masked by the lowest finite number is
// still a row (all its keys weigh the same), only -inf removes a key.
template <class Scalar, class T>
ATTN_HD Scalar bias_in_log2(T value) {
  using Wide = std::common_type_t<Scalar, T>;
  constexpr Wide limit = RowStatistics<Scalar>::largest(), infinity = std::numeric_limits<T>::infinity();
  Wide wide = value;
  if (wide != infinity && wide != -infinity) wide = wide > limit ? limit : wide < -limit ? -limit : wide;
  return RowStatistics<Scalar>::to_log2(static_cast<Scalar>(wide));
}

}  // namespace attn_ext
