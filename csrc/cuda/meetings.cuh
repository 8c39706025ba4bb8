// Which tiles of queries and keys meet.
#pragma once
#include "cuda/backward.h"
#include "cuda/key_visitor.cuh"

namespace attn_ext::cuda {

// Writes down what KeyVisitor says of M queries and all tiles of N keys: a warp for each tile of queries.
constexpr int kMeetingWarps = 4;
template <int M, int N, bool kOfKeys>
__global__ void __launch_bounds__(kMeetingWarps * 32) find_meetings(const __grid_constant__ BackwardArguments a) {
  const Meetings& meetings = kOfKeys ? a.of_keys : a.of_queries;
  const int query_tiles = kOfKeys ? meetings.columns : meetings.rows, key_tiles = kOfKeys ? meetings.rows : meetings.columns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMeetingWarps + threadIdx.x / 32;
  const int tile = static_cast<int>(index % query_tiles), list = static_cast<int>(index / query_tiles);
  if (list >= meetings.batch * meetings.heads) return;
  uint8_t* const first = meetings.data + list * meetings.per_head() + (kOfKeys ? tile : static_cast<int64_t>(tile) * key_tiles);
  const int64_t step = kOfKeys ? query_tiles : 1;

  KeyVisitor<M, N> visitor(a.params, list / meetings.heads, list % meetings.heads, tile * M);
  int written = key_tiles;  // tiles of keys from here on
  const auto write = [&](int from, uint8_t meeting) {
    for (int n = from + lane_index(); n < written; n += 32) first[n * step] = meeting;
    written = from;
  };
  for (TileRun run = visitor.next(); !run.empty(); run = visitor.next(run)) {
    write(run.last + 1, kApart);
    write(run.first, run.partial ? kPartial : kWhole);
  }
  write(0, kApart);
}

// A tile that meets the tile at hand.
struct MetTile {
  int head, bits;     // of the query
  int nth_head;       // how many heads after the first that was asked for
  int64_t first_row;  // the tile's, in RowTerms, if it is one of queries

  DEVICE bool is(Meeting meeting) const { return (bits & (INT32_MIN | 2)) == (meeting == kPartial ? 2 : 0); }
  DEVICE bool exists() const { return bits >= 0; }
  DEVICE int tile() const { return bits >> 2; }
  DEVICE bool precise() const { return bits & 1; }  // see RowTerms
};

// A walk over the tiles that meet a block's own tile, head by head.  It is kept in shared memory, as a register in every thread for each of
// its numbers is more than there is: the first warp finds the tiles, two turns before they are multiplied.
class TileWalk {
  static constexpr uint32_t kSlots = 4;
  MetTile found_[kSlots];
  const uint8_t* columns_;            // of the head
  int64_t head_row_;                  // in RowTerms
  int head_, nth_head_, heads_left_;
  int chunk_;                         // of 32 tiles
  BlockTile own_;
  uint32_t meet_, partial_;           // a bit for each that is left of the chunk

 public:
  // Over `heads` query heads, of the `heads_of_batch` that a batch element has.
  DEVICE void start(const Meetings& meetings, int64_t padded_rows, const BlockTile& own, int heads_of_batch, int first_head, int heads) {
    if (threadIdx.x == 0) {
      own_ = own;
      const int batch = own.batch, row = own.tile;
      const int64_t list = (meetings.batch > 1 ? batch : 0) * meetings.heads + (meetings.heads > 1 ? first_head : 0);
      columns_ = meetings.data + list * meetings.per_head() + static_cast<int64_t>(row) * meetings.columns;
      head_row_ = (static_cast<int64_t>(batch) * heads_of_batch + first_head) * padded_rows;
      head_ = first_head, nth_head_ = 0, heads_left_ = heads, chunk_ = -1, meet_ = partial_ = 0;
    }
    __syncwarp();
  }
  // The tile of turn `turn`, by the first warp; a barrier has to follow.  M: queries of a tile, 0: it is one of keys.
  template <int M>
  DEVICE void find(uint32_t turn, const Meetings& meetings, const RowTerms& rows) {
    if (threadIdx.x >= 32) return;
    int head = head_, nth_head = nth_head_, heads_left = heads_left_, chunk = chunk_;
    int64_t head_row = head_row_;
    uint32_t meet = meet_, partial = partial_;
    const uint8_t* columns = columns_;
    __syncwarp();
    while (meet == 0 && heads_left > 0) {
      if (++chunk * 32 >= meetings.columns) {
        ++head, ++nth_head, --heads_left, chunk = -1;
        head_row += rows.padded;
        if (meetings.heads > 1) columns += meetings.per_head();
        continue;
      }
      const int tile = chunk * 32 + lane_index();
      const int meeting = tile < meetings.columns ? static_cast<int>(columns[tile]) : static_cast<int>(kApart);
      meet = __ballot_sync(kAllLanes, meeting != kApart);
      partial = __ballot_sync(kAllLanes, meeting == kPartial);
    }
    MetTile found{0, -1, 0, 0};
    if (meet) {
      const int bit = __ffs(static_cast<int>(meet)) - 1, tile = chunk * 32 + bit;
      found = {head, 4 * tile + 2 * static_cast<int>(partial >> bit & 1), nth_head, head_row + static_cast<int64_t>(tile) * M};
      if (M && rows.precise[found.first_row / kRowBlock]) found.bits |= 1;
      meet &= meet - 1;
    }
    if (threadIdx.x == 0) {
      found_[turn % kSlots] = found;
      columns_ = columns, head_row_ = head_row, head_ = head, nth_head_ = nth_head, heads_left_ = heads_left;
      chunk_ = chunk, meet_ = meet, partial_ = partial;
    }
    __syncwarp();
  }
  DEVICE BlockTile own() const { return own_; }
  DEVICE const MetTile& at(uint32_t turn) const { return found_[turn % kSlots]; }
};

}  // namespace attn_ext::cuda
