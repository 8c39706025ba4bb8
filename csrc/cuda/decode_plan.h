// How decoding is cut into pieces: what the host knows of it, and the rule that kernels follow.
//
// The keys that the queries of a sequence see are cut into ranges, each with a softmax of its own, merged in order.  How many
// keys a range has depends on how many the sequence has, and on nothing else: so do the bits of the result.  How many blocks
// share the ranges of a row is another matter, decided by the size of the device.
#pragma once
#include "core/mask.h"
#include "core/online_softmax.h"
#include "cuda/kernels.h"

namespace attn_ext::cuda {

constexpr int kDecodeRows = 16;  // of a block: queries of the heads of a group
constexpr int kDecodeTile = 16;  // keys that a warp takes at a time
// Left to the kernel, 64 ranges at most, so that merging them costs little, of at least 256 keys, for the same reason.
constexpr int kMostRanges = 64, kLeastKeys = 256;

template <class Int>
ATTN_HD Int ceil_div(Int a, Int b) { return a / b + (a % b != 0); }

// Of `keys` > 0 in all.  On a device the numbers are small, and divisions of 64 bits slow.
ATTN_HD int keys_of_range(int keys, int splits) {
  const int by_number = ceil_div(keys, splits ? splits : kMostRanges);
  const int each = splits || by_number > kLeastKeys ? by_number : kLeastKeys;
  return ceil_div(each, kDecodeTile) * kDecodeTile;
}
// Of a sequence of up to `keys`.
ATTN_HD int64_t most_ranges(int64_t keys, int64_t splits) {
  return min_i64(splits ? splits : kMostRanges, ceil_div<int64_t>(keys, splits ? kDecodeTile : kLeastKeys));
}

inline int64_t decode_row_blocks(const DecodeParams& p) {
  return ceil_div<int64_t>(p.shape.group() * p.shape.query_len, kDecodeRows);
}

// What follows from shapes and the device.  Lengths may be anything up to what there is room for.
inline void plan(DeviceDecodeParams& p, const Device& device) {
  const int64_t total = p.room + p.shape.kv_len;
  const int64_t keys = p.window_left < total ? min_i64(total, p.window_left + p.shape.query_len) : total;
  p.ranges = max_i64(1, most_ranges(keys, p.splits));
  p.partial_columns = ceil_div<int64_t>(p.shape.value_dim, 4) * 4;
  const bool caps = p.score.softcap > 0;
  p.score_factor = static_cast<float>(caps ? p.score.scale / p.score.softcap : p.score.scale * kLog2E);
  p.score_cap = static_cast<float>(p.score.softcap * kLog2E);
  const int64_t rows = p.shape.batch * p.shape.kv_heads * decode_row_blocks(p);
  p.blocks = rows ? min_i64(p.ranges, ceil_div(8 * max_i64(1, device.processors), rows)) : 1;
}
// Floats of partial_out and of partial_state.
inline int64_t partial_rows(const DeviceDecodeParams& p) {
  return p.shape.batch * p.shape.heads * p.shape.query_len * p.ranges;
}

}  // namespace attn_ext::cuda
