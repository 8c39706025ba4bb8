// The products of decoding: of 16 rows and a tile of 16 keys or values of which each warp has its own.
#pragma once
#include "cuda/fma.cuh"
#include "cuda/mma.cuh"

namespace attn_ext::cuda {

template <class F>
class MmaDecode {
  using T = typename F::T;
  BlockAddress<F::kColumns> at_;
  RowsOperand<F::kColumns, 1, false> query_;

 public:
  DEVICE MmaDecode(unsigned char* shared, const DeviceDecodeParams&) : at_(shared_address(shared)), query_(at_, F::kQueryTile) {}

  // Of tiles at offsets in shared memory.
  DEVICE void scores(Accumulators<1, F::NJ>& s, uint32_t keys) const { product_abt<T, F::kColumns / 16>(s, query_, at_, keys); }
  DEVICE void output(Accumulators<1, F::DJ>& o, const Accumulators<1, F::NJ>& p, uint32_t values) const {
    product_pb<T, F::kColumns>(o, p, at_, values);
  }
  // The output's column that acc[0][j][2 h + e] is.
  DEVICE static int column(int j, int e) { return 8 * j + lane_index() % 4 * 2 + e; }
};

// In fp32.  Columns that there are not, and the second half of the rows where there are no more than 8, cost no time.
template <class F>
class FmaDecode {
  using Operand = typename F::Operand;
  const unsigned char* shared_;
  int row_, rows_, key_chunks_, value_columns_;

  DEVICE static float4 load(const unsigned char* tile, int row, int chunk) {
    return *reinterpret_cast<const float4*>(tile + Operand::at(row, chunk));
  }
  DEVICE static float dot(float4 a, float4 b, float sum) {
    return fused(a.w, b.w, fused(a.z, b.z, fused(a.y, b.y, fused(a.x, b.x, sum))));
  }
  template <int H>
  DEVICE void scores_of(Accumulators<1, F::NJ>& s, const unsigned char* keys) const {
#pragma unroll 1
    for (int chunk = 0; chunk < key_chunks_; ++chunk) {
      float4 q[H];
      UNROLL for (int h = 0; h < H; ++h) q[h] = load(shared_ + F::kQueryTile, row_ + 8 * h, chunk);
      UNROLL for (int j = 0; j < F::NJ; ++j)
        UNROLL for (int e = 0; e < 2; ++e) {
          const float4 k = load(keys, 8 * j + lane_index() % 4 * 2 + e, chunk);
          UNROLL for (int h = 0; h < H; ++h) s[0][j][2 * h + e] = dot(q[h], k, s[0][j][2 * h + e]);
        }
    }
  }
  template <int H>
  DEVICE void output_of(Accumulators<1, F::DJ>& o, const Accumulators<1, F::NJ>& p, const unsigned char* values) const {
    UNROLL for (int j = 0; j < F::NJ; ++j)
      UNROLL for (int e = 0; e < 2; ++e)
#pragma unroll 1
        for (int t = 0; t < 4; ++t) {
          float weight[H];
          UNROLL for (int h = 0; h < H; ++h) weight[h] = __shfl_sync(kAllLanes, p[0][j][2 * h + e], (lane_index() & ~3) | t);
          UNROLL for (int c = 0; c < F::DJ; c += 2) {
            if (8 * c >= value_columns_) break;
            const float4 v = load(values, 8 * j + 2 * t + e, c * 2 + lane_index() % 4);
            UNROLL for (int h = 0; h < H; ++h) {
              o[0][c][2 * h] = fused(weight[h], v.x, o[0][c][2 * h]), o[0][c][2 * h + 1] = fused(weight[h], v.y, o[0][c][2 * h + 1]);
              o[0][c + 1][2 * h] = fused(weight[h], v.z, o[0][c + 1][2 * h]);
              o[0][c + 1][2 * h + 1] = fused(weight[h], v.w, o[0][c + 1][2 * h + 1]);
            }
          }
        }
  }

 public:
  DEVICE FmaDecode(unsigned char* shared, const DeviceDecodeParams& p)
      : shared_(shared),
        row_(lane_index() / 4),
        rows_(static_cast<int>(p.shape.heads) / static_cast<int>(p.shape.kv_heads) * static_cast<int>(p.shape.query_len)),
        key_chunks_(static_cast<int>(p.shape.head_dim + 3) / 4),
        value_columns_(static_cast<int>(p.shape.value_dim)) {}

  DEVICE void scores(Accumulators<1, F::NJ>& s, uint32_t keys) const {
    if (rows_ > 8) scores_of<2>(s, shared_ + keys);
    else scores_of<1>(s, shared_ + keys);
  }
  DEVICE void output(Accumulators<1, F::DJ>& o, const Accumulators<1, F::NJ>& p, uint32_t values) const {
    if (rows_ > 8) output_of<2>(o, p, shared_ + values);
    else output_of<1>(o, p, shared_ + values);
  }
  // Four neighbouring columns of 16 for two blocks: what one load brings.
  DEVICE static int column(int j, int e) { return 16 * (j / 2) + lane_index() % 4 * 4 + 2 * (j % 2) + e; }
};

}  // namespace attn_ext::cuda
