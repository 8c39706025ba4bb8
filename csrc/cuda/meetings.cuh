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

// A tile of one query head that meets the tile at hand.
class MetTile {
  int tile_ = -1;  // twice the tile, and whether it is partial

 public:
  int head = 0;

  DEVICE MetTile() {}
  DEVICE MetTile(int head, int tile, bool partial) : tile_(2 * tile + partial), head(head) {}
  DEVICE bool exists() const { return tile_ >= 0; }
  DEVICE bool partial() const { return tile_ & 1; }
  DEVICE int tile() const { return tile_ >> 1; }
};

// The tiles that meet tile `row`, head by head.  Every warp keeps one, and all are alike.
class TileVisitor {
  const Meetings& meetings_;
  const uint8_t* row_;  // of the head
  int head_, heads_left_;
  int chunk_ = -1;      // of 32 tiles, a bit for each
  uint32_t meet_ = 0, partial_ = 0;

 public:
  DEVICE TileVisitor(const Meetings& meetings, int batch, int first_head, int heads, int row)
      : meetings_(meetings), head_(first_head), heads_left_(heads) {
    const int64_t list = (meetings.batch > 1 ? batch : 0) * meetings.heads + (meetings.heads > 1 ? first_head : 0);
    row_ = meetings.data + list * meetings.per_head() + static_cast<int64_t>(row) * meetings.columns;
  }

  DEVICE MetTile next() {
    while (meet_ == 0) {
      if (heads_left_ == 0) return {};
      const int tile = ++chunk_ * 32 + lane_index();
      if (chunk_ * 32 >= meetings_.columns) {
        ++head_, --heads_left_, chunk_ = -1;
        if (meetings_.heads > 1) row_ += meetings_.per_head();
        continue;
      }
      const int meeting = tile < meetings_.columns ? static_cast<int>(row_[tile]) : static_cast<int>(kApart);
      meet_ = __ballot_sync(kAllLanes, meeting != kApart);
      partial_ = __ballot_sync(kAllLanes, meeting == kPartial);
    }
    const int bit = __ffs(static_cast<int>(meet_)) - 1;
    meet_ &= meet_ - 1;
    return {head_, chunk_ * 32 + bit, (partial_ >> bit & 1) != 0};
  }
};

}  // namespace attn_ext::cuda
