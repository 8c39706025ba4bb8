// Products of tiles of 16-bit elements on the tensor cores, a warp at a time.
//
// Two neighbouring blocks of columns of an accumulator, rounded to 16 bits, are the A operand of the next product: a chain of
// products needs no shuffles.
#pragma once
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

// Where a lane points ldmatrix for a 16x16 block of a tile, so that the four registers are an operand as it is.
//   by_rows:    (rows 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15, 1): an A operand; transposed, B operands of a product over
//               rows, whose pairs of registers are the 8-column halves of the block
//   by_columns: (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1): B operands of a product over columns, whose pairs of
//               registers are the 8-row halves.  mma wants pairs of neighbouring registers, hence two patterns.
// A block's address is an XOR that several blocks share and a constant: nothing is computed in the loop.
template <int Columns>
struct BlockAddress {
  using Row = Tile<uint16_t, 16, Columns>;
  uint32_t rows, columns;

  DEVICE BlockAddress(const BlockAddress& other, uint32_t) : rows(other.rows), columns(other.columns) {}
  template <class Other>
  DEVICE BlockAddress(const Other&, uint32_t shared) : BlockAddress(shared) {}
  DEVICE explicit BlockAddress(uint32_t shared) {
    const int lane = lane_index();
    rows = pin(shared + Row::at(lane & 15, lane >> 4));
    columns = pin(shared + Row::at((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1));
  }
  DEVICE uint32_t by_rows(uint32_t tile, int i, int k) const { return block(rows, i, k) + tile; }
  DEVICE uint32_t by_columns(uint32_t tile, int i, int k) const { return block(columns, i, k) + tile; }

 private:
  DEVICE static uint32_t block(uint32_t base, int i, int k) {
    constexpr int kBlocks = Row::kSpan / 2;  // that a permutation mixes
    return (base ^ (k % kBlocks << 5)) + k / kBlocks * (kBlocks * 32) + i * Row::kBytes;
  }
};

// 16 * MI rows of a tile as the A operand of a product over its columns: kept in registers, or read at every use.
template <int Columns, int MI, bool InRegisters>
struct RowsOperand {
  BlockAddress<Columns> at;
  uint32_t tile;
  uint32_t kept[InRegisters ? Columns / 16 : 1][MI][4];

  DEVICE RowsOperand(BlockAddress<Columns> at, uint32_t tile) : at(at), tile(tile) {}
  DEVICE void fetch() {  // once the tile is there
    if constexpr (InRegisters) {
      UNROLL for (int k = 0; k < Columns / 16; ++k)
        UNROLL for (int mi = 0; mi < MI; ++mi) ldmatrix_x4(kept[k][mi], at.by_rows(tile, mi, k));
    }
  }
  DEVICE void get(uint32_t (&a)[MI][4], int k) const {
    UNROLL for (int mi = 0; mi < MI; ++mi) {
      if constexpr (InRegisters) {
        UNROLL for (int r = 0; r < 4; ++r) a[mi][r] = kept[k][mi][r];
      } else {
        ldmatrix_x4(a[mi], at.by_rows(tile, mi, k));
      }
    }
  }
};

// How many steps of A * B^T are unrolled.  The loop's end is where ptxas has to stop fetching ahead, at the cost of registers: where
// a variant would spill it comes early.
template <int Columns, int MI, int NJ, bool InRegisters>
constexpr int steps_at_once() {
  constexpr int kAll = Columns / 16;
  if (InRegisters) return kAll;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (MI > 1) return Columns == 64 && NJ > 4 ? 2 : kAll;
  if (Columns <= 64) return kAll;
#else
  if (Columns <= 64 || Columns == 128) return kAll;
#endif
  return Columns == 96 ? 2 : 4;
}

// acc += A * B^T, both by rows over the columns they share: S = Q K^T.
template <class T, int AtOnce, int Columns, int MI, int NJ, bool InRegisters>
DEVICE void product_abt(Accumulators<MI, NJ>& acc, const RowsOperand<Columns, MI, InRegisters>& a_rows,
                        BlockAddress<Columns> at, uint32_t b_tile) {
#pragma unroll AtOnce
  for (int k = 0; k < Columns / 16; ++k) {
    uint32_t a[MI][4];
    a_rows.get(a, k);
    UNROLL for (int j = 0; j < NJ; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, at.by_columns(b_tile, j / 2, k));
      UNROLL for (int mi = 0; mi < MI; ++mi) {
        mma_m16n8k16<T>(acc[mi][j], a[mi], b[0], b[1]);
        mma_m16n8k16<T>(acc[mi][j + 1], a[mi], b[2], b[3]);
      }
    }
  }
}

// acc += P * B, P the accumulators of the product before, B by rows: O += P V.
template <class T, int Columns, int MI, int NJ>
DEVICE void product_pb(Accumulators<MI, Columns / 8>& acc, const Accumulators<MI, NJ>& p, BlockAddress<Columns> at, uint32_t b_tile) {
  UNROLL for (int k = 0; k < NJ / 2; ++k) {
    uint32_t a[MI][4];
    UNROLL for (int mi = 0; mi < MI; ++mi) {
      const auto &left = p[mi][2 * k], &right = p[mi][2 * k + 1];
      a[mi][0] = pack<T>(left[0], left[1]), a[mi][1] = pack<T>(left[2], left[3]);
      a[mi][2] = pack<T>(right[0], right[1]), a[mi][3] = pack<T>(right[2], right[3]);
    }
    UNROLL for (int j = 0; j < Columns / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, at.by_rows(b_tile, k, j / 2));
      UNROLL for (int mi = 0; mi < MI; ++mi) {
        mma_m16n8k16<T>(acc[mi][j], a[mi], b[0], b[1]);
        mma_m16n8k16<T>(acc[mi][j + 1], a[mi], b[2], b[3]);
      }
    }
  }
}

// What kernels ask of products; FmaMath (fma.cuh) answers to the same names.
template <class T>
struct MmaMath {
  // Tiles of so many columns in shared memory, of which a warp has rows of its own, from row0 on.
  template <int Columns>
  struct Tiles : BlockAddress<Columns> {
    uint32_t own_rows;  // where they start in a tile

    DEVICE Tiles(unsigned char* shared, int row0)
        : BlockAddress<Columns>(shared_address(shared)), own_rows(pin(row0 * Columns * static_cast<int>(sizeof(T)))) {}
    // Of the same columns as others, or of other columns.
    DEVICE Tiles(const Tiles& other, unsigned char*, int) : Tiles(other) {}
    template <class Other>
    DEVICE Tiles(const Other&, unsigned char* shared, int row0) : Tiles(shared, row0) {}
    // So many bytes further, a multiple of 1024: the permutation of a tile stays the same, and one sum serves all blocks.
    DEVICE Tiles moved(uint32_t by) const {
      Tiles result = *this;
      result.rows += by, result.columns += by;
      return result;
    }
  };
  // A warp's rows of a tile as the left operand.
  template <int Columns, int MI, bool InRegisters = false>
  struct Rows : RowsOperand<Columns, MI, InRegisters> {
    DEVICE Rows(const Tiles<Columns>& tiles, uint32_t tile) : RowsOperand<Columns, MI, InRegisters>(tiles, tile + tiles.own_rows) {}
  };

  template <int Columns, int MI, int NJ, bool InRegisters>
  DEVICE static void product_abt(Accumulators<MI, NJ>& acc, const Rows<Columns, MI, InRegisters>& a, const Tiles<Columns>& tiles,
                                 uint32_t b_tile) {
    cuda::product_abt<T, steps_at_once<Columns, MI, NJ, InRegisters>()>(acc, a, tiles, b_tile);
  }
  template <int Columns, int MI, int NJ>
  DEVICE static void product_pb(Accumulators<MI, Columns / 8>& acc, const Accumulators<MI, NJ>& p, const Tiles<Columns>& tiles,
                                uint32_t b_tile) {
    cuda::product_pb<T, Columns>(acc, p, tiles, b_tile);
  }

  // The output's column that acc[mi][j][2 h + e] is.
  DEVICE static int column(int j, int e) { return 8 * j + lane_index() % 4 * 2 + e; }
  // Half h of a block of rows, as a row of a tile.
  template <class Staging, int DJ>
  DEVICE static void stage(unsigned char* tile, int row, const float (&acc)[DJ][4], int h) {
    UNROLL for (int j = 0; j < DJ; ++j)
      *reinterpret_cast<uint32_t*>(tile + Staging::at(row, j) + lane_index() % 4 * 4) = pack<T>(acc[j][2 * h], acc[j][2 * h + 1]);
  }
};

}  // namespace attn_ext::cuda
