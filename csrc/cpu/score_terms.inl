// What is added to the scores of a group of lanes and a tile of keys, element by element: the bias, ALiBi, and -inf for
// what segments and dense masks hide.  All of them end up in one tile of numbers in units of log2, laid out as the scores
// are, so that the kernels know only "a term" or "no term".
namespace attn_ext::cpu {
namespace {

using attn_ext::bias_in_log2;

// The same of vectors.
template <class Acc>
INLINE Vec<Acc> bias_in_log2(Vec<Acc> value) {
  const Vec<Acc> limit = splat(RowStatistics<Acc>::largest());
  const Vec<Acc> clamped = max(-limit, min(limit, value));  // NaN stays NaN
  return keep_infinities(value, clamped * static_cast<Acc>(kLog2E));
}

// kLanes neighbouring values of a dense operand, as they are added.
template <class Acc, class T>
INLINE Vec<Acc> load_terms(const T* p) { return bias_in_log2<Acc>(widen(p)); }
template <class Acc>
INLINE Vec<Acc> load_terms(const Float16* p) { return widen(p) * static_cast<Acc>(kLog2E); }
template <class Acc>
INLINE Vec<Acc> load_terms(const uint8_t* p) {  // booleans
  return widen_bytes(p, Acc()) == 0 ? splat(-std::numeric_limits<Acc>::infinity()) : Vec<Acc>{};
}

// Rows of a dense operand, one per lane.
template <class Acc>
struct DenseRows {
  static constexpr int L = kGroupLanes<Acc>;
  const ConstTensorView& view;
  DType dtype;
  int64_t offset[L];  // of the lanes' rows, in elements
  bool shared;        // all lanes have the same row

  DenseRows(const ConstTensorView& view, DType dtype, const LaneMask<Acc>& lanes) : view(view), dtype(dtype), shared(true) {
    for (int lane = 0; lane < L; lane++) {
      const WorkRow row = lanes.lane_row[lane];
      offset[lane] = lanes.batch * view.stride_batch + row.head * view.stride_head + row.query * view.stride_row;
      shared &= offset[lane] == offset[0];
    }
  }
  template <class T>
  const T* at(int64_t element) const { return static_cast<const T*>(view.data) + element; }

  Acc value(int64_t element) const {
    switch (dtype) {
      case DType::float32: return bias_in_log2<Acc>(*at<float>(element));
      case DType::float64: return bias_in_log2<Acc>(*at<double>(element));
      case DType::float16: return bias_in_log2<Acc>(to_float(*at<Float16>(element)));
      case DType::bfloat16: return bias_in_log2<Acc>(to_float(*at<BFloat16>(element)));
      case DType::boolean: break;
    }
    return *at<uint8_t>(element) ? 0 : -std::numeric_limits<Acc>::infinity();
  }
  // Of kLanes neighbouring keys, `count` of which exist.
  Vec<Acc> values(int64_t element, int64_t count) const {
    constexpr int W = kLanes<Acc>;
    alignas(Vec<Acc>) Acc a[W] = {};
    for (int64_t i = 0; i < W && i < count; i++) a[i] = value(element + i * view.stride_column);
    return load(a);
  }
  // Whether booleans are the same for all lanes and `count` keys from `first` on, by a look at eight at a time.
  TileClass classify_boolean(int rows, int64_t first, int64_t count) const {
    if (view.stride_column != 1) return TileClass::partial;
    constexpr uint64_t ones = 0x0101010101010101;
    bool all = true, any = false;
    for (int lane = 0; lane < (shared ? 1 : rows) && (all || !any); lane++) {
      const uint8_t* row = at<uint8_t>(offset[lane] + first);
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        uint64_t word;
        std::memcpy(&word, row + i, 8);
        all &= word == ones;
        any |= word != 0;
      }
      for (; i < count; i++) {
        all &= row[i] == 1;
        any |= row[i] != 0;
      }
    }
    return all ? TileClass::full : any ? TileClass::partial : TileClass::skip;
  }
};

template <class Acc>
class ScoreTerms {
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;
  using V = Vec<Acc>;
  using Bits = IntVec<Acc>;
  using Int = typename IntOf<Acc>::type;
  static constexpr Acc kMinusInfinity = -std::numeric_limits<Acc>::infinity();

  const AttentionParams& p_;
  const LaneMask<Acc>& lanes_;
  Acc* const out_;         // [keys][L]
  const int64_t tile_;     // first key of the tile
  const int begin_, end_;  // rows wanted
  const int existing_;     // rows from here on are no keys: 0
  bool written_ = false;   // out_ holds terms; until then they are all 0

  // Applies f(n, v, term) -> term to every vector of the tile.
  template <class F>
  INLINE void update(const F& f) {
    for (int n = begin_; n < end_; n++) {
      UNROLL for (int v = 0; v < L / W; v++) {
        Acc* const at = out_ + n * L + v * W;
        store(at, f(n, v, written_ ? load(at) : V{}));
      }
    }
    written_ = true;
  }

  // Bits that all values of existing keys have, and bits that any has: values are the same where these are.
  struct Common {
    Bits every = ~Bits{}, some = Bits{};
    INLINE void add(V value) { every &= (Bits)value, some |= (Bits)value; }
  };
  // Calls put(n, lane, values) with the vectors of the tile, transposed: values of lanes from `lane` on for key n.
  template <class T, class Put>
  __attribute__((noinline)) Common transposed_as(const DenseRows<Acc>& rows, const Put& put) const {
    Common common;
    for (int lane = 0; lane < L; lane += W) {
      int n = begin_;
      if constexpr (!std::is_void_v<T>) {
        const int64_t next_lanes = L * rows.view.stride_row;
        const T* row[W];
        for (int i = 0; i < W; i++) row[i] = rows.template at<T>(rows.offset[lane + i] + tile_);
        for (; n < end_ && tile_ + n + W <= p_.shape.kv_len; n += W) {
          V a[W];
          // Rows lie far apart, and memory answers slowly: the next lanes, read next, find theirs in the cache.
          UNROLL for (int i = 0; i < W; i++) __builtin_prefetch(row[i] + n + next_lanes, 0, 2);
          UNROLL for (int i = 0; i < W; i++) a[i] = load_terms<Acc>(row[i] + n);
          transpose<Acc>(a);
          if (n + W <= end_) {
            UNROLL for (int i = 0; i < W; i++) common.add(a[i]);
            UNROLL for (int i = 0; i < W; i++) put(n + i, lane, a[i]);
          } else {  // the vectors reach into the next tile
            for (int i = 0; i < end_ - n; i++) common.add(a[i]), put(n + i, lane, a[i]);
          }
        }
      }
      for (; n < end_; n += W) {
        V a[W];
        for (int i = 0; i < W; i++) {
          a[i] = rows.values(rows.offset[lane + i] + (tile_ + n) * rows.view.stride_column, existing_ - n);
        }
        transpose<Acc>(a);
        for (int i = 0; i < W && n + i < end_; i++) {
          if (n + i < existing_) common.add(a[i]);
          put(n + i, lane, a[i]);
        }
      }
    }
    return common;
  }
  template <class Put>
  Common transposed(const DenseRows<Acc>& rows, const Put& put) const {
    if (rows.view.stride_column == 1) {
      if constexpr (sizeof(Acc) == 4) {
        if (rows.dtype == DType::float32) return transposed_as<float>(rows, put);
        if (rows.dtype == DType::float16) return transposed_as<Float16>(rows, put);
        if (rows.dtype == DType::bfloat16) return transposed_as<BFloat16>(rows, put);
      } else {
        if (rows.dtype == DType::float64) return transposed_as<double>(rows, put);
      }
      if (rows.dtype == DType::boolean) return transposed_as<uint8_t>(rows, put);
    }
    return transposed_as<void>(rows, put);
  }

  TileClass write_bias() {
    const DenseRows<Acc> rows(p_.score.bias, p_.score.bias_dtype, lanes_);
    Common common;
    if (rows.shared) {
      for (int n = begin_; n < end_; n++) {
        const V b = splat(n < existing_ ? rows.value(rows.offset[0] + (tile_ + n) * rows.view.stride_column) : Acc(0));
        if (n < existing_) common.add(b);
        for (int lane = 0; lane < L; lane += W) store(out_ + n * L + lane, b);
      }
    } else {
      common = transposed(rows, [out = out_](int n, int lane, V values) { store(out + n * L + lane, values); });
    }
    const Bits hidden = (Bits)splat(kMinusInfinity);
    bool all_hidden = true, all_zero = true;
    for (int lane = 0; lane < W; lane++) {
      all_hidden &= common.every[lane] == hidden[lane] && common.some[lane] == hidden[lane];
      all_zero &= common.some[lane] == 0;
    }
    if (all_hidden) return TileClass::skip;
    written_ = !all_zero;
    return written_ ? TileClass::partial : TileClass::full;
  }

  TileClass hide_dense() {
    const DenseRows<Acc> rows(p_.mask.dense, DType::boolean, lanes_);
    const TileClass tile_class = rows.classify_boolean(lanes_.rows, tile_ + begin_, existing_ - begin_);
    if (tile_class != TileClass::partial) return tile_class;
    if (rows.shared) {
      const uint8_t* row = rows.template at<uint8_t>(rows.offset[0] + tile_ * rows.view.stride_column);
      update([&](int n, int, V term) { return n < existing_ && !row[n * rows.view.stride_column] ? splat(kMinusInfinity) : term; });
    } else if (written_) {
      transposed(rows, [&](int n, int lane, V values) {
        if (n >= existing_) return;
        Acc* const at = out_ + n * L + lane;
        store(at, values == 0 ? load(at) : values);
      });
    } else {
      transposed(rows, [&](int n, int lane, V values) { store(out_ + n * L + lane, values); });
      written_ = true;
    }
    return TileClass::partial;
  }

  TileClass hide_segments() {
    const auto& queries = p_.mask.query_segments;
    const int32_t* keys = p_.mask.kv_segments.data + lanes_.batch * p_.mask.kv_segments.stride_batch + tile_;
    alignas(Bits) Int ids[L];
    for (int lane = 0; lane < L; lane++) ids[lane] = queries.data[lanes_.batch * queries.stride_batch + lanes_.lane_row[lane].query];
    bool same_ids = true;
    for (int lane = 1; lane < L; lane++) same_ids &= ids[lane] == ids[0];
    bool same_keys = true;
    for (int n = begin_ + 1; n < existing_; n++) same_keys &= keys[n] == keys[begin_];
    if (same_ids && same_keys) return ids[0] == keys[begin_] ? TileClass::full : TileClass::skip;
    update([&](int n, int v, V term) {
      const Bits key = splat_int<Acc>(keys[n < existing_ ? n : begin_]);
      Bits id;
      std::memcpy(&id, ids + v * W, sizeof id);
      return key == id ? term : splat(kMinusInfinity);
    });
    return TileClass::partial;
  }

  void add_alibi() {
    const ScoreParams& score = p_.score;
    alignas(V) Acc slope[L], position[L];  // -slope, in units of log2; and the query's place among the tile's keys
    for (int lane = 0; lane < L; lane++) {
      const WorkRow row = lanes_.lane_row[lane];
      slope[lane] = static_cast<Acc>(-score.alibi_slopes[lanes_.batch * score.alibi_stride_batch +
                                                         row.head * score.alibi_stride_head + row.query * score.alibi_stride_row] *
                                     kLog2E);
      const int64_t own = score.alibi_positions ? score.alibi_positions[row.query] : row.query + p_.shape.kv_len - p_.shape.query_len;
      position[lane] = static_cast<Acc>(own - tile_);
    }
    update([&](int n, int v, V term) {
      const V distance = load(position + v * W) - splat(static_cast<Acc>(n));
      return fma(max(distance, -distance), load(slope + v * W), term);
    });
  }

 public:
  ScoreTerms(const AttentionParams& p, const LaneMask<Acc>& lanes, Acc* out, int64_t tile, const TileRows& rows)
      : p_(p), lanes_(lanes), out_(out), tile_(tile), begin_(rows.begin), end_(rows.end),
        existing_(static_cast<int>(min_i64(rows.end, p.shape.kv_len - tile))) {}

  static bool any(const AttentionParams& p) {
    return p.score.bias.data || p.score.alibi_slopes || p.mask.dense.data || p.mask.query_segments.data;
  }

  // skip: every key is hidden; full: nothing is added or hidden; partial: `out` has been written.
  TileClass read() {
    if (p_.score.bias.data && write_bias() == TileClass::skip) return TileClass::skip;
    if (p_.score.alibi_slopes) add_alibi();
    if (p_.mask.dense.data && hide_dense() == TileClass::skip) return TileClass::skip;
    if (p_.mask.query_segments.data && hide_segments() == TileClass::skip) return TileClass::skip;
    return written_ ? TileClass::partial : TileClass::full;
  }
};

}  // namespace
}  // namespace attn_ext::cpu
