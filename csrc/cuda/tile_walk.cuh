// The walk of a block over the tiles that meet its own (cuda/meetings.cuh).
#pragma once
#include "cuda/backward.h"
#include "cuda/tile.cuh"

namespace attn_ext::cuda {

// A tile that meets the tile at hand: of queries and their gradients, or of keys and values.
struct alignas(16) MetTile {
  int head;                    // of the query
  int bits;                    // see below; negative: there is no tile
  const float* terms;          // RowTerms, if it is one of queries
  const char *first, *second;  // its rows in the two tensors

  DEVICE static int bits_of(int tile, bool clipped, bool precise, bool partial) { return tile * 8 + clipped * 4 + precise * 2 + partial; }
  DEVICE bool exists() const { return bits >= 0; }
  DEVICE int tile() const { return bits >> 3; }
  // Needs no look at what is hidden, nor at how large a normalizer is.
  DEVICE bool is_whole() const { return (bits & (INT32_MIN | 1)) == 0; }
  DEVICE bool is_partial() const { return (bits & (INT32_MIN | 1)) == 1; }
  DEVICE bool is_precise() const { return bits & 2; }  // see RowTerms
  DEVICE bool is_clipped() const { return bits & 4; }  // some rows or columns do not exist
};

// Head by head, tiles of so many rows: of queries for a block that owns keys, of keys for one that owns queries.
//
// It is kept in shared memory, as a register in every thread for each of its numbers is more than there is: the first warp finds
// the tiles, two turns before they are multiplied, and where they lie, so that the others only add that to addresses.
template <class T, int kRows, bool kOfQueries, bool kAlwaysPrecise>
class TileWalk {
  static constexpr uint32_t kSlots = 4;
  MetTile found_[kSlots];
  BlockTile own_;
  const uint8_t* meetings_;            // of the own tile with those of the head
  int64_t row_;                        // the own tile's first among all queries, or the head's first
  const char *first_, *second_;        // the head in the tensors
  int head_, heads_left_;
  int tiles_, chunk_;                  // of a head (no gap is left: nvcc loads four words at once), and which 32 are being met
  uint32_t meet_, partial_, precise_;  // a bit for each that is left of the chunk
  int whole_rows_;                     // before these, tiles are not clipped

  DEVICE static const Meetings& meetings(const BackwardArguments& a) { return kOfQueries ? a.of_keys : a.of_queries; }
  DEVICE static const ConstTensorView& first(const BackwardArguments& a) { return kOfQueries ? a.params.query : a.params.key; }
  DEVICE static const ConstTensorView& second(const BackwardArguments& a) { return kOfQueries ? a.params.grad_out : a.params.value; }
  DEVICE static int64_t bytes(int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)); }
  DEVICE static const char* start_of(const ConstTensorView& view, int batch, int head) {
    return reinterpret_cast<const char*>(head_of<T>(view, batch, head));
  }
  DEVICE static int64_t start_of_tile(const ConstTensorView& view, int tile) {
    return static_cast<int64_t>(tile) * (kRows * static_cast<int>(bytes(view.stride_row)));
  }

 public:
  // Over `heads` query heads from first_head on.  own_row: of a tile of queries, in its head.  all_columns: of tiles exist.
  DEVICE void start(const BackwardArguments& a, const BlockTile& own, int own_row, int first_head, int heads, bool all_columns) {
    if (threadIdx.x == 0) {
      const AttentionShape& shape = a.params.shape;
      const Meetings& lists = meetings(a);
      const int batch = own.batch, of_batch = static_cast<int>(shape.heads);
      const int row_head = kOfQueries ? first_head : first_head / (of_batch / static_cast<int>(shape.kv_heads));
      own_ = own;
      const int64_t list = (lists.batch > 1 ? batch : 0) * lists.heads + (lists.heads > 1 ? first_head : 0);
      meetings_ = lists.data + list * lists.per_head() + static_cast<int64_t>(own.tile) * lists.columns;
      row_ = (static_cast<int64_t>(batch) * of_batch + first_head) * a.rows.padded + own_row;
      first_ = start_of(first(a), batch, row_head), second_ = start_of(second(a), batch, row_head);
      head_ = first_head, heads_left_ = heads, tiles_ = lists.columns, chunk_ = -1, meet_ = partial_ = precise_ = 0;
      whole_rows_ = all_columns ? static_cast<int>(kOfQueries ? shape.query_len : shape.kv_len) : 0;
    }
    __syncwarp();
  }
  // The tile of turn `turn`, by the first warp; a barrier has to follow.
  DEVICE void find(uint32_t turn, const BackwardArguments& a) {
    if (threadIdx.x >= 32) return;
    const Meetings& lists = meetings(a);
    const int tiles = tiles_;
    int head = head_, heads_left = heads_left_, chunk = chunk_;
    int64_t row = row_;
    const char *first_row = first_, *second_row = second_;
    uint32_t meet = meet_, partial = partial_, precise = precise_;
    const uint8_t* of_head = meetings_;
    __syncwarp();
    while (meet == 0 && heads_left > 0) {
      if (++chunk * 32 >= tiles) {
        ++head, --heads_left, chunk = -1;
        if constexpr (kOfQueries) {
          row += a.rows.padded, first_row += bytes(first(a).stride_head), second_row += bytes(second(a).stride_head);
        }
        if (lists.heads > 1) of_head += lists.per_head();
        continue;
      }
      const int tile = chunk * 32 + lane_index();
      const bool exists = tile < tiles;
      const int meeting = exists ? static_cast<int>(of_head[tile]) : static_cast<int>(kApart);
      meet = __ballot_sync(kAllLanes, meeting != kApart);
      partial = __ballot_sync(kAllLanes, meeting == kPartial);
      if constexpr (!kAlwaysPrecise) {
        const int64_t first_of_tile = kOfQueries ? row + static_cast<int64_t>(tile) * kRows : row;
        precise = __ballot_sync(kAllLanes, exists && a.rows.precise[first_of_tile / kRowBlock] != 0);
        partial |= precise;
      }
    }
    MetTile found{0, -1, nullptr, nullptr, nullptr};
    if (meet) {
      const int bit = __ffs(static_cast<int>(meet)) - 1, tile = chunk * 32 + bit;
      const bool clipped = (tile + 1) * kRows > whole_rows_;
      found.head = head;
      found.bits = MetTile::bits_of(tile, clipped, precise >> bit & 1, partial >> bit & 1);
      if constexpr (kOfQueries) found.terms = a.rows.terms + (row + static_cast<int64_t>(tile) * kRows) * RowTerms::kFloats;
      found.first = first_row + start_of_tile(first(a), tile), found.second = second_row + start_of_tile(second(a), tile);
      meet &= meet - 1;
    }
    if (threadIdx.x == 0) {
      found_[turn % kSlots] = found;
      meetings_ = of_head, row_ = row, first_ = first_row, second_ = second_row;
      head_ = head, heads_left_ = heads_left, chunk_ = chunk, meet_ = meet, partial_ = partial, precise_ = precise;
    }
    __syncwarp();
  }
  DEVICE BlockTile own() const { return own_; }
  DEVICE const MetTile& at(uint32_t turn) const { return found_[turn % kSlots]; }
  // Calls visit(whether the tile is partial) for one turn after the other; `turn` is the one at hand.
  template <class Visit>
  DEVICE void for_each(uint32_t& turn, const Visit& visit) const {
    while (at(turn).exists()) {
      for (; at(turn).is_whole(); ++turn) visit(std::false_type());
      for (; at(turn).is_partial(); ++turn) visit(std::true_type());
    }
  }
};

// Copies tiles of a tensor by a TileCopy, wherever they start.
template <class Copy>
class MetCopy {
  const Copy& copy_;
  const ConstTensorView& tensor_;
  decltype(Copy::own_chunk(tensor_)) own_chunk_;

 public:
  DEVICE MetCopy(const Copy& copy, const ConstTensorView& tensor) : copy_(copy), tensor_(tensor), own_chunk_(Copy::own_chunk(tensor)) {}
  DEVICE Rows rows(const char* first, int left) const {
    return {first + own_chunk_(), static_cast<int>(Copy::row_bytes(tensor_)), left};
  }
  DEVICE void clipped(uint32_t to, const Rows& from) const { copy_.clipped(to, from, 0); }
  DEVICE void unclipped(uint32_t to, const Rows& from) const { copy_.unclipped(to, from); }
};

// Copies what a block needs of a met tile; left: how many rows there are from its first on.
template <class First, class Second>
DEVICE void copy_met(const MetTile& tile, int left, const First& first, uint32_t first_to, const Second& second, uint32_t second_to) {
  const Rows first_rows = first.rows(tile.first, left), second_rows = second.rows(tile.second, left);
  if (tile.is_clipped()) {
    first.clipped(first_to, first_rows);
    second.clipped(second_to, second_rows);
  } else {
    first.unclipped(first_to, first_rows);
    second.unclipped(second_to, second_rows);
  }
}

}  // namespace attn_ext::cuda
