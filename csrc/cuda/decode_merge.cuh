// Joins what parts of a row's keys leave: the weighted mean of their values, and m and l of core/online_softmax.h.
#pragma once
#include "cuda/softmax.cuh"

namespace attn_ext::cuda {

struct RowState : OnlineSoftmax<float, ThreadMath> {
  using Base = OnlineSoftmax<float, ThreadMath>;
  using Base::Base;
  DEVICE RowState() {}
  DEVICE RowState(float m, float l) { this->m = m, this->l = l; }
  // The sum of 2^score is 2^(lse + residual) in units of log2.
  DEVICE explicit RowState(const RowStatistics<float>& row) {
    if (row.lse == -INFINITY) return;
    m = RowStatistics<float>::to_log2(row.lse), l = exp2f(row.residual);
  }

  DEVICE void join(const RowState& other) {
    float factor;
    merge(other, &factor);
  }
  // What a part contributes to this, all of it: the shares of a row are a sum of 1, and means cannot overflow.
  DEVICE float share(const RowState& part) const { return part.l == 0.f ? 0.f : weight(part.m) * part.l / l; }
};

DEVICE float4 add_weighted(float4 sum, float weight, float4 x) {
  return make_float4(fused(weight, x.x, sum.x), fused(weight, x.y, sum.y), fused(weight, x.z, sum.z), fused(weight, x.w, sum.w));
}

}  // namespace attn_ext::cuda
