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
      } else {  // idle lanes repeat the last row
        lane_keys[lane] = lane_keys[count - 1];
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

// The additive mask of a tile in units of log2, transposed: out[n][lane] for n in [r_begin, r_end).  Keys from kv_len
// on get 0 (the lanes' intervals exclude them).  Returns false when -inf removes every key for every lane.
template <class Acc>
bool load_bias_tile(Acc* out, const MaskParams& mask, const LaneMask<Acc>& lanes, int64_t begin, int r_begin, int r_end,
                    int64_t kv_len) {
  constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;
  using V = Vec<Acc>;
  const int64_t step = mask.bias.stride_column;
  const auto value = [&](int64_t offset) -> double {
    switch (mask.bias_dtype) {
      case DType::float32: return static_cast<const float*>(mask.bias.data)[offset];
      case DType::float64: return static_cast<const double*>(mask.bias.data)[offset];
      case DType::float16: return to_float(static_cast<const Float16*>(mask.bias.data)[offset]);
      case DType::bfloat16: return to_float(static_cast<const BFloat16*>(mask.bias.data)[offset]);
      case DType::boolean: break;
    }
    return static_cast<const uint8_t*>(mask.bias.data)[offset] ? 0 : -std::numeric_limits<double>::infinity();
  };
  // The values of W neighbouring keys, `count` of which exist.
  const auto values = [&](int64_t offset, int64_t count) -> V {
    if (count == W && step == 1 && mask.bias_dtype != DType::boolean) {
      if constexpr (sizeof(Acc) == 4) {
        switch (mask.bias_dtype) {
          case DType::float32: return bias_in_log2<Acc>(widen(static_cast<const float*>(mask.bias.data) + offset));
          case DType::float16: return bias_in_log2<Acc>(widen(static_cast<const Float16*>(mask.bias.data) + offset));
          case DType::bfloat16: return bias_in_log2<Acc>(widen(static_cast<const BFloat16*>(mask.bias.data) + offset));
          default: break;
        }
      } else if (mask.bias_dtype == DType::float64) {
        return bias_in_log2<Acc>(widen(static_cast<const double*>(mask.bias.data) + offset));
      }
    }
    alignas(V) Acc a[W] = {};
    if (mask.bias_dtype == DType::boolean) {
      const uint8_t* p = static_cast<const uint8_t*>(mask.bias.data) + offset;
      for (int i = 0; i < count; i++) a[i] = p[i * step] ? 0 : -std::numeric_limits<Acc>::infinity();
    } else {
      for (int i = 0; i < count; i++) a[i] = bias_in_log2<Acc>(value(offset + i * step));
    }
    return load(a);
  };
  const V minus_infinity = splat(-std::numeric_limits<Acc>::infinity());
  V highest = minus_infinity;
  if (lanes.bias_row_is_shared) {
    for (int n = r_begin; n < r_end; n++) {
      const bool exists = begin + n < kv_len;
      const V b = splat(exists ? bias_in_log2<Acc>(value(lanes.bias_offset[0] + (begin + n) * step)) : Acc(0));
      if (exists) highest = max(b, highest);
      for (int v = 0; v < L; v += W) store(out + n * L + v, b);
    }
  } else {
    for (int v = 0; v < L && v < lanes.rows; v += W) {
      for (int n = r_begin; n < r_end; n += W) {
        const int64_t count = min_i64(W, min_i64(r_end - n, kv_len - begin - n));
        V a[W];
        for (int lane = 0; lane < W; lane++) {
          a[lane] = count > 0 ? values(lanes.bias_offset[v + lane] + (begin + n) * step, count) : V{};
        }
        transpose<Acc>(a);
        for (int i = 0; i < W && n + i < r_end; i++) {
          if (i < count) highest = max(a[i], highest);
          store(out + (n + i) * L + v, a[i]);
        }
      }
    }
  }
  // NaN counts as visible: it has to reach the output.
  const auto hidden = highest == minus_infinity;
  for (int lane = 0; lane < W; lane++) {
    if (!hidden[lane]) return true;
  }
  return false;
}

}  // namespace
}  // namespace attn_ext::cpu
