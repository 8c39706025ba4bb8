// What a mask and dropout leave of a tile, in shared memory: for kernels whose rows are keys.  There a thread has few keys of
// many queries; here it answers for many keys of a query, as visible_keys.cuh does.
#pragma once
#include "cuda/scores.cuh"
#include "cuda/visible_keys.cuh"

namespace attn_ext::cuda {

// Of M queries and N keys: for each query four words, of the lanes of a quad.  The lower half of a word is what is visible, the
// upper half what dropout keeps.
template <int M, int N, int Threads>
class TileBits {
  static_assert(N <= 64);
  uint32_t* words_;

 public:
  static constexpr int kBytes = M * 4 * static_cast<int>(sizeof(uint32_t));

  DEVICE explicit TileBits(unsigned char* memory) : words_(reinterpret_cast<uint32_t*>(memory)) {}

  // All threads of the block together; a barrier has to follow.
  template <bool kVisible, bool kKept>
  DEVICE void write(const AttentionParams& p, int batch, int head, int query0, int key0) const {
    const VisibleKeys<N> visible(p, batch, head, key0);
    const int last = anew(static_cast<int>(p.shape.query_len)) - 1;
#pragma unroll 1
    for (int row = thread_anew() / 4; row < M; row += Threads / 4) {
      const int query = min(query0 + row, last);
      uint32_t word = 0xffff;
      if constexpr (kVisible) word = visible.of(query);
      if constexpr (kKept) {
        if (p.dropout.enabled()) word |= kept_keys<N>(p, batch, head, query, key0) << 16;
      }
      words_[row * 4 + lane_index() % 4] = word;
    }
  }

  // Bit k: key row0 + 8 k + lane / 4 of the tile, row0 a multiple of 16.
  DEVICE uint32_t visible(int query, int row0) const { return of_row(query, row0, 0); }
  DEVICE uint32_t kept(int query, int row0) const { return of_row(query, row0, 16); }

 private:
  DEVICE uint32_t of_row(int query, int row0, int half) const {
    const int key = lane_index() / 4;
    const uint32_t word = words_[query * 4 + key / 2] >> half >> (2 * (row0 / 8) + key % 2);
    return (word & 1) | (word >> 1 & 2);  // keys 8 apart are two bits apart
  }
};

}  // namespace attn_ext::cuda
