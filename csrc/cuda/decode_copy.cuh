// Tiles of keys or values whose rows lie anywhere in a cache, and how a warp gets them.
#pragma once
#include "cuda/decode_plan.h"
#include "cuda/tile.cuh"

namespace attn_ext::cuda {

// Where the keys of a tile are, lane n % 16 knows of key n.
struct TilePlaces {
  int page, row;   // of this lane's key
  uint32_t there;  // of all keys, bit n: the cache has key n, and a query of the block sees it
};

// Of one head of a cache.
template <class Tile>
class CacheCopy {
  using T = typename Tile::Element;
  static_assert(Tile::kSpan == 8 && Tile::kRows == kDecodeTile);
  static constexpr int kRowsPerPass = 4, kPasses = Tile::kRows / kRowsPerPass, kGroups = Tile::kChunks / Tile::kSpan;
  const CacheView& cache_;
  int head_, columns_;
  bool in_chunks_;  // do rows start and end at multiples of 16 bytes?
  uint32_t to_;

  // Passes are 4 rows apart: every second one has the other half of the permutations.
  DEVICE static uint32_t place(uint32_t to, int pass, int group) {
    return (to ^ pass % 2 << 6) + pass * kRowsPerPass * Tile::kPitch + group * Tile::kSpan * 16;
  }
  DEVICE int chunk(int group) const { return group * Tile::kSpan + lane_index() % Tile::kSpan; }
  DEVICE const T* key_of(const TilePlaces& places) const {
    return static_cast<const T*>(cache_.data) + places.page * cache_.stride_batch + head_ * cache_.stride_head +
           places.row * cache_.stride_row;
  }

  DEVICE static const T* of_lane(const T* own, int lane) {
    return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(own), lane));
  }

  DEVICE void copy_elements(unsigned char* tile, const T* own, uint32_t there) const {
#pragma unroll 1
    for (int row = 0; row < Tile::kRows; ++row) {
      const T* const from = of_lane(own, row);
#pragma unroll 1
      for (int column = lane_index(); column < Tile::kColumns; column += 32) {
        const bool exists = column < columns_ && there >> row & 1;
        *reinterpret_cast<T*>(tile + Tile::element(row, column)) = exists ? from[column] : T{};
      }
    }
  }

 public:
  // `place` is that of each lane in a tile, the same for all caches.
  DEVICE static uint32_t own_place() { return pin(Tile::at(lane_index() / Tile::kSpan, lane_index() % Tile::kSpan)); }
  DEVICE CacheCopy(const CacheView& cache, int head, int64_t columns, uint32_t place)
      : cache_(cache),
        head_(head),
        columns_(static_cast<int>(columns)),
        to_(place) {
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
    const T* const own = key_of(places);
    if (!in_chunks_) return copy_elements(shared + tile, own, places.there);
#pragma unroll 2  // copies do not wait for each other, whatever the loop
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass + lane_index() / Tile::kSpan;
      const T* const from = of_lane(own, row) + chunk(0) * Tile::kPerChunk;
      const bool exists = places.there >> row & 1;
      UNROLL for (int group = 0; group < kGroups; ++group) {
        if (chunk(group) * Tile::kPerChunk < columns_)
          cp_async16_or_zeros(shared0 + tile + place(to_, pass, group), from + group * Tile::kSpan * Tile::kPerChunk, exists);
      }
    }
  }
};

}  // namespace attn_ext::cuda
