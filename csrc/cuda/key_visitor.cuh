// Which tiles of keys a tile of queries visits, last one first, and which of them need no look at single elements.
#pragma once
#include "cuda/visible_keys.cuh"

namespace attn_ext::cuda {

// Key tiles last, last - 1, .., first, all whole (every query sees every key) or all partial; none if last < first.
struct TileRun {
  int first = 0, last = -1;
  bool partial = false;

  DEVICE bool empty() const { return last < first; }
};

// Of M queries and tiles of N keys.  Every warp keeps one, and all are alike: lanes share the queries out among themselves.
template <int M, int N>
class KeyVisitor {
  const AttentionParams& p_;
  int batch_, query0_;
  int first_, end_;              // tiles with a key that any query may see
  int whole_first_, whole_end_;  // tiles whose keys all queries see
  // Lane s < M / 16 follows the block list of 16 queries.
  int entries_begin_ = 0, entry_ = -1;  // the entry last met

  DEVICE static int lowest(int x) {
    UNROLL for (int lanes = 16; lanes; lanes /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
  }
  DEVICE static int highest(int x) { return -lowest(-x); }
  template <class F>
  DEVICE void for_own_queries(const F& f) const {
    for (int row = lane_index(); row < M && query0_ + row < p_.shape.query_len; row += 32) f(query0_ + row);
  }
  // One past the last key below `end` that the ranges show to any query; 0: none.
  DEVICE int top_in_ranges(int end) const {
    int top = 0;
    for_own_queries([&](int query) {
      for (int r = 0; r < p_.mask.key_ranges.count; ++r) {
        const KeyInterval keys = visible_keys(p_.mask, p_.shape, batch_, query, r);
        const int hi = static_cast<int>(min_i64(keys.hi, end));
        if (keys.lo < hi) top = max(top, hi);
      }
    });
    return highest(top);
  }
  // The same of the block lists; moves on to the entry that holds that key.
  DEVICE int top_in_lists(int end) {
    const MaskParams::BlockLists& blocks = p_.mask.blocks;
    int top = 0;
    for (; entry_ >= entries_begin_; --entry_) {
      const int64_t first = static_cast<int64_t>(blocks.indices[entry_]) * blocks.kv_block;
      if (first < 0 || first >= end) continue;
      top = static_cast<int>(min_i64(first + blocks.kv_block, end));
      break;
    }
    return highest(top);
  }
  // Whether full blocks hold the whole of tile n for this lane's queries.
  DEVICE bool listed_whole(int n) const {
    const MaskParams::BlockLists& blocks = p_.mask.blocks;
    int64_t end = min_i64(static_cast<int64_t>(n + 1) * N, p_.shape.kv_len);
    for (int entry = entry_; entry >= entries_begin_; --entry) {
      const int64_t first = static_cast<int64_t>(blocks.indices[entry]) * blocks.kv_block;
      if (first + blocks.kv_block < end || blocks.tiles[entry] != -1) return false;
      if (first <= static_cast<int64_t>(n) * N) return true;
      end = first;
    }
    return false;
  }
  DEVICE bool follows_list() const { return lane_index() < M / 16 && query0_ + lane_index() * 16 < p_.shape.query_len; }

 public:
  DEVICE KeyVisitor(const AttentionParams& p, int batch, int head, int query0) : p_(p), batch_(batch), query0_(query0) {
    const MaskParams& mask = p.mask;
    int any_lo = static_cast<int>(p.shape.kv_len), any_hi = 0, all_lo = 0, all_hi = any_lo;
    for_own_queries([&](int query) {
      TileKeys seen{{0, 0}, {0, p.shape.kv_len}};
      for (int r = 0; r < mask.key_ranges.count; ++r) seen.add(visible_keys(mask, p.shape, batch, query, r));
      if (!seen.any.empty()) {
        any_lo = min(any_lo, static_cast<int>(seen.any.lo)), any_hi = max(any_hi, static_cast<int>(seen.any.hi));
      }
      all_lo = max(all_lo, static_cast<int>(seen.all.lo)), all_hi = min(all_hi, static_cast<int>(seen.all.hi));
    });
    any_lo = lowest(any_lo), any_hi = highest(any_hi), all_lo = highest(all_lo), all_hi = lowest(all_hi);

    first_ = any_lo / N, end_ = (any_hi + N - 1) / N;
    whole_first_ = (all_lo + N - 1) / N, whole_end_ = all_hi / N;
    const bool by_element = mask.query_segments.data || mask.dense.data || p.score.bias.data;
    if (by_element || whole_first_ >= whole_end_) whole_first_ = whole_end_ = first_;
    if (mask.blocks.offsets && follows_list()) {
      const BlockRow row(mask.blocks, batch, head, query0 + lane_index() * 16);
      entries_begin_ = row.begin, entry_ = row.end - 1;
    }
  }

  DEVICE TileRun next() { return below(end_); }
  // The run that comes after `run`.
  DEVICE TileRun next(const TileRun& run) { return below(run.first); }

 private:
  DEVICE TileRun below(int end) {
    if (end <= first_) return {};
    if (p_.mask.key_ranges.count == 1 && !p_.mask.blocks.offsets) {  // no gaps between
      if (end > whole_end_) return {max(whole_end_, first_), end - 1, true};
      if (end > whole_first_) return {whole_first_, end - 1, false};
      return {first_, end - 1, true};
    }
    int top = end * N;
    if (p_.mask.key_ranges.count > 1) top = top_in_ranges(top);
    if (p_.mask.blocks.offsets) top = top_in_lists(top);
    const int n = (top + N - 1) / N - 1;
    if (n < first_) return {};
    bool whole = whole_first_ <= n && n < whole_end_;
    if (whole && p_.mask.blocks.offsets) whole = __all_sync(kAllLanes, !follows_list() || listed_whole(n));
    return {n, n, !whole};
  }
};

}  // namespace attn_ext::cuda
