// The block lists as a group of lanes sees them: of each key of a tile, one bit for every lane.
namespace attn_ext::cpu {
namespace {

constexpr int kGroupVectors = 2;
template <class Acc>
constexpr int kGroupLanes = kGroupVectors * kLanes<Acc>;

using LaneBits = uint32_t;

INLINE LaneBits first_lanes(int count) { return count < 32 ? (LaneBits(1) << count) - 1 : ~LaneBits(0); }

constexpr int64_t kNoKey = std::numeric_limits<int64_t>::max();

// How many keys to take together, `most` or fewer: whole blocks, or equal parts of one, so that tiles do not cut blocks.
INLINE int64_t keys_of_blocks(int64_t kv_block, int64_t most) {
  if (kv_block <= most) return most / kv_block * kv_block;
  return round_up(div_up(kv_block, div_up(kv_block, most)), kRowQuantum);
}

template <class Acc>
class LaneBlocks {
  static constexpr int L = kGroupLanes<Acc>;
  static_assert(L <= 32);
  using Lists = MaskParams::BlockLists;

  struct List {                  // of neighbouring lanes, in one block of queries
    const int32_t *begin, *end;  // the blocks of keys
    int lane, lanes;
    int query;                   // the place of the first lane among the queries of the block
  };
  const Lists* lists_;
  int64_t kv_len_;
  int count_;
  List list_[L];

  // The first listed block from `block` on.
  static const int32_t* find(const List& list, int64_t block) {
    const int32_t* begin = list.begin;
    for (int64_t count = list.end - begin; count > 0;) {
      const int64_t half = count / 2;
      if (begin[half] < block) begin += half + 1, count -= half + 1;
      else count = half;
    }
    return begin;
  }
  // Bits [query, query + lanes) of a row of bits.
  static INLINE LaneBits bits_at(const uint8_t* row, int query, int lanes) {
    uint64_t bits = 0;
    for (int i = 0; 8 * i < query % 8 + lanes; i++) bits |= static_cast<uint64_t>(row[query / 8 + i]) << 8 * i;
    return static_cast<LaneBits>(bits >> query % 8) & first_lanes(lanes);
  }

 public:
  void set_rows(const MaskParams& mask, const AttentionShape& shape, int64_t batch, const WorkRow* rows, int lanes) {
    lists_ = &mask.blocks;
    kv_len_ = shape.kv_len;
    count_ = 0;
    if (!any()) return;
    const int64_t* last = nullptr;
    for (int lane = 0; lane < lanes; lane++) {
      const int64_t* const row = lists_->row(batch, rows[lane].head, rows[lane].query);
      if (lane > 0 && row == last && rows[lane].query == rows[lane - 1].query + 1) {
        list_[count_ - 1].lanes++;
        continue;
      }
      list_[count_++] = {lists_->indices + row[0], lists_->indices + row[1], lane, 1,
                         static_cast<int>(rows[lane].query % lists_->query_block)};
      last = row;
    }
  }
  // Whether there are lists at all.
  bool any() const { return lists_->offsets != nullptr; }

  // The first key from `from` on in a block that some lane lists.
  int64_t next(int64_t from) const {
    int64_t key = kNoKey;
    for (int i = 0; i < count_; i++) {
      const int32_t* const at = find(list_[i], from / lists_->kv_block);
      if (at < list_[i].end) key = min_i64(key, max_i64(from, int64_t(*at) * lists_->kv_block));
    }
    return key;
  }
  // Whether all lanes, and all of another group, have one list in common.
  bool shares_list(const LaneBlocks& other) const {
    return count_ == 1 && other.count_ == 1 && list_[0].begin == other.list_[0].begin && list_[0].end == other.list_[0].end;
  }
  // Calls f(begin, end, full) for the stretches of the `count` keys from `tile` on that lanes with a common list have to
  // look at: neighbouring full blocks, or a partial one.
  template <class F>
  void for_stretches(int64_t tile, int count, const F& f) const {
    const int64_t kv_block = lists_->kv_block;
    const List& list = list_[0];
    const auto is_full = [&](const int32_t* at) { return lists_->tiles[at - lists_->indices] < 0; };
    for (const int32_t* at = find(list, tile / kv_block); at < list.end && *at * kv_block < tile + count;) {
      const bool full = is_full(at);
      const int64_t begin = max_i64(0, *at * kv_block - tile);
      int64_t end = (*at + 1) * kv_block - tile;
      for (at++; full && at < list.end && *at * kv_block == tile + end && is_full(at); at++) end += kv_block;
      f(static_cast<int>(begin), static_cast<int>(min_i64(count, end)), full);
    }
  }
  // seen[n] tells which lanes see key `tile + n`, 0 <= n < count.
  void read(LaneBits* seen, int64_t tile, int count) const {
    std::memset(seen, 0, count * sizeof *seen);
    const int64_t kv_block = lists_->kv_block, row_bytes = lists_->query_block / 8, last = min_i64(tile + count, kv_len_);
    for (int i = 0; i < count_; i++) {
      const List& list = list_[i];
      for (const int32_t* at = find(list, tile / kv_block); at < list.end && *at * kv_block < last; at++) {
        const int64_t block = *at * kv_block, first = max_i64(block, tile);
        LaneBits* const begin = seen + (first - tile);
        LaneBits* const end = seen + (min_i64(block + kv_block, last) - tile);
        const int32_t bit_tile = lists_->tiles[at - lists_->indices];
        if (bit_tile < 0) {
          for (LaneBits* key = begin; key < end; key++) *key |= first_lanes(list.lanes) << list.lane;
        } else {
          const uint8_t* row = lists_->bits + (bit_tile * kv_block + (first - block)) * row_bytes;
          for (LaneBits* key = begin; key < end; key++, row += row_bytes) {
            *key |= bits_at(row, list.query, list.lanes) << list.lane;
          }
        }
      }
    }
  }
};

// Calls f(begin, end) for every run of the keys [0, count) that some lane sees, up to whole quanta of rows.  What lies
// between two runs is at least a block of keys: a gap within one would cost more than it saves.
template <class F>
INLINE void for_runs(const LaneBits* seen, int count, const F& f) {
  constexpr int kLeastGap = 16;
  static_assert(kLeastGap >= 2 * kRowQuantum);
  for (int n = 0; n < count;) {
    if (!seen[n]) {
      n++;
      continue;
    }
    const int begin = n;
    int end = n;  // one past the last key seen
    for (; n < count && n - end < kLeastGap; n++) {
      if (seen[n]) end = n + 1;
    }
    f(begin / kRowQuantum * kRowQuantum, static_cast<int>(min_i64(count, round_up(end, kRowQuantum))));
  }
}

}  // namespace
}  // namespace attn_ext::cpu
