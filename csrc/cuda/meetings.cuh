// Which tiles of queries and keys meet, for the walks of cuda/tile_walk.cuh.
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

}  // namespace attn_ext::cuda
