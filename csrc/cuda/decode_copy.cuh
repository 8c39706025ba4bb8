// Tiles of keys or values whose rows lie anywhere in a cache, and how a warp gets them.
#pragma once
#include "cuda/decode_plan.h"
#include "cuda/tile.cuh"

namespace attn_ext::cuda {

// Where the keys of a tile are, lane n % 16 knows of key n.
struct TilePlaces {
  int64_t page, row;    // of this lane's key
  uint32_t there;       // of all keys, bit n: the cache has key n, and a query of the block sees it
};

// Of one head of a cache.
template <class Tile>
class CacheCopy {
  using T = typename Tile::Element;
  static_assert(Tile::kSpan == 8 && Tile::kRows == kDecodeTile);
  static constexpr int kRowsPerPass = 4, kPasses = Tile::kRows / kRowsPerPass, kGroups = Tile::kChunks / Tile::kSpan;
  const T* head_;
  int64_t page_stride_, row_stride_;
  int columns_;
  bool in_chunks_;  // do rows start and end at multiples of 16 bytes?
  uint32_t to_;

  // Passes are 4 rows apart: every second one has the other half of the permutations.
  DEVICE static uint32_t place(uint32_t to, int pass, int group) {
    return (to ^ pass % 2 << 6) + pass * kRowsPerPass * Tile::kPitch + group * Tile::kSpan * 16;
  }
  DEVICE int chunk(int group) const { return group * Tile::kSpan + lane_index() % Tile::kSpan; }
  DEVICE int64_t offset(const TilePlaces& places) const { return places.page * page_stride_ + places.row * row_stride_; }

  DEVICE void copy_elements(unsigned char* tile, int64_t own, uint32_t there) const {
#pragma unroll 1
    for (int row = 0; row < Tile::kRows; ++row) {
      const T* const from = head_ + __shfl_sync(kAllLanes, own, row);
#pragma unroll 1
      for (int column = lane_index(); column < Tile::kColumns; column += 32) {
        const bool exists = column < columns_ && there >> row & 1;
        *reinterpret_cast<T*>(tile + Tile::element(row, column)) = exists ? from[column] : T{};
      }
    }
  }

 public:
  DEVICE CacheCopy(const CacheView& cache, int head, int64_t columns)
      : head_(static_cast<const T*>(cache.data) + head * cache.stride_head),
        page_stride_(cache.stride_batch),
        row_stride_(cache.stride_row),
        columns_(static_cast<int>(columns)),
        to_(pin(Tile::at(lane_index() / Tile::kSpan, lane_index() % Tile::kSpan))) {
    const auto odd = reinterpret_cast<uint64_t>(cache.data) % 16 |
                     static_cast<uint64_t>(cache.stride_batch | cache.stride_head | cache.stride_row | columns) % Tile::kPerChunk;
    in_chunks_ = odd == 0;
  }

  // Zeros in the columns that the cache does not have, which no copy in chunks touches.
  DEVICE void clear_columns(unsigned char* tile) const {
    if (!in_chunks_) return;
    UNROLL for (int group = 0; group < kGroups; ++group) {
      if (chunk(group) * Tile::kPerChunk < columns_) continue;
      UNROLL for (int pass = 0; pass < kPasses; ++pass) {
        *reinterpret_cast<uint4*>(tile + place(to_, pass, group)) = make_uint4(0, 0, 0, 0);
      }
    }
  }
  // With zeros for keys that are not there.  tile: its offset in shared memory.
  DEVICE void copy(unsigned char* shared, uint32_t shared0, uint32_t tile, const TilePlaces& places) const {
    const int64_t own = offset(places);
    if (!in_chunks_) return copy_elements(shared + tile, own, places.there);
    UNROLL for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass + lane_index() / Tile::kSpan;
      const T* const from = head_ + __shfl_sync(kAllLanes, own, row) + chunk(0) * Tile::kPerChunk;
      const bool exists = places.there >> row & 1;
      UNROLL for (int group = 0; group < kGroups; ++group) {
        if (chunk(group) * Tile::kPerChunk < columns_)
          cp_async16_or_zeros(shared0 + tile + place(to_, pass, group), from + group * Tile::kSpan * Tile::kPerChunk, exists);
      }
    }
  }
};

}  // namespace attn_ext::cuda
