// Products of fp32 tiles in fp32: tensor cores would round the operands to 10 bits.
//
// Rows and columns of accumulators are those of the tensor cores, so that everything between the products is shared with
// them.  A thread multiplies its two rows with all its columns out of vectors of four.  What limits it is shared memory: of
// the lanes that load a vector of keys or values at once, no two neighbours want the same.
#pragma once
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

template <class F>
class FmaProducts {
  static_assert(F::MI == 1);
  const unsigned char* shared_;
  int row_;  // the thread's first row

  template <class Tile>
  DEVICE static float4 load(const unsigned char* tile, int row, int chunk) {
    return *reinterpret_cast<const float4*>(tile + Tile::at(row, chunk));
  }
  DEVICE static float dot(float4 a, float4 b, float sum) {
    return fused(a.w, b.w, fused(a.z, b.z, fused(a.y, b.y, fused(a.x, b.x, sum))));
  }

 public:
  DEVICE FmaProducts(unsigned char* shared, int row0) : shared_(shared), row_(row0 + lane_index() / 4) {}

  DEVICE void fetch_query() {}
  DEVICE void scores(Accumulators<1, F::NJ>& s) const {
    const unsigned char* const queries = shared_ + F::kQueryTile;
    const unsigned char* const keys = shared_ + F::kKeyTile;
#pragma unroll 1
    for (int chunk = 0; chunk < F::Key::kChunks; ++chunk) {
      const float4 q[2] = {load<typename F::Query>(queries, row_, chunk), load<typename F::Query>(queries, row_ + 8, chunk)};
      UNROLL for (int j = 0; j < F::NJ; ++j)
        UNROLL for (int e = 0; e < 2; ++e) {
          const float4 k = load<typename F::Key>(keys, 8 * j + lane_index() % 4 * 2 + e, chunk);
          UNROLL for (int h = 0; h < 2; ++h) s[0][j][2 * h + e] = dot(q[h], k, s[0][j][2 * h + e]);
        }
    }
  }
  DEVICE void output(Accumulators<1, F::DJ>& o, const Accumulators<1, F::NJ>& p) const {
    const unsigned char* const values = shared_ + F::kValueTile;
    UNROLL for (int j = 0; j < F::NJ; ++j)
      UNROLL for (int e = 0; e < 2; ++e)
#pragma unroll 1
        for (int t = 0; t < 4; ++t) {
          const int owner = (lane_index() & ~3) | t;
          const float weight[2] = {__shfl_sync(kAllLanes, p[0][j][e], owner), __shfl_sync(kAllLanes, p[0][j][2 + e], owner)};
          UNROLL for (int c = 0; c < F::DJ; c += 2) {
            const float4 v = load<typename F::Value>(values, 8 * j + 2 * t + e, c * 2 + lane_index() % 4);
            UNROLL for (int h = 0; h < 2; ++h) {
              o[0][c][2 * h] = fused(weight[h], v.x, o[0][c][2 * h]), o[0][c][2 * h + 1] = fused(weight[h], v.y, o[0][c][2 * h + 1]);
              o[0][c + 1][2 * h] = fused(weight[h], v.z, o[0][c + 1][2 * h]);
              o[0][c + 1][2 * h + 1] = fused(weight[h], v.w, o[0][c + 1][2 * h + 1]);
            }
          }
        }
  }

  // Four neighbouring columns of 16 for two blocks, unlike on the tensor cores: what one load brings.
  DEVICE static int column(int j, int e) { return 16 * (j / 2) + lane_index() % 4 * 4 + 2 * (j % 2) + e; }
  // Neighbouring rows write to different halves of 128 bytes at a time, and so to all banks.
  template <class Staging, int DJ>
  DEVICE static void stage(unsigned char* tile, int row, const float (&acc)[DJ][4], int h) {
    static_assert(DJ % 4 == 0);
    const bool odd = row % 2;
    UNROLL for (int j = 0; j < DJ; j += 4)
      UNROLL for (int turn = 0; turn < 2; ++turn) {
        const bool second = odd != (turn == 1);
        float4 v;
        v.x = second ? acc[j + 2][2 * h] : acc[j][2 * h], v.y = second ? acc[j + 2][2 * h + 1] : acc[j][2 * h + 1];
        v.z = second ? acc[j + 3][2 * h] : acc[j + 1][2 * h], v.w = second ? acc[j + 3][2 * h + 1] : acc[j + 1][2 * h + 1];
        const int chunk = (j + 2 * second) * 2 + lane_index() % 4;
        *reinterpret_cast<float4*>(tile + Staging::at(row, chunk)) = v;
      }
  }
};

}  // namespace attn_ext::cuda
