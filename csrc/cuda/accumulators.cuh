// Score and output tiles in registers, and their products with tiles in shared memory: what tensor cores and plain arithmetic
// have in common.
//
// A warp holds 16 * MI rows as acc[mi][j][4], block mi of 16 rows and block j of 8 columns, as mma.m16n8k16 does: a thread has
// rows g and g + 8 (g = lane / 4) and, of scores, columns 2t, 2t + 1 (t = lane % 4) of each block.
#pragma once
#include "cuda/tile.cuh"

namespace attn_ext::cuda {

template <int MI, int NJ>
using Accumulators = float[MI][NJ][4];

// Calls f(mi, h, j, e) for every element a thread holds: row 16 mi + 8 h + g, acc[mi][j][2 h + e].
template <int MI, int NJ, class F>
DEVICE void for_elements(const F& f) {
  UNROLL for (int mi = 0; mi < MI; ++mi)
    UNROLL for (int h = 0; h < 2; ++h)
      UNROLL for (int j = 0; j < NJ; ++j)
        UNROLL for (int e = 0; e < 2; ++e) f(mi, h, j, e);
}

// Which queries and keys a warp's score tile has, kQueries x kKeys of them in each thread: query q of a thread is
// query_offset(q) after its first_query, key k key_offset(k) after its first_key.
template <int MI_, int NJ_>
struct QueryRows {  // S: rows are queries
  static constexpr int MI = MI_, NJ = NJ_, kQueries = 2 * MI, kKeys = 2 * NJ;
  DEVICE static int first_query() { return lane_index() / 4; }
  DEVICE static int first_key() { return lane_index() % 4 * 2; }
  DEVICE static constexpr int query_offset(int q) { return 8 * q; }
  DEVICE static constexpr int key_offset(int k) { return k / 2 * 8 + k % 2; }
  template <class Scores>
  DEVICE static auto& at(Scores& s, int q, int k) { return s[q / 2][k / 2][q % 2 * 2 + k % 2]; }
};
template <int MI_, int NJ_>
struct KeyRows {  // the transpose of S: rows are keys
  static constexpr int MI = MI_, NJ = NJ_, kQueries = 2 * NJ, kKeys = 2 * MI;
  DEVICE static int first_query() { return lane_index() % 4 * 2; }
  DEVICE static int first_key() { return lane_index() / 4; }
  DEVICE static constexpr int query_offset(int q) { return q / 2 * 8 + q % 2; }
  DEVICE static constexpr int key_offset(int k) { return 8 * k; }
  template <class Scores>
  DEVICE static auto& at(Scores& s, int q, int k) { return s[k / 2][q / 2][k % 2 * 2 + q % 2]; }
};

// Calls f(q, k) for every query and key of a thread.
template <class Place, class F>
DEVICE void for_pairs(const F& f) {
  UNROLL for (int q = 0; q < Place::kQueries; ++q)
    UNROLL for (int k = 0; k < Place::kKeys; ++k) f(q, k);
}

template <int MI, int NJ>
DEVICE void clear(Accumulators<MI, NJ>& acc) {
  for_elements<MI, NJ>([&](int mi, int h, int j, int e) { acc[mi][j][2 * h + e] = 0.f; });
}

// Writes 16 * MI rows from row0 of a block on to a matrix by rows, through this warp's own rows of a tile, so that a row
// leaves in pieces of 16 bytes.  Products says which columns a thread holds.  out: row 0 of the block; rows, columns: how
// many exist, columns a whole number of chunks.
template <class Products, class Staging, int MI, int DJ, class T>
DEVICE void store_rows(const Accumulators<MI, DJ>& acc, unsigned char* staging, int row0, T* out, int64_t row_stride, int rows,
                       int columns) {
  const int lane = lane_index();
  __syncwarp();  // the other lanes have read what was there
  UNROLL for (int mi = 0; mi < MI; ++mi)
    UNROLL for (int h = 0; h < 2; ++h)
      Products::template stage<Staging>(staging, row0 + mi * 16 + h * 8 + lane / 4, acc[mi], h);
  __syncwarp();
  constexpr int kWidth = Staging::kSpan, kRowsAtOnce = 32 / kWidth;
  for (int row = row0 + lane / kWidth; row < row0 + 16 * MI && row < rows; row += kRowsAtOnce) {
    UNROLL for (int group = 0; group < Staging::kChunks; group += kWidth) {
      const int column = (group + lane % kWidth) * Staging::kPerChunk;
      if (column >= columns) continue;
      *reinterpret_cast<uint4*>(out + row * row_stride + column) =
          *reinterpret_cast<const uint4*>(staging + Staging::element(row, column));
    }
  }
}

}  // namespace attn_ext::cuda
