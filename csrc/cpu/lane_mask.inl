// The structured mask as a group of lanes sees it: one query per lane, 2 vectors of lanes.
namespace attn_ext::cpu {
namespace {

// The keys of a tile, as rows of its scores: those that some lane sees, and among them a stretch that all lanes see.
struct TileRows {
  int begin = 0, end = 0, full_begin = 0, full_end = 0;

  bool empty() const { return begin >= end; }
  bool partial() const { return begin < full_begin || full_end < end; }
};

template <class Acc>
struct LaneMask {
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;
  using V = Vec<Acc>;
  using Bits = IntVec<Acc>;

  int64_t batch;
  int rows;                                   // lanes in use
  WorkRow lane_row[L];                        // idle lanes repeat the last row, and see nothing
  int ranges;                                 // of each lane
  TileKeys keys[kMaxKeyRanges];               // of the lanes' first ranges, of their second ranges, ...
  KeyInterval lane_keys[kMaxKeyRanges][L];
  Acc lo[kMaxKeyRanges][L], hi[kMaxKeyRanges][L];  // the same, relative to the current tile of keys
  LaneBlocks<Acc> blocks;
  const LaneBits* seen;                       // of the keys of the current tile, by the blocks; null: all are

  void set_rows(const MaskParams& mask, const AttentionShape& shape, const WorkRows& work, int64_t of_batch,
                int64_t kv_head, int64_t segment, int64_t first_row, int count) {
    batch = of_batch;
    rows = count;
    ranges = mask.key_ranges.count;
    seen = nullptr;
    WorkRow row = work.at(kv_head, segment, first_row);
    for (int lane = 0; lane < L; lane++) {
      lane_row[lane] = row;
      if (lane + 1 < count) work.advance(row);
    }
    for (int r = 0; r < ranges; r++) {
      for (int lane = 0; lane < count; lane++) {
        lane_keys[r][lane] = visible_keys(mask, shape, batch, lane_row[lane].query, r);
        if (lane == 0) keys[r] = TileKeys::of(lane_keys[r][0]);
        else keys[r].add(lane_keys[r][lane]);
      }
      for (int lane = count; lane < L; lane++) lane_keys[r][lane] = {0, 0};
    }
    blocks.set_rows(mask, shape, batch, lane_row, count);
  }

  // The first key from `from` on that some lane may see.
  int64_t next(int64_t from) const {
    while (true) {
      int64_t key = kNoKey;
      for (int r = 0; r < ranges; r++) {
        const KeyInterval any = keys[r].any;
        if (!any.empty() && from < any.hi) key = min_i64(key, max_i64(from, any.lo));
      }
      if (!blocks.any() || key == kNoKey) return key;
      from = blocks.next(key);
      if (from == key || from == kNoKey) return from;
    }
  }

  bool sees(int64_t begin, int64_t end) const { return next(begin) < end; }

  // Of the `count` keys from `tile` on.  begin and end are multiples of the quanta, but for the last key.
  TileRows rows_in(int64_t tile, int count, int begin_quantum, int end_quantum) const {
    TileRows t;
    for (int r = 0; r < ranges; r++) {
      if (keys[r].classify(tile, tile + count) == TileClass::skip) continue;
      const int begin = static_cast<int>(max_i64(0, keys[r].any.lo - tile)) / begin_quantum * begin_quantum;
      const int end = static_cast<int>(min_i64(count, round_up(keys[r].any.hi - tile, end_quantum)));
      const bool first = t.empty();
      t.begin = first || begin < t.begin ? begin : t.begin;
      t.end = first || end > t.end ? end : t.end;
      const int full_begin = static_cast<int>(max_i64(0, keys[r].all.lo - tile));
      const int full_end = static_cast<int>(min_i64(count, keys[r].all.hi - tile));
      if (full_end - full_begin > t.full_end - t.full_begin) t.full_begin = full_begin, t.full_end = full_end;
    }
    if (t.full_begin >= t.full_end) t.full_begin = t.full_end = t.begin;
    return seen ? seen_rows(t, begin_quantum, end_quantum) : t;
  }
  // Of these rows, what the blocks leave.
  TileRows seen_rows(const TileRows& t, int begin_quantum, int end_quantum) const {
    int begin = t.begin, end = t.end;
    while (begin < end && !seen[begin]) begin++;
    while (begin < end && !seen[end - 1]) end--;
    if (begin == end) return {};
    TileRows s;
    s.begin = begin / begin_quantum * begin_quantum;
    s.end = static_cast<int>(min_i64(t.end, round_up(end, end_quantum)));
    s.full_begin = s.full_end = s.begin;
    for (int n = t.full_begin; n < t.full_end; n++) {
      const int first = n;
      while (n < t.full_end && seen[n] == first_lanes(rows)) n++;
      if (n - first > s.full_end - s.full_begin) s.full_begin = first, s.full_end = n;
    }
    return s;
  }
  // Must precede visible() for the tile whose first key is `begin`.
  void set_tile(int64_t begin) {
    constexpr int64_t far = 1 << 20;  // beyond any tile, and exact in every Acc
    for (int r = 0; r < ranges; r++) {
      for (int lane = 0; lane < L; lane++) {
        lo[r][lane] = static_cast<Acc>(max_i64(-far, min_i64(far, lane_keys[r][lane].lo - begin)));
        hi[r][lane] = static_cast<Acc>(max_i64(-far, min_i64(far, lane_keys[r][lane].hi - begin)));
      }
    }
  }
  // Whether key `n` of the tile is visible, lane by lane of vector v (all bits or none).
  INLINE auto visible(int n, int v) const {
    const V key = splat(static_cast<Acc>(n));
    auto in = (key >= load(lo[0] + v * W)) & (key < load(hi[0] + v * W));
    for (int r = 1; r < ranges; r++) in |= (key >= load(lo[r] + v * W)) & (key < load(hi[r] + v * W));
    if (seen) in &= (splat_int<Acc>(static_cast<int32_t>(seen[n] >> v * W)) & lane_bits()) != 0;
    return in;
  }
  static INLINE Bits lane_bits() {
    Bits bits{};
    UNROLL for (int i = 0; i < W; i++) bits[i] = 1 << i;
    return bits;
  }
  // Rows whose scores must be masked one by one for a lane not to see a key it may not, or an idle lane any.
  INLINE bool must_look(const TileRows& t, int r, int count) const { return r < t.full_begin || r + count > t.full_end; }
};

}  // namespace
}  // namespace attn_ext::cpu
