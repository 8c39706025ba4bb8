// Which tiles of queries meet a tile of keys.
#pragma once
#include "cuda/backward.h"
#include "cuda/key_visitor.cuh"

namespace attn_ext::cuda {

// Writes down what KeyVisitor says of M queries and all tiles of N keys: a warp for each tile of queries.
constexpr int kMeetingWarps = 4;
template <int M, int N>
__global__ void __launch_bounds__(kMeetingWarps * 32) find_meetings(const __grid_constant__ BackwardArguments a) {
  const Meetings& meetings = a.meetings;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMeetingWarps + threadIdx.x / 32;
  const int tile = static_cast<int>(index % meetings.query_tiles), list = static_cast<int>(index / meetings.query_tiles);
  if (list >= meetings.batch * meetings.heads) return;
  uint8_t* const column = meetings.data + static_cast<int64_t>(list) * meetings.key_tiles * meetings.query_tiles + tile;

  KeyVisitor<M, N> visitor(a.params, list / meetings.heads, list % meetings.heads, tile * M);
  int written = meetings.key_tiles;  // tiles of keys from here on
  const auto write = [&](int first, uint8_t meeting) {
    for (int n = first + lane_index(); n < written; n += 32) column[static_cast<int64_t>(n) * meetings.query_tiles] = meeting;
    written = first;
  };
  for (TileRun run = visitor.next(); !run.empty(); run = visitor.next(run)) {
    write(run.last + 1, kApart);
    write(run.first, run.partial ? kPartial : kWhole);
  }
  write(0, kApart);
}

// A tile of queries of one head.
struct QueryTile {
  int head = 0, tile = -1;
  bool partial = false;

  DEVICE bool exists() const { return tile >= 0; }
};

// The tiles of queries, of heads that share a key head, that meet a tile of keys.  Every warp keeps one, and all are alike.
class QueryVisitor {
  const uint8_t* row_;      // of the head
  int64_t head_stride_;
  int tiles_;
  int head_, end_head_;
  int chunk_ = -1;          // of 32 tiles, a bit for each
  uint32_t meet_ = 0, partial_ = 0;

 public:
  DEVICE QueryVisitor(const Meetings& meetings, int batch, int first_head, int heads, int key_tile)
      : tiles_(meetings.query_tiles), head_(first_head), end_head_(first_head + heads) {
    const int64_t per_head = static_cast<int64_t>(meetings.key_tiles) * tiles_;
    const int64_t list = (meetings.batch > 1 ? batch : 0) * meetings.heads + (meetings.heads > 1 ? first_head : 0);
    head_stride_ = meetings.heads > 1 ? per_head : 0;
    row_ = meetings.data + list * per_head + static_cast<int64_t>(key_tile) * tiles_;
  }

  DEVICE QueryTile next() {
    while (meet_ == 0) {
      if (++chunk_ * 32 >= tiles_) {
        if (++head_ >= end_head_) {
          chunk_ = tiles_ / 32, --head_;  // and stay there
          return {};
        }
        chunk_ = 0, row_ += head_stride_;
      }
      const int tile = chunk_ * 32 + lane_index();
      const int meeting = tile < tiles_ && head_ < end_head_ ? static_cast<int>(row_[tile]) : static_cast<int>(kApart);
      meet_ = __ballot_sync(kAllLanes, meeting != kApart);
      partial_ = __ballot_sync(kAllLanes, meeting == kPartial);
    }
    const int bit = __ffs(static_cast<int>(meet_)) - 1;
    meet_ &= meet_ - 1;
    return {head_, chunk_ * 32 + bit, (partial_ >> bit & 1) != 0};
  }
};

}  // namespace attn_ext::cuda
