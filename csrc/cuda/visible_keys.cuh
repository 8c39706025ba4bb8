// Which elements of a score tile a mask leaves (core/params.h, MaskParams), a bit for each.
#pragma once
#include "core/mask.h"
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

// The entry of block `block` among those of a row of block lists, or -1.  Lists come from users and are not to be trusted.
DEVICE int find_block(const MaskParams::BlockLists& blocks, int begin, int end, int block) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    const int index = blocks.indices[middle];
    if (index == block) return middle;
    if (index < block) begin = middle + 1;
    else end = middle;
  }
  return -1;
}

// The entries of a row of block lists, inside the list whatever the offsets say.
struct BlockRow {
  int begin, end;

  DEVICE BlockRow(const MaskParams::BlockLists& blocks, int batch, int head, int query) {
    const int64_t* row = blocks.row(batch, head, 0) + query / blocks.query_block;
    begin = static_cast<int>(min_i64(max_i64(row[0], 0), blocks.entries));
    end = static_cast<int>(max_i64(0, min_i64(row[1], blocks.entries)));
  }
};

// Of a tile of N keys.  Bit 2 j + e of a thread's word of a row is key 8 j + 2 t + e.
template <int N>
class VisibleKeys {
  static_assert(N <= 128 && N % 16 == 0);
  static constexpr int kElements = N / 4;
  const AttentionParams& p_;
  int batch_, head_;
  int key0_, keys_;  // the tile's first key, and how many exist of it

  // Elements whose keys are below `end`, counted from the thread's first column.
  DEVICE static uint32_t below(int end) {
    const int count = (end >> 3) * 2 + min(end & 7, 2);
    return static_cast<uint32_t>((uint64_t{1} << min(max(count, 0), kElements)) - 1);
  }
  // Of the bits, those of keys begin <= key < end, counted from the tile's first, for which f is true.  f is asked for all of
  // these keys, so that its loads need not wait for one another.
  template <class F>
  DEVICE static uint32_t filtered(uint32_t bits, int begin, int end, const F& f) {
    const int column = lane_index() % 4 * 2;
    uint32_t kept = 0;
#pragma unroll 4
    for (int element = 0; element < kElements; ++element) {
      const int key = element / 2 * 8 + column + element % 2;
      kept |= static_cast<uint32_t>(f(min(max(key, begin), end - 1))) << element;
    }
    return bits & kept & below(end - column) & ~below(begin - column);
  }

  DEVICE uint32_t intervals(int query) const {
    const int first = key0_ + lane_index() % 4 * 2;
    uint32_t bits = 0;
#pragma unroll 1
    for (int r = 0; r < p_.mask.key_ranges.count; ++r) {
      const KeyInterval keys = visible_keys(p_.mask, p_.shape, batch_, query, r);
      bits |= below(static_cast<int>(keys.hi) - first) & ~below(static_cast<int>(keys.lo) - first);
    }
    return bits;
  }
  DEVICE uint32_t listed(uint32_t bits, int query) const {
    const MaskParams::BlockLists& blocks = p_.mask.blocks;
    const BlockRow row(blocks, batch_, head_, query);
    const int within = query % blocks.query_block, row_bytes = blocks.query_block / 8;
    uint32_t seen = 0;
    int end;
#pragma unroll 1
    for (int begin = 0; begin < keys_; begin = end) {
      const int block = (key0_ + begin) / blocks.kv_block;
      const int64_t block_begin = static_cast<int64_t>(block) * blocks.kv_block - key0_;
      end = static_cast<int>(min_i64(block_begin + blocks.kv_block, keys_));
      const int entry = find_block(blocks, row.begin, row.end, block);
      if (entry < 0) continue;
      const int tile = blocks.tiles[entry];
      if (tile == -1) seen |= filtered(bits, begin, end, [](int) { return true; });
      if (tile < 0 || tile >= blocks.bit_tiles) continue;
      const uint8_t* key_bits = blocks.bits + (static_cast<int64_t>(tile) * blocks.kv_block - block_begin) * row_bytes + within / 8;
      seen |= filtered(bits, begin, end, [&](int key) { return (key_bits[key * row_bytes] >> within % 8 & 1) != 0; });
    }
    return seen;
  }

 public:
  DEVICE VisibleKeys(const AttentionParams& p, int batch, int head, int key0)
      : p_(p), batch_(batch), head_(head), key0_(key0), keys_(min(N, static_cast<int>(p.shape.kv_len) - key0)) {}

  DEVICE uint32_t of(int query) const {
    const MaskParams& mask = p_.mask;
    uint32_t bits = intervals(query);
    if (mask.blocks.offsets) bits = listed(bits, query);
    if (mask.query_segments.data) {
      const int32_t id = mask.query_segments.data[batch_ * mask.query_segments.stride_batch + query];
      const int32_t* ids = mask.kv_segments.data + batch_ * mask.kv_segments.stride_batch + key0_;
      bits = filtered(bits, 0, keys_, [&](int key) { return ids[key] == id; });
    }
    if (mask.dense.data) {
      const ConstTensorView& dense = mask.dense;
      const uint8_t* row = static_cast<const uint8_t*>(dense.data) + batch_ * dense.stride_batch + head_ * dense.stride_head +
                           query * dense.stride_row + key0_ * dense.stride_column;
      bits = filtered(bits, 0, keys_, [&](int key) { return row[key * dense.stride_column] != 0; });
    }
    return bits;
  }
};

// -inf for what is not seen; seen(q) has a bit for each of the thread's keys.
template <class Place, class Seen>
DEVICE void hide(Accumulators<Place::MI, Place::NJ>& s, const Seen& seen) {
  UNROLL for (int q = 0; q < Place::kQueries; ++q) {
    const uint32_t bits = seen(q);
    UNROLL for (int k = 0; k < Place::kKeys; ++k)
      if (!(bits >> k & 1)) Place::at(s, q, k) = -INFINITY;
  }
}
// Which keys from key0 on the mask leaves to the queries that a thread has of a warp's rows, from query0 on.
template <class Place>
DEVICE void find_visible(uint32_t (&seen)[Place::kQueries], const AttentionParams& p, int batch, int head, int query0, int key0) {
  const VisibleKeys<4 * Place::kKeys> visible(p, batch, head, key0);
  UNROLL for (int q = 0; q < Place::kQueries; ++q) {
    // Rows past the end count as the last one: whatever they see is dropped.
    const int query = query0 + Place::first_query() + Place::query_offset(q);
    seen[q] = visible.of(min(query, static_cast<int>(p.shape.query_len) - 1));
  }
}

}  // namespace attn_ext::cuda
