// Masks as intervals.  Every structured mask (causal, window, key lengths, prefix, packed documents) and every
// intersection of them lets query i see one interval of keys, [lo, hi); a union, a few.  A tile of queries is then
// described by two intervals for each of them: keys that any of its queries sees, and keys that all of them see.  Tiles
// of keys are skipped outside the first, taken whole inside the second, and only what lies between needs a look at
// single elements.  Blocks of keys that are listed one by one (MaskParams::BlockLists) come on top.
#pragma once
#include "core/host_device.h"
#include "core/params.h"

namespace attn_ext {

struct KeyInterval {
  int64_t lo, hi;  // keys lo <= j < hi

  ATTN_HD bool empty() const { return lo >= hi; }
  ATTN_HD bool contains(int64_t j) const { return lo <= j && j < hi; }
};

ATTN_HD int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
ATTN_HD int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether any part of the mask or the bias can hide a key from a query.
ATTN_HD bool may_hide_keys(const AttentionParams& p) {
  return p.mask.key_ranges.data || p.mask.query_segments.data || p.mask.blocks.offsets || p.mask.dense.data ||
         p.score.bias.data || p.mask.band_lower > -p.shape.query_len || p.mask.band_upper < p.shape.kv_len;
}

// The keys of range r that query i of a batch element may attend to (segments, blocks and dense masks aside).  Bands may be
// anything an int64 holds: they are brought next to [-query_len, kv_len] before they are added to an index.
ATTN_HD KeyInterval visible_keys(const MaskParams& mask, const AttentionShape& shape, int64_t batch, int64_t i, int r = 0) {
  KeyInterval keys{0, shape.kv_len};
  if (mask.key_ranges.data) {
    const int64_t* range = mask.key_ranges.data + batch * mask.key_ranges.stride_batch + i * mask.key_ranges.stride_row + 2 * r;
    keys = {max_i64(0, range[0]), min_i64(keys.hi, range[1])};
  }
  if (mask.band_lower > -shape.query_len) keys.lo = max_i64(keys.lo, i + min_i64(mask.band_lower, shape.kv_len));
  if (mask.band_upper < shape.kv_len) {
    keys.hi = min_i64(keys.hi, i + max_i64(mask.band_upper, -shape.query_len - 1) + 1);
  }
  if (keys.hi < 0) keys.hi = 0;
  if (keys.lo > keys.hi) keys.lo = keys.hi;
  return keys;
}

// How many blocks the lists of one batch element and head have for the queries [first, last); first < last.
ATTN_HD int64_t listed_blocks(const MaskParams::BlockLists& blocks, int64_t batch, int64_t head, int64_t first, int64_t last) {
  return blocks.row(batch, head, last - 1)[1] - blocks.row(batch, head, first)[0];
}
// The share of the score matrix that is in a block.
ATTN_HD double listed_share(const AttentionParams& p) {
  const MaskParams::BlockLists& blocks = p.mask.blocks;
  if (!blocks.offsets || p.shape.query_len == 0 || p.shape.kv_len == 0) return 1;
  const int64_t batch = blocks.stride_batch ? p.shape.batch : 1, heads = blocks.stride_head ? p.shape.heads : 1;
  double listed = 0;
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t h = 0; h < heads; h++) listed += static_cast<double>(listed_blocks(blocks, b, h, 0, p.shape.query_len));
  }
  const double rows = static_cast<double>((p.shape.query_len - 1) / blocks.query_block + 1);
  const double columns = static_cast<double>((p.shape.kv_len - 1) / blocks.kv_block + 1);
  return batch && heads ? listed / (rows * columns * static_cast<double>(batch * heads)) : 1;
}

enum class TileClass { skip, full, partial };

// What a tile of queries sees: `any` covers the keys at least one query sees, `all` the keys every query sees.
struct TileKeys {
  KeyInterval any, all;

  ATTN_HD static TileKeys of(KeyInterval keys) { return {keys, keys}; }
  ATTN_HD void add(KeyInterval keys) {
    if (!keys.empty()) {
      any = any.empty() ? keys : KeyInterval{min_i64(any.lo, keys.lo), max_i64(any.hi, keys.hi)};
    }
    all = {max_i64(all.lo, keys.lo), min_i64(all.hi, keys.hi)};
  }
  // The class of the keys [begin, end), begin < end.
  ATTN_HD TileClass classify(int64_t begin, int64_t end) const {
    if (any.empty() || end <= any.lo || begin >= any.hi) return TileClass::skip;
    return all.lo <= begin && end <= all.hi ? TileClass::full : TileClass::partial;
  }
};

}  // namespace attn_ext
