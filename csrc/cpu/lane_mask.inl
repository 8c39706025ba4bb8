// The mask as a group of lanes sees it: one query per lane, 2 vectors of lanes.
namespace attn_ext::cpu {
namespace {

constexpr int kGroupVectors = 2;
template <class Acc>
constexpr int kGroupLanes = kGroupVectors * kLanes<Acc>;

// Additive mask values in units of log2.  Finite values stay finite: a row masked by the lowest finite number is still a
// row (all its keys weigh the same), only -inf removes a key.
template <class Acc>
INLINE Acc bias_in_log2(double value) {
  constexpr double limit = RowStatistics<Acc>::largest();
  if (std::fabs(value) <= std::numeric_limits<double>::max()) value = value > limit ? limit : value < -limit ? -limit : value;
  return RowStatistics<Acc>::to_log2(static_cast<Acc>(value));
}
template <class Acc>
INLINE Vec<Acc> bias_in_log2(Vec<Acc> value) {
  const Vec<Acc> limit = splat(RowStatistics<Acc>::largest()), infinity = splat(std::numeric_limits<Acc>::infinity());
  const Vec<Acc> clamped = -max(-limit, -max(-limit, value));
  return ((value == infinity) | (value == -infinity) ? value : clamped) * static_cast<Acc>(kLog2E);
}

template <class Acc>
struct LaneMask {
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;
  using V = Vec<Acc>;

  TileKeys keys;
  int rows;                          // lanes in use
  KeyInterval lane_keys[L];
  Acc lo[L], hi[L];                  // the same, relative to the current tile of keys
  int64_t bias_offset[L];            // element offset of the lane's bias row
  bool bias_row_is_shared;           // all lanes read the same bias row

  void set_rows(const MaskParams& mask, const AttentionShape& shape, const WorkRows& work, int64_t batch,
                int64_t kv_head, int64_t segment, int64_t first_row, int count) {
    rows = count;
    WorkRow row = work.at(kv_head, segment, first_row);
    for (int lane = 0; lane < L; lane++) {
      if (lane < count) {
        lane_keys[lane] = visible_keys(mask, shape, batch, row.query);
        bias_offset[lane] = batch * mask.bias.stride_batch + row.head * mask.bias.stride_head + row.query * mask.bias.stride_row;
        if (lane == 0) keys = TileKeys::of(lane_keys[0]);
        else keys.add(lane_keys[lane]);
        work.advance(row);
      } else {  // idle lanes see nothing, and read the last row's bias
        lane_keys[lane] = {0, 0};
        bias_offset[lane] = bias_offset[count - 1];
      }
    }
    bias_row_is_shared = mask.bias.stride_row == 0 && (mask.bias.stride_head == 0 || work.segments == work.group);
  }

  // Must precede visible() for the tile whose first key is `begin`.
  void set_tile(int64_t begin) {
    constexpr int64_t far = 1 << 20;  // beyond any tile, and exact in every Acc
    for (int lane = 0; lane < L; lane++) {
      lo[lane] = static_cast<Acc>(max_i64(-far, min_i64(far, lane_keys[lane].lo - begin)));
      hi[lane] = static_cast<Acc>(max_i64(-far, min_i64(far, lane_keys[lane].hi - begin)));
    }
  }
  // Whether key `n` of the tile is visible, lane by lane of vector v (all bits or none).
  INLINE auto visible(int n, int v) const {
    const V key = splat(static_cast<Acc>(n));
    return (key >= load(lo + v * W)) & (key < load(hi + v * W));
  }
  // Whether rows [r, r + count) of the tile starting at `begin` need visible().
  INLINE bool is_partial(int64_t begin, int r, int count) const {
    return begin + r < keys.all.lo || begin + r + count > keys.all.hi;
  }
};

// kLanes neighbouring boolean mask values: 0 where true, else -inf.
template <class Acc>
INLINE Vec<Acc> load_boolean(const uint8_t* p) {
  return widen_bytes(p, Acc()) == 0 ? splat(-std::numeric_limits<Acc>::infinity()) : Vec<Acc>{};
}

// The dense mask of a batch element and a group of lanes.
template <class Acc>
class BiasReader {
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;
  using V = Vec<Acc>;
  using Bits = IntVec<Acc>;
  const MaskParams& mask_;
  const LaneMask<Acc>& lanes_;
  const int64_t step_ = mask_.bias.stride_column;
  const bool boolean_ = mask_.bias_dtype == DType::boolean;

  template <class T>
  const T* at(int64_t offset) const { return static_cast<const T*>(mask_.bias.data) + offset; }

  Acc value(int64_t offset) const {
    switch (mask_.bias_dtype) {
      case DType::float32: return bias_in_log2<Acc>(*at<float>(offset));
      case DType::float64: return bias_in_log2<Acc>(*at<double>(offset));
      case DType::float16: return bias_in_log2<Acc>(to_float(*at<Float16>(offset)));
      case DType::bfloat16: return bias_in_log2<Acc>(to_float(*at<BFloat16>(offset)));
      case DType::boolean: break;
    }
    return *at<uint8_t>(offset) ? 0 : -std::numeric_limits<Acc>::infinity();
  }
  // The values of W neighbouring keys, `count` of which exist.
  INLINE V values(int64_t offset, int64_t count) const {
    if (count >= W && step_ == 1) {
      if (boolean_) return load_boolean<Acc>(at<uint8_t>(offset));
      if constexpr (sizeof(Acc) == 4) {
        if (mask_.bias_dtype == DType::float32) return bias_in_log2<Acc>(widen(at<float>(offset)));
        if (mask_.bias_dtype == DType::float16) return bias_in_log2<Acc>(widen(at<Float16>(offset)));
        if (mask_.bias_dtype == DType::bfloat16) return bias_in_log2<Acc>(widen(at<BFloat16>(offset)));
      } else {
        if (mask_.bias_dtype == DType::float64) return bias_in_log2<Acc>(widen(at<double>(offset)));
      }
    }
    alignas(V) Acc a[W] = {};
    for (int64_t i = 0; i < W && i < count; i++) a[i] = value(offset + i * step_);
    return load(a);
  }
  // A boolean mask that is the same everywhere in the tile, by a look at eight keys at a time.
  TileClass classify_boolean(int64_t begin, int64_t count) const {
    constexpr uint64_t ones = 0x0101010101010101;
    bool all = true, any = false;
    for (int lane = 0; lane < lanes_.rows && (all || !any); lane++) {
      const uint8_t* row = at<uint8_t>(lanes_.bias_offset[lane] + begin);
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

 public:
  BiasReader(const MaskParams& mask, const LaneMask<Acc>& lanes) : mask_(mask), lanes_(lanes) {}

  // Writes the tile transposed, out[n][lane] for n in [r_begin, r_end), in units of log2; keys from kv_len on read as 0
  // (the lanes' intervals exclude them).  skip: -inf everywhere; full: 0 everywhere; nothing need be written then.
  TileClass read(Acc* out, int64_t begin, int r_begin, int r_end, int64_t kv_len) const {
    const int64_t existing = min_i64(r_end, kv_len - begin) - r_begin;
    if (boolean_ && step_ == 1) {
      const TileClass tile_class = classify_boolean(begin + r_begin, existing);
      if (tile_class != TileClass::partial) return tile_class;
    }
    // The values are the same everywhere when no bit of any two differs.
    Bits every = ~Bits{}, some = Bits{};
    if (lanes_.bias_row_is_shared) {
      for (int n = r_begin; n < r_end; n++) {
        const bool exists = n - r_begin < existing;
        const V b = splat(exists ? value(lanes_.bias_offset[0] + (begin + n) * step_) : Acc(0));
        if (exists) every &= (Bits)b, some |= (Bits)b;
        for (int v = 0; v < L; v += W) store(out + n * L + v, b);
      }
    } else {
      for (int v = 0; v < L; v += W) {
        for (int n = r_begin; n < r_end; n += W) {
          const int64_t count = existing - (n - r_begin);
          V a[W];
          UNROLL for (int lane = 0; lane < W; lane++) a[lane] = values(lanes_.bias_offset[v + lane] + (begin + n) * step_, count);
          transpose<Acc>(a);
          if (count >= W && n + W <= r_end) {
            UNROLL for (int i = 0; i < W; i++) every &= (Bits)a[i], some |= (Bits)a[i], store(out + (n + i) * L + v, a[i]);
          } else {
            for (int i = 0; i < W && n + i < r_end; i++) {
              if (i < count) every &= (Bits)a[i], some |= (Bits)a[i];
              store(out + (n + i) * L + v, a[i]);
            }
          }
        }
      }
    }
    const Bits hidden = (Bits)splat(-std::numeric_limits<Acc>::infinity());
    bool all_hidden = true, all_zero = true;
    for (int lane = 0; lane < W; lane++) {
      all_hidden &= every[lane] == hidden[lane] && some[lane] == hidden[lane];
      all_zero &= some[lane] == 0;
    }
    return all_hidden ? TileClass::skip : all_zero ? TileClass::full : TileClass::partial;
  }
};

}  // namespace
}  // namespace attn_ext::cpu
