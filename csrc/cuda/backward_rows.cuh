// What the backward pass needs of each row of scores (Dao et al. 2022, algorithm 4: D_i).
#pragma once
#include "core/online_softmax.h"
#include "cuda/backward.h"
#include "cuda/ptx.cuh"
#include "cuda/tile.cuh"

namespace attn_ext::cuda {

// Up to here the rounding of lse + residual to one float is a factor of less than 2^-14 in a weight, which 16-bit products
// do not see.
constexpr float kLargestRounded = 1 << 10;

template <class T>
DEVICE float half_of(uint32_t word, int i) {
  return to_float(T{static_cast<uint16_t>(word >> 16 * i)});
}
template <class T>
DEVICE float dot_chunk(uint4 a, uint4 b, float sum) {
  constexpr int kPerWord = 4 / sizeof(T);
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  UNROLL for (int word = 0; word < 4; ++word)
    UNROLL for (int i = 0; i < kPerWord; ++i) {
      if constexpr (kPerWord == 1) sum = fused(bit_cast<float>(x[word]), bit_cast<float>(y[word]), sum);
      else sum = fused(half_of<T>(x[word], i), half_of<T>(y[word], i), sum);
    }
  return sum;
}

// Eight threads a row, kRowBlock rows a block.
constexpr int kRowThreads = 256;
template <class T>
__global__ void __launch_bounds__(kRowThreads) backward_rows(const __grid_constant__ BackwardArguments a) {
  constexpr int kLanes = 8, kPerChunk = 16 / sizeof(T), kRows = kRowThreads / kLanes;
  const BackwardParams& p = a.params;
  const AttentionShape& shape = p.shape;
  const int row_blocks = static_cast<int>(a.rows.padded / kRowBlock), heads = static_cast<int>(shape.heads);
  const int block = blockIdx.x % row_blocks, head = blockIdx.x / row_blocks % heads, batch = blockIdx.x / row_blocks / heads;
  const int lane = threadIdx.x % kLanes, chunks = static_cast<int>(shape.value_dim) / kPerChunk;
  const int64_t head_row = (static_cast<int64_t>(batch) * heads + head);
  bool precise = false;
#pragma unroll 1
  for (int pass = 0; pass < kRowBlock / kRows; ++pass) {
    const int row = block * kRowBlock + pass * kRows + threadIdx.x / kLanes;
    const int64_t at = head_row * shape.query_len + row;
    const float lse = row < shape.query_len ? static_cast<const float*>(p.lse)[at] : -INFINITY;
    // Rows that see nothing are not to feel their incoming gradient, which may be anything.
    const bool sees = lse != -INFINITY;
    float delta = 0.f;
    bool out_is_zero = true;
    if (sees) {
      const auto* const out = reinterpret_cast<const uint4*>(head_of<T>(p.out, batch, head) + row * p.out.stride_row);
      const auto* const grad = reinterpret_cast<const uint4*>(head_of<T>(p.grad_out, batch, head) + row * p.grad_out.stride_row);
      for (int chunk = lane; chunk < chunks; chunk += kLanes) {
        const uint4 o = out[chunk];
        delta = dot_chunk<T>(o, grad[chunk], delta);
        constexpr uint32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffff : 0x7fff7fff;
        out_is_zero &= ((o.x | o.y | o.z | o.w) & kMagnitude) == 0;
      }
    }
    UNROLL for (int other = 1; other < kLanes; other *= 2) {
      delta += __shfl_xor_sync(kAllLanes, delta, other);
      out_is_zero &= __shfl_xor_sync(kAllLanes, static_cast<int>(out_is_zero), other) != 0;
    }
    if (lane != 0) continue;
    const float grad_lse = sees && p.grad_lse ? static_cast<const float*>(p.grad_lse)[at] : 0.f;
    const float lse_log2 = RowStatistics<float>::to_log2(lse);
    const float residual = sees ? static_cast<const float*>(p.lse_residual)[at] : 0.f;
    delta -= grad_lse;
    const float normalizer = sees ? lse_log2 + residual : INFINITY;
    precise |= sees && fabsf(normalizer) > kLargestRounded && fabsf(normalizer) < INFINITY;  // else all weights are NaN or 0
    float* const terms = a.rows.terms + head_row * a.rows.padded * RowTerms::kFloats;
    terms[RowTerms::normalizer(row)] = normalizer;
    terms[RowTerms::minus_delta(row)] = terms[RowTerms::minus_delta(row) + 2] = -delta;
    if (a.rows.sink && row < shape.query_len) {
      // A sink is a score whose value is 0: dS = P * (0 - D_i).  Of a row that sees no key, out is 0.
      const float weight = sees ? ex2_approx((bias_in_log2<float>(p.score.sinks[head]) - lse_log2) - residual) : 0.f;
      a.rows.sink[at] = weight == 0.f ? 0.f : -weight * (out_is_zero ? -grad_lse : delta);
    }
  }
  precise = __syncthreads_or(precise);
  if (threadIdx.x == 0) a.rows.precise[head_row * row_blocks + block] = precise;
}

}  // namespace attn_ext::cuda
