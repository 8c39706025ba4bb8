// Merges the ranges of each row, in order, and the row's sink: a warp for each row.
#include "cuda/decode_merge.cuh"
#include "cuda/decode_sequence.cuh"
#include "cuda/launch.cuh"
#include "cuda/rotary.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kWarps = 4, kMostColumns = 256, kGroups = kMostColumns / 128;

DEVICE RowState state_at(const float* states, int range) {
  const float2 state = reinterpret_cast<const float2*>(states)[range];
  return RowState(state.x, state.y);
}

}  // namespace

__global__ void __launch_bounds__(kWarps * 32) decode_merge(const __grid_constant__ DeviceDecodeParams p) {
  const AttentionShape& shape = p.shape;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, queries = static_cast<int>(shape.query_len);
  if (row >= shape.batch * shape.heads * queries) return;
  const int heads = static_cast<int>(shape.heads), lane = lane_index();
  const int query = row % queries, head = row / queries % heads, batch = row / queries / heads;
  const int ranges = Sequence(p, batch).ranges();
  const float* const states = p.partial_state + row * p.ranges * 2;
  const float* const outs = p.partial_out + row * p.ranges * p.partial_columns;

  RowState state;
  if (p.score.sinks && lane == 0) state = RowState(bias_in_log2<float>(p.score.sinks[head]));
  for (int range = lane; range < ranges; range += 32) state.join(state_at(states, range));
  UNROLL for (int apart = 16; apart > 0; apart /= 2) {
    state.join(RowState(__shfl_xor_sync(kAllLanes, state.m, apart), __shfl_xor_sync(kAllLanes, state.l, apart)));
  }

  float4 out[kGroups] = {};
  for (int first = 0; first < ranges; first += 32) {
    const float own = first + lane < ranges ? state.share(state_at(states, first + lane)) : 0.f;
    const int count = min(32, ranges - first);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float share = __shfl_sync(kAllLanes, own, i);
      const float* const part = outs + (first + i) * p.partial_columns;
      UNROLL for (int group = 0; group < kGroups; ++group) {
        const int column = group * 128 + lane * 4;
        if (column < shape.value_dim) out[group] = add_weighted(out[group], share, *reinterpret_cast<const float4*>(part + column));
      }
    }
  }

  const int64_t place = batch * p.out.stride_batch + head * p.out.stride_head + query * p.out.stride_row;
  UNROLL for (int group = 0; group < kGroups; ++group) {
    const float columns[4] = {out[group].x, out[group].y, out[group].z, out[group].w};
    UNROLL for (int i = 0; i < 4; ++i) {
      const int column = group * 128 + lane * 4 + i;
      if (column < shape.value_dim) store_number(p.out.data, p.dtype, place + column, columns[i]);
    }
  }
  if (p.lse && lane == 0) static_cast<float*>(p.lse)[row] = RowStatistics<float>::of(state.m, state.l, log2f(state.l)).lse;
}

void merge_ranges(const DeviceDecodeParams& p, const Stream& stream) {
  const int64_t rows = p.shape.batch * p.shape.heads * p.shape.query_len;
  launch<decode_merge>("decode_merge", ceil_div<int64_t>(rows, kWarps), kWarps * 32, 0, stream, p);
}

}  // namespace attn_ext::cuda
