// The gradient of a bias: dS, summed over the batch elements, heads, queries or keys that share an element.
namespace attn_ext::cpu {
namespace {

template <class Acc>
struct BiasGradient {
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;
  using V = Vec<Acc>;

  const TensorView& view;  // a stride is 0 where elements are shared
  // Every tile has rows and columns of its own, so that it can be cleared when it is first added to: it is then in the
  // cache for the sum.  Not so where lanes of several panels share a row.
  const bool clears_tiles;

  BiasGradient(const TensorView& view, const WorkRows& work)
      : view(view), clears_tiles(view.stride_row != 0 && view.stride_column != 0 &&
                                 (work.segments == work.group || view.stride_head != 0)) {}

  void set_rows(int64_t* rows, const LaneMask<Acc>& lanes) const {
    for (int lane = 0; lane < lanes.rows; lane++) {
      const WorkRow at = lanes.lane_row[lane];
      rows[lane] = lanes.batch * view.stride_batch + at.head * view.stride_head + at.query * view.stride_row;
    }
  }
  // The keys [first, first + count) of these rows.
  static void clear(Acc* grad, const int64_t* rows, int lanes, int64_t first, int64_t count) {
    for (int lane = 0; lane < lanes; lane++) std::memset(grad + rows[lane] + first, 0, count * sizeof(Acc));
  }
  // Adds dS^T[n][lane] of the keys [begin, end) of the block that starts at key `first`.
  __attribute__((noinline)) void add(Acc* grad, const Acc* ds, const int64_t* rows, int lanes, int64_t first, int begin,
                                     int end) const {
    bool shared = true;
    for (int lane = 1; lane < lanes; lane++) shared &= rows[lane] == rows[0];
    if (view.stride_column == 0) {  // the same for all keys
      V sum[2] = {};
      for (int n = begin; n < end; n++) {
        UNROLL for (int j = 0; j < 2; j++) sum[j] += load(ds + n * L + j * W);
      }
      for (int lane = 0; lane < lanes; lane++) grad[rows[lane]] += sum[lane / W][lane % W];
    } else if (shared) {  // the same for all queries
      for (int n = begin; n < end; n++) {
        const V both = load(ds + n * L) + load(ds + n * L + W);
        Acc sum = 0;
        for (int i = 0; i < W; i++) sum += both[i];
        grad[rows[0] + first + n] += sum;
      }
    } else {
      for (int v = 0; v < lanes; v += W) {
        int n = begin;
        for (; n + W <= end; n += W) {
          V a[W];
          UNROLL for (int i = 0; i < W; i++) a[i] = load(ds + (n + i) * L + v);
          transpose<Acc>(a);
          UNROLL for (int i = 0; i < W; i++) {
            if (v + i >= lanes) continue;
            Acc* const at = grad + rows[v + i] + first + n;
            store(at, load(at) + a[i]);
          }
        }
        for (; n < end; n++) {
          for (int i = 0; i < W && v + i < lanes; i++) grad[rows[v + i] + first + n] += ds[n * L + v + i];
        }
      }
    }
  }
};

}  // namespace
}  // namespace attn_ext::cpu
