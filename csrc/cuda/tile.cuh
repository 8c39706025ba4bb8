// Tiles in shared memory, and how they get there.
//
// A tile is a matrix by rows whose 16-byte chunks are permuted within each row (swizzled) such that the eight rows of an 8x8
// matrix, the unit of ldmatrix, lie in all 32 banks.  Tiles start at multiples of 1024 bytes.
#pragma once
#include "core/params.h"
#include "cuda/ptx.cuh"

namespace attn_ext::cuda {

template <class T, int Rows, int Columns>
struct Tile {
  static_assert(Columns % 32 == 0 && Rows % 16 == 0);
  using Element = T;
  static constexpr int kRows = Rows, kColumns = Columns, kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = Columns / kPerChunk, kPitch = kChunks * 16, kBytes = Rows * kPitch;
  // Chunks that trade places.  A row of 64 or of 192 bytes starts at one of two places in the 128 bytes of all banks: pairs
  // of rows then share a permutation of four chunks.
  static constexpr int kSpan = kChunks % 8 == 0 ? 8 : 4;

  DEVICE static uint32_t at(int row, int chunk) {
    const int swizzle = kSpan == 8 ? row & 7 : row >> 1 & 3;
    return static_cast<uint32_t>(row * kPitch + ((chunk ^ swizzle) << 4));
  }
  DEVICE static uint32_t element(int row, int column) {
    return at(row, column / kPerChunk) + column % kPerChunk * static_cast<int>(sizeof(T));
  }
};

// The rows of a matrix as one thread of a TileCopy sees them.
struct Rows {
  const char* data;  // its chunk of its first row
  int row_bytes;
  int count;  // rows that exist
};

// Copies tiles, `Threads` threads together.  A thread copies the same column of chunks in every pass, and passes are apart by
// a multiple of 8 rows: its place in the permutation never changes.
template <class Tile, int Threads>
class TileCopy {
  static constexpr int kRowsPerPass = Threads / Tile::kSpan, kPasses = Tile::kRows / kRowsPerPass;
  static constexpr int kGroups = Tile::kChunks / Tile::kSpan, kBytesPerElement = sizeof(typename Tile::Element);
  static_assert(kRowsPerPass % 8 == 0 && Tile::kRows % kRowsPerPass == 0);
  int row_, chunk_, groups_;  // first row and chunk, and how many groups of chunks reach into the matrix
  uint32_t to_;

  DEVICE TileCopy(uint32_t to, int64_t columns)
      : row_(threadIdx.x / Tile::kSpan),
        chunk_(threadIdx.x % Tile::kSpan),
        groups_((static_cast<int>(columns) / Tile::kPerChunk - chunk_ + Tile::kSpan - 1) / Tile::kSpan),
        to_(to) {}
  DEVICE static uint32_t chunk_offset(uint32_t thread, const ConstTensorView& tensor) {
    return thread / Tile::kSpan * row_bytes(tensor) + thread % Tile::kSpan * 16;
  }
  DEVICE static uint32_t place(int pass, int group) { return pass * kRowsPerPass * Tile::kPitch + group * Tile::kSpan * 16; }

 public:
  DEVICE static uint32_t row_bytes(const ConstTensorView& tensor) { return static_cast<uint32_t>(tensor.stride_row) * kBytesPerElement; }
  // Of a matrix of so many columns, a whole number of chunks.
  DEVICE explicit TileCopy(int64_t columns) : TileCopy(pin(Tile::at(threadIdx.x / Tile::kSpan, threadIdx.x % Tile::kSpan)), columns) {}
  // Of another matrix: the two share what they have in common.
  DEVICE TileCopy(const TileCopy& other, int64_t columns) : TileCopy(other.to_, columns) {}
  template <class Other>
  DEVICE TileCopy(const Other&, int64_t columns) : TileCopy(columns) {}

  DEVICE Rows rows(const void* matrix, int64_t row_stride, int64_t count) const {
    const int row_bytes = static_cast<int>(row_stride) * kBytesPerElement;
    const char* first = static_cast<const char*>(matrix) + row_ * row_stride * kBytesPerElement + chunk_ * 16;
    return {pin(first), row_bytes, static_cast<int>(count)};
  }
  // Says how many bytes after the first row's start this thread's chunk of it is: kept in a register, or, if tiles are large
  // and leave few, made anew each time.
  DEVICE static auto own_chunk(const ConstTensorView& tensor) {
    if constexpr (kGroups == 1) return [bytes = pin(chunk_offset(threadIdx.x, tensor))] { return bytes; };
    else return [&tensor] { return chunk_offset(thread_anew(), tensor); };
  }
  // Zeros in the columns that the matrix does not have: no copy touches them.
  DEVICE void clear_columns(unsigned char* tile) const {
    UNROLL for (int group = 0; group < kGroups; ++group) {
      if (group < groups_) continue;
      UNROLL for (int pass = 0; pass < kPasses; ++pass) {
        *reinterpret_cast<uint4*>(tile + to_ + place(pass, group)) = make_uint4(0, 0, 0, 0);
      }
    }
  }
  // Tile n, all of whose rows exist; nothing if it is not wanted.
  DEVICE void whole(uint32_t tile, const Rows& from, int n, bool wanted = true) const {
    const int groups = wanted ? groups_ : 0;
    const char* p = from.data + static_cast<int64_t>(n) * (Tile::kRows * from.row_bytes);
    UNROLL for (int pass = 0; pass < kPasses; ++pass, p += kRowsPerPass * from.row_bytes) {
      UNROLL for (int group = 0; group < kGroups; ++group) {
        if (group < groups) cp_async16(tile + to_ + place(pass, group), p + group * Tile::kSpan * 16);
      }
    }
  }
  // Rows from the first on, all of which exist, with all their columns.
  DEVICE void unclipped(uint32_t tile, const Rows& from) const {
    const char* p = from.data;
    UNROLL for (int pass = 0; pass < kPasses; ++pass, p += kRowsPerPass * static_cast<uint32_t>(from.row_bytes)) {
      UNROLL for (int group = 0; group < kGroups; ++group) cp_async16(tile + to_ + place(pass, group), p + group * Tile::kSpan * 16);
    }
  }
  // Tile n, with zeros for rows that do not exist.
  DEVICE void clipped(uint32_t tile, const Rows& from, int n) const {
    const char* p = from.data + static_cast<int64_t>(n) * (Tile::kRows * from.row_bytes);
#pragma unroll(kPasses* kGroups > 16 ? 1 : kPasses)
    for (int pass = 0; pass < kPasses; ++pass, p += kRowsPerPass * from.row_bytes) {
      const bool exists = n * Tile::kRows + row_ + pass * kRowsPerPass < from.count;
      UNROLL for (int group = 0; group < kGroups; ++group) {
        if (group >= groups_) continue;
        cp_async16_or_zeros(tile + to_ + place(pass, group), exists ? p + group * Tile::kSpan * 16 : from.data, exists);
      }
    }
  }
  // Calls f(address of 16 bytes) for what this thread copies of a tile.
  template <class F>
  DEVICE void for_own_chunks(unsigned char* tile, const F& f) const {
    UNROLL for (int pass = 0; pass < kPasses; ++pass) {
      UNROLL for (int group = 0; group < kGroups; ++group) {
        if (group < groups_) f(reinterpret_cast<uint4*>(tile + to_ + place(pass, group)));
      }
    }
  }
};

// Row 0 of one head of a (batch, head, row, column) tensor.
template <class T, class View>
DEVICE auto head_of(const View& view, int batch, int head) {
  using Pointer = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(view.data)>>, const T*, T*>;
  return static_cast<Pointer>(view.data) + batch * view.stride_batch + head * view.stride_head;
}

// Which tile of which head a block owns: neighbouring blocks have neighbouring tiles.
struct alignas(16) BlockTile {  // one load
  int tile, head, batch;

  DEVICE static BlockTile of_block(int64_t length, int rows, int64_t heads) {
    const int block = blockIdx.x, tiles = (static_cast<int>(length) + rows - 1) / rows, head = block / tiles;
    return {block % tiles, head % static_cast<int>(heads), head / static_cast<int>(heads)};
  }
};

}  // namespace attn_ext::cuda
