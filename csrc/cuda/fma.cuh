// Products of fp32 tiles in fp32: tensor cores would round the operands to 10 bits.
//
// Rows and columns of accumulators are those of the tensor cores, so that everything between the products is shared with
// them.  A thread multiplies its two rows with all its columns out of vectors of four.  What limits it is shared memory: of
// the lanes that load a vector of keys or values at once, no two neighbours want the same.
#pragma once
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

struct FmaMath {
  template <int Columns>
  struct Tiles {
    using Row = Tile<float, 16, Columns>;
    const unsigned char* shared;
    int own_row;  // the thread's first

    DEVICE Tiles(const unsigned char* shared, int row0) : shared(shared), own_row(row0 + lane_index() / 4) {}
    template <class Other>
    DEVICE Tiles(const Other&, const unsigned char* shared, int row0) : Tiles(shared, row0) {}
    DEVICE float4 load(uint32_t tile, int row, int chunk) const {
      return *reinterpret_cast<const float4*>(shared + tile + Row::at(row, chunk));
    }
  };
  template <int Columns, int MI, bool InRegisters = false>
  struct Rows {
    static_assert(MI == 1);
    const Tiles<Columns>& tiles;
    uint32_t tile;

    DEVICE Rows(const Tiles<Columns>& tiles, uint32_t tile) : tiles(tiles), tile(tile) {}
    DEVICE void fetch() {}
  };

  template <int Columns, int NJ, bool InRegisters>
  DEVICE static void product_abt(Accumulators<1, NJ>& acc, const Rows<Columns, 1, InRegisters>& rows, const Tiles<Columns>& tiles,
                                 uint32_t b_tile) {
#pragma unroll 1
    for (int chunk = 0; chunk < Columns / 4; ++chunk) {
      const float4 a[2] = {tiles.load(rows.tile, tiles.own_row, chunk), tiles.load(rows.tile, tiles.own_row + 8, chunk)};
      UNROLL for (int j = 0; j < NJ; ++j)
        UNROLL for (int e = 0; e < 2; ++e) {
          const float4 b = tiles.load(b_tile, 8 * j + lane_index() % 4 * 2 + e, chunk);
          UNROLL for (int h = 0; h < 2; ++h) acc[0][j][2 * h + e] = dot(a[h], b, acc[0][j][2 * h + e]);
        }
    }
  }
  template <int Columns, int NJ>
  DEVICE static void product_pb(Accumulators<1, Columns / 8>& acc, const Accumulators<1, NJ>& p, const Tiles<Columns>& tiles,
                                uint32_t b_tile) {
    UNROLL for (int j = 0; j < NJ; ++j)
      UNROLL for (int e = 0; e < 2; ++e)
#pragma unroll 1
        for (int t = 0; t < 4; ++t) {
          const int owner = (lane_index() & ~3) | t;
          const float weight[2] = {__shfl_sync(kAllLanes, p[0][j][e], owner), __shfl_sync(kAllLanes, p[0][j][2 + e], owner)};
          UNROLL for (int c = 0; c < Columns / 8; c += 2) {
            const float4 b = tiles.load(b_tile, 8 * j + 2 * t + e, c * 2 + lane_index() % 4);
            UNROLL for (int h = 0; h < 2; ++h) {
              float(&left)[4] = acc[0][c], (&right)[4] = acc[0][c + 1];
              left[2 * h] = fused(weight[h], b.x, left[2 * h]), left[2 * h + 1] = fused(weight[h], b.y, left[2 * h + 1]);
              right[2 * h] = fused(weight[h], b.z, right[2 * h]), right[2 * h + 1] = fused(weight[h], b.w, right[2 * h + 1]);
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

 private:
  DEVICE static float dot(float4 a, float4 b, float sum) {
    return fused(a.w, b.w, fused(a.z, b.z, fused(a.y, b.y, fused(a.x, b.x, sum))));
  }
};

}  // namespace attn_ext::cuda
