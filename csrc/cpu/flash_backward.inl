// Flash attention backward (Dao et al. 2022, algorithm 4), queries in lanes for the scores, columns in lanes for the
// gradients.  For a block of keys (outer loop) and a few panels of queries (inner loop):
//   S^T[n][m]  = K[n][:] . Qt[:][m],    P  = 2^(S - lse)            lanes m
//   dP^T[n][m] = V[n][:] . dOt[:][m],   dS = P * (dP - D_i)         lanes m, one register block with S: P never leaves it
//   dV[n][d]  += sum_m P [n][m] * dO[m][d]                          lanes d
//   dK[n][d]  += sum_m dS[n][m] * Q [m][d]                          lanes d
//   dQ[m][d]  += sum_n dS[n][m] * K [n][d]                          lanes d
// D_i = rowsum(dO * O) - d_lse: the gradient of lse enters as a shift.  dQ and dK get the softmax scale when stored.
//
// A unit of work owns (batch, kv head, a range of keys), so dK and dV need no sharing; every range has its own partial
// dQ, and they are added in the order of the ranges.  Ranges follow from the shape of one batch element alone: its bits
// depend neither on the number of threads nor on the rest of the batch.
namespace attn_ext::cpu {
namespace {

template <class Arith, class T>
class FlashBackward {
  using Acc = typename Arith::Acc;
  using Word = typename Arith::Word;
  using V = Vec<Acc>;
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>;  // a panel: L queries, or L columns
  static constexpr int kPer = Arith::kPerWord;
  static constexpr int kPanelWords = L / kPer;                 // words along L queries
  static constexpr int kTilePanels = L < 128 ? 128 / L : 1;    // panels of queries per tile
  static constexpr int kMaxKeys = 12 * 12 * kPer;              // keys in a block: K, V, dK, dV of it stay in L2
  static constexpr int64_t kUnits = 8;                         // units of work worth having, for balance

  const BackwardParams& p;
  const AttentionShape& shape = p.shape;
  const WorkRows work{shape, L};
  const int64_t panels = div_up(work.rows, L);  // per segment
  const int64_t k_words = div_up(shape.head_dim, kPer), v_words = div_up(shape.value_dim, kPer);
  const int64_t k_panels = div_up(shape.head_dim, L), v_panels = div_up(shape.value_dim, L);
  const int64_t blocks = div_up(shape.kv_len, kMaxKeys);
  const int keys = static_cast<int>(round_up(div_up(max_i64(1, shape.kv_len), max_i64(1, blocks)), kMaxRows));  // per block
  const Acc scale_log2 = static_cast<Acc>(p.scale * kLog2E);

  struct QueryPanel {  // everything about L queries, packed once per unit
    Word *qt, *gt;     // [k_words][L], [v_words][L]: Q and dO, lanes are queries; fp32 queries carry scale * log2(e)
    Word *q, *g;       // [k_panels][kPanelWords][L], [v_panels][kPanelWords][L]: lanes are columns
    Acc* dq;           // [k_panels][L][L]
    Acc *lse, *residual, *delta;  // [L]; lse in units of log2, +inf for rows without keys: their weights become 0
    LaneMask<Acc>* mask;
    int rows;          // in use, up to a multiple of kRowQuantum
    bool is_finite;
  };
  struct KeyBlock {
    Word *k, *v;       // [keys][k_words], [keys][v_words]
    Word* k_lanes;     // [k_panels][keys / kPer][L]
    Acc *dk, *dv;      // [k_panels][keys][L], [v_panels][keys][L]
    int64_t begin;
    int rows;          // up to a multiple of kRowQuantum; the last of them may be zeros
    bool is_finite;
  };
  struct Weights {       // of one panel of queries against a block of keys
    Word *p, *ds;        // [keys][kPanelWords]
    Word* ds_pairs;      // [keys / kPer][L]; the same memory as ds with one number per word
    int begin, end;      // rows that hold weights
  };
  struct Scratch {
    QueryPanel* query;   // [panels]
    KeyBlock* block;     // [blocks] when several heads add to the same keys, else one, reused
    Weights weights[kTilePanels];
    Acc* bias;           // [keys][L]
    Word* rows;          // [L][row_words]
  };

  bool keeps_blocks() const { return work.segments > 1; }
  int64_t row_words() const { return round_up(max_i64(k_words, v_words), W); }

  Scratch take(Pieces& pieces) const {
    Scratch c;
    c.query = pieces.take<QueryPanel>(panels);
    for (int64_t i = 0; i < panels; i++) {
      QueryPanel q;
      q.qt = pieces.take<Word>(round_up(k_words, W) * L);
      q.gt = pieces.take<Word>(round_up(v_words, W) * L);
      q.q = pieces.take<Word>(k_panels * kPanelWords * L);
      q.g = pieces.take<Word>(v_panels * kPanelWords * L);
      q.dq = pieces.take<Acc>(k_panels * L * L);
      q.lse = pieces.take<Acc>(L);
      q.residual = pieces.take<Acc>(L);
      q.delta = pieces.take<Acc>(L);
      q.mask = pieces.take<LaneMask<Acc>>(1);
      if (c.query) c.query[i] = q;
    }
    const int64_t kept = keeps_blocks() ? blocks : 1;
    c.block = pieces.take<KeyBlock>(kept);
    for (int64_t i = 0; i < kept; i++) {
      KeyBlock b;
      b.k = pieces.take<Word>(keys * k_words);
      b.v = pieces.take<Word>(keys * v_words);
      b.k_lanes = pieces.take<Word>(k_panels * keys / kPer * L);
      b.dk = pieces.take<Acc>(k_panels * keys * L);
      b.dv = pieces.take<Acc>(v_panels * keys * L);
      if (c.block) c.block[i] = b;
    }
    for (Weights& w : c.weights) {
      w.p = pieces.take<Word>(keys * kPanelWords);
      w.ds = pieces.take<Word>(keys * kPanelWords);
      w.ds_pairs = kPer == 1 ? w.ds : pieces.take<Word>(keys / kPer * L);
    }
    c.bias = pieces.take<Acc>(p.mask.bias.data ? keys * L : 0);
    c.rows = pieces.take<Word>(L * row_words());
    return c;
  }

  // ---------------------------------------------------------------- S, P, dP, dS
  // R rows of keys against a panel of queries.  Masked: the bias is added, and what the mask hides weighs exactly 0,
  // whatever the hidden numbers are.
  template <int R, bool Masked>
  __attribute__((noinline)) void weigh(const KeyBlock& b, const QueryPanel& q, const Weights& w, const Acc* bias, int r) const {
    V s[R][2], dp[R][2];
    clear_block(s);
    clear_block(dp);
    const Word *k = b.k + r * k_words, *v = b.v + r * v_words;
    const int64_t both = min_i64(k_words, v_words);
    for (int64_t d = 0; d < both; d++) {  // interleaved: two independent sums hide the latency of one
      multiply_block<Arith>(s, k + d, k_words, Int<1>{}, q.qt + d * L, L, 1);
      multiply_block<Arith>(dp, v + d, v_words, Int<1>{}, q.gt + d * L, L, 1);
    }
    multiply_block<Arith>(s, k + both, k_words, Int<1>{}, q.qt + both * L, L, k_words - both);
    multiply_block<Arith>(dp, v + both, v_words, Int<1>{}, q.gt + both * L, L, v_words - both);
    UNROLL for (int i = 0; i < R; i++) {
      UNROLL for (int j = 0; j < 2; j++) {
        if constexpr (kPer != 1) s[i][j] *= scale_log2;
        V weight;
        if constexpr (Masked) {
          auto visible = q.mask->visible(r + i, j);
          if (bias) {
            const V at = load(bias + (r + i) * L + j * W);
            s[i][j] += at;
            visible &= ~(at == splat(-std::numeric_limits<Acc>::infinity()));
          }
          weight = exp2<Arith::kExp2Degree>((s[i][j] - load(q.lse + j * W)) - load(q.residual + j * W));
          weight = visible ? weight : V{};
          dp[i][j] = visible ? weight * (dp[i][j] - load(q.delta + j * W)) : V{};
        } else {
          weight = exp2<Arith::kExp2Degree>((s[i][j] - load(q.lse + j * W)) - load(q.residual + j * W));
          dp[i][j] = weight * (dp[i][j] - load(q.delta + j * W));
        }
        s[i][j] = weight;
      }
      store_weights(w.p + (r + i) * kPanelWords, s[i]);
      store_weights(w.ds + (r + i) * kPanelWords, dp[i]);
    }
    if constexpr (kPer == 2) {
      UNROLL for (int i = 0; i < R; i += 2) UNROLL for (int j = 0; j < 2; j++) {
        store(w.ds_pairs + (r + i) / 2 * L + j * W, Arith::pack(dp[i][j], dp[i + 1][j]));
      }
    }
  }
  static INLINE void store_weights(Word* row, const V (&weights)[2]) {
    if constexpr (kPer == 1) {
      store(row, weights[0]);
      store(row + W, weights[1]);
    } else {
      store(row, Arith::concatenate(weights[0], weights[1]));
    }
  }

  void weigh_panel(const KeyBlock& b, const QueryPanel& q, Weights& w, Acc* bias_tile) const {
    w.begin = w.end = 0;
    const TileClass tile_class = q.mask->keys.classify(b.begin, b.begin + b.rows);
    if (tile_class == TileClass::skip) return;
    // Whole row blocks, so that every product that reads the weights finds its rows written.
    const int begin = static_cast<int>(max_i64(0, q.mask->keys.any.lo - b.begin)) / kMaxRows * kMaxRows;
    const int end = static_cast<int>(min_i64(b.rows, round_up(q.mask->keys.any.hi - b.begin, kMaxRows)));
    TileClass bias_class = TileClass::full;
    if (p.mask.bias.data) {
      bias_class = BiasReader<Acc>(p.mask, *q.mask).read(bias_tile, b.begin, begin, end, shape.kv_len);
      if (bias_class == TileClass::skip) return;
    }
    const bool has_bias = bias_class == TileClass::partial;
    // Idle lanes are hidden only where the mask is looked at, and must be where 0 * key is not 0.
    const bool masked = has_bias || !b.is_finite;
    if (masked || tile_class == TileClass::partial) q.mask->set_tile(b.begin);
    for_row_blocks<kMaxRows / 2>(begin, end, [&](auto block, int r) {
      constexpr int R = block;
      if (masked || q.mask->is_partial(b.begin, r, R)) weigh<R, true>(b, q, w, has_bias ? bias_tile : nullptr, r);
      else weigh<R, false>(b, q, w, nullptr, r);
    });
    w.begin = begin;
    w.end = end;
  }

  // ---------------------------------------------------------------- dV, dK, dQ
  template <int R, int N>
  static INLINE void add_block(Acc* out, const V (&acc)[R][N]) {
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) {
      store(out + i * L + j * W, load(out + i * L + j * W) + acc[i][j]);
    }
  }
  // out[panel][n][d] += sum over the panels of queries, sum_m weights[n][m] * x[m][d]; x of a panel starts at rows_of(panel).
  template <int N, class RowsOf, class WeightsOf>
  __attribute__((noinline)) void add_key_gradient(Acc* out, const Scratch& c, const QueryPanel* query, int count, int begin, int end,
                                                  const RowsOf& rows_of, const WeightsOf& weights_of) const {
    // Aligned, as the rows of every panel are: a block is within a panel's rows or outside.
    for_row_blocks<kMaxRows, true>(begin, end, [&](auto block, int r) {
      constexpr int R = block;
      V acc[R][N];
      clear_block(acc);  // tile by tile: a sum of sums rounds less than one long sum
      for (int i = 0; i < count; i++) {
        const Weights& w = c.weights[i];
        if (r < w.begin || r >= w.end) continue;
        multiply_block<Arith>(acc, weights_of(w) + r * kPanelWords, Int<kPanelWords>{}, Int<1>{}, rows_of(query[i]), L,
                              query[i].rows / kPer);
      }
      add_block(out + r * L, acc);
    });
  }
  // dq[m][d] += sum_n ds[n][m] * k[n][d]
  template <int N>
  __attribute__((noinline)) void add_query_gradient(Acc* dq, int rows, const Weights& w, const Word* k_lanes) const {
    const int64_t first = w.begin / kPer, steps = (w.end - w.begin) / kPer;
    for_row_blocks<kMaxRows>(0, rows, [&](auto block, int m) {
      constexpr int R = block;
      V acc[R][N];
      clear_block(acc);
      multiply_block<Arith>(acc, w.ds_pairs + first * L + m, Int<1>{}, Int<L>{}, k_lanes + first * L, L, steps);
      add_block(dq + m * L, acc);
    });
  }
  // The same three products one weight at a time, for tiles where 0 * x is not 0: hidden numbers must not get out.  In
  // the same order too, so that with one number per word the bits of everything else stay as they are.
  void add_nonzero(const Scratch& c, KeyBlock& b, QueryPanel* query, int count) const {
    const auto at = [](const Word* words, int n, int m) { return number(words[n * kPanelWords + m / kPer], m % kPer); };
    const auto column = [](const Word* rows, int m, int64_t d) {
      return number(rows[(d / L * kPanelWords + m / kPer) * L + d % L], m % kPer);
    };
    for (int n = 0; n < b.rows; n++) {
      for (int64_t d = 0; d < v_panels * L; d++) {
        Acc sum = 0;
        for (int i = 0; i < count; i++) {
          if (n < c.weights[i].begin || n >= c.weights[i].end) continue;
          for (int m = 0; m < query[i].rows; m++) {
            const Acc weight = at(c.weights[i].p, n, m);
            if (weight != 0) sum = fma(weight, column(query[i].g, m, d), sum);
          }
        }
        b.dv[(d / L * keys + n) * L + d % L] += sum;
      }
      for (int64_t d = 0; d < k_panels * L; d++) {
        Acc sum = 0;
        for (int i = 0; i < count; i++) {
          if (n < c.weights[i].begin || n >= c.weights[i].end) continue;
          for (int m = 0; m < query[i].rows; m++) {
            const Acc ds = at(c.weights[i].ds, n, m);
            if (ds != 0) sum = fma(ds, column(query[i].q, m, d), sum);
          }
        }
        b.dk[(d / L * keys + n) * L + d % L] += sum;
      }
    }
    for (int i = 0; i < count; i++) {
      for (int m = 0; m < query[i].rows; m++) {
        for (int64_t d = 0; d < k_panels * L; d++) {
          Acc sum = 0;
          for (int n = c.weights[i].begin; n < c.weights[i].end; n++) {
            const Acc ds = at(c.weights[i].ds, n, m);
            if (ds != 0) sum = fma(ds, number(b.k_lanes[(d / L * keys + n) / kPer * L + d % L], n % kPer), sum);
          }
          query[i].dq[(d / L * L + m) * L + d % L] += sum;
        }
      }
    }
  }

  void process_tile(Scratch& c, KeyBlock& b, QueryPanel* query, int count) const {
    int begin = b.rows, end = 0;
    bool is_finite = b.is_finite;
    for (int i = 0; i < count; i++) {
      Weights& w = c.weights[i];
      weigh_panel(b, query[i], w, c.bias);
      if (w.begin == w.end) continue;
      begin = w.begin < begin ? w.begin : begin;
      end = w.end > end ? w.end : end;
      is_finite &= query[i].is_finite;
    }
    if (begin >= end) return;
    if (!is_finite) return add_nonzero(c, b, query, count);
    for (int64_t d = 0; d < v_panels; d++) {
      const auto rows_of = [&](const QueryPanel& q) { return q.g + d * kPanelWords * L; };
      const auto weights_of = [](const Weights& w) { return w.p; };
      if (shape.value_dim - d * L > W) add_key_gradient<2>(b.dv + d * keys * L, c, query, count, begin, end, rows_of, weights_of);
      else add_key_gradient<1>(b.dv + d * keys * L, c, query, count, begin, end, rows_of, weights_of);
    }
    for (int64_t d = 0; d < k_panels; d++) {
      const auto rows_of = [&](const QueryPanel& q) { return q.q + d * kPanelWords * L; };
      const auto weights_of = [](const Weights& w) { return w.ds; };
      const bool wide = shape.head_dim - d * L > W;
      if (wide) add_key_gradient<2>(b.dk + d * keys * L, c, query, count, begin, end, rows_of, weights_of);
      else add_key_gradient<1>(b.dk + d * keys * L, c, query, count, begin, end, rows_of, weights_of);
      for (int i = 0; i < count; i++) {
        if (c.weights[i].begin == c.weights[i].end) continue;
        const Word* k_lanes = b.k_lanes + d * keys / kPer * L;
        if (wide) add_query_gradient<2>(query[i].dq + d * L * L, query[i].rows, c.weights[i], k_lanes);
        else add_query_gradient<1>(query[i].dq + d * L * L, query[i].rows, c.weights[i], k_lanes);
      }
    }
  }

  // ---------------------------------------------------------------- packing and storing
  void pack_panel(Scratch& c, QueryPanel& q, int64_t batch, int64_t kv_head, int64_t segment, int64_t first, int count) const {
    // Idle lanes, and rows without keys, whose gradients may hold anything, are null: they read as zeros.
    const T *queries[L] = {}, *grads[L] = {};
    WorkRow row = work.at(kv_head, segment, first);
    for (int m = 0; m < L; m++) {
      Acc lse = -std::numeric_limits<Acc>::infinity(), residual = 0, delta = 0;
      if (m < count) {
        const int64_t at = (batch * shape.heads + row.head) * shape.query_len + row.query;
        lse = static_cast<const Acc*>(p.lse)[at];
        if (lse != -std::numeric_limits<Acc>::infinity()) {
          queries[m] = row_pointer<T>(p.query, batch, row);
          grads[m] = row_pointer<T>(p.grad_out, batch, row);
          residual = static_cast<const Acc*>(p.lse_residual)[at];
          delta = dot_rows(grads[m], row_pointer<T>(p.out, batch, row), shape.value_dim);
          if (p.grad_lse) delta -= static_cast<const Acc*>(p.grad_lse)[at];
        }
        work.advance(row);
      }
      q.lse[m] = queries[m] ? RowStatistics<Acc>::to_log2(lse) : std::numeric_limits<Acc>::infinity();
      q.residual[m] = residual;
      q.delta[m] = delta;
    }
    q.rows = static_cast<int>(round_up(count, kRowQuantum));
    q.is_finite = true;
    pack_rows(c, q, queries, shape.head_dim, q.qt, k_words, static_cast<Word>(kPer == 1 ? scale_log2 : Acc(1)), q.q);
    pack_rows(c, q, grads, shape.value_dim, q.gt, v_words, Word(1), q.g);
    for (int64_t d = 0; d < k_panels; d++) std::memset(q.dq + d * L * L, 0, q.rows * L * sizeof(Acc));
  }
  // rows -> lanes: [words][L], times factor, and panels: [columns / L][kPanelWords][L].
  void pack_rows(Scratch& c, QueryPanel& q, const T* const (&rows)[L], int64_t columns, Word* lanes, int64_t words, Word factor,
                 Word* panels_of_columns) const {
    const int64_t width = round_up(words, W);
    for (int m = 0; m < L; m++) {
      load_row(c.rows + m * width, rows[m], rows[m] ? columns : 0, width, factor);
      if (rows[m] && !row_is_finite(rows[m], columns)) q.is_finite = false;
    }
    for (int v = 0; v < 2; v++) transpose_rows(lanes + v * W, L, c.rows + v * W * width, width, width);
    for (int m = 0; m < q.rows; m += kPer) {
      for (int64_t d = 0; d < columns; d += L) {
        const T* group[kPer];
        for (int i = 0; i < kPer; i++) group[i] = rows[m + i] ? rows[m + i] + d : nullptr;
        load_word_row(panels_of_columns + (d / L * kPanelWords + m / kPer) * L, group, min_i64(L, columns - d), L);
      }
    }
  }
  static Acc dot_rows(const T* a, const T* b, int64_t count) {
    V sum{};
    int64_t i = 0;
    for (; i + W <= count; i += W) sum = fma(widen(a + i), widen(b + i), sum);
    Acc total = 0;
    for (int lane = 0; lane < W; lane++) total += sum[lane];
    for (; i < count; i++) total += Acc(to_float(a[i])) * Acc(to_float(b[i]));
    return total;
  }

  void pack_block(KeyBlock& b, int64_t batch, int64_t kv_head, int64_t begin) const {
    const int valid = static_cast<int>(min_i64(keys, shape.kv_len - begin));
    b.begin = begin;
    b.rows = static_cast<int>(round_up(valid, kRowQuantum));
    const T* k = row_pointer<T>(p.key, batch, kv_head, begin);
    const T* v = row_pointer<T>(p.value, batch, kv_head, begin);
    for (int r = 0; r < b.rows; r++) {
      load_row(b.k + r * k_words, k + r * p.key.stride_row, r < valid ? shape.head_dim : 0, k_words);
      load_row(b.v + r * v_words, v + r * p.value.stride_row, r < valid ? shape.value_dim : 0, v_words);
    }
    for (int64_t d = 0; d < k_panels; d++) {
      load_word_rows<kPer>(b.k_lanes + d * keys / kPer * L, k + d * L, p.key.stride_row, valid, b.rows,
                           min_i64(L, shape.head_dim - d * L), L);
    }
    b.is_finite = rows_are_finite(k, p.key.stride_row, valid, shape.head_dim) &&
                  rows_are_finite(v, p.value.stride_row, valid, shape.value_dim);
    for (int64_t d = 0; d < k_panels; d++) std::memset(b.dk + d * keys * L, 0, b.rows * L * sizeof(Acc));
    for (int64_t d = 0; d < v_panels; d++) std::memset(b.dv + d * keys * L, 0, b.rows * L * sizeof(Acc));
  }
  void store_block(const KeyBlock& b, int64_t batch, int64_t kv_head) const {
    const int64_t valid = min_i64(keys, shape.kv_len - b.begin);
    for (int64_t r = 0; r < valid; r++) {
      T* dk = row_pointer<T>(p.grad_key, batch, kv_head, b.begin + r);
      T* dv = row_pointer<T>(p.grad_value, batch, kv_head, b.begin + r);
      store_panel_row(dk, b.dk + r * L, keys, shape.head_dim, static_cast<Acc>(p.scale));
      store_panel_row(dv, b.dv + r * L, keys, shape.value_dim, Acc(1));
    }
  }
  template <class Out>
  static void store_panel_row(Out* out, const Acc* row, int64_t panel_rows, int64_t columns, Acc factor) {
    for (int64_t d = 0; d < columns; d += L) store_row(out + d, row + d * panel_rows, min_i64(L, columns - d), factor);
  }

  // ---------------------------------------------------------------- units of work
  struct Range {
    int64_t begin, end;
  };

  int64_t range_count() const {
    return max_i64(1, min_i64(div_up(kUnits, shape.kv_heads), blocks / 4));
  }
  // Boundaries of equal work: a block of keys costs the queries that see it.
  void split(Range* ranges, int64_t count) const {
    const auto cost = [&](int64_t block) {
      const int64_t begin = block * keys, end = min_i64(begin + keys, shape.kv_len);
      int64_t first = 0, last = shape.query_len;
      if (p.mask.band_upper < shape.kv_len) first = max_i64(0, begin - max_i64(p.mask.band_upper, -shape.query_len));
      if (p.mask.band_lower > -shape.query_len) last = min_i64(last, end - min_i64(p.mask.band_lower, shape.kv_len));
      return last > first ? last - first : 0;
    };
    const int64_t block_count = div_up(shape.kv_len, keys);
    int64_t total = 0, done = 0, block = 0;
    for (int64_t i = 0; i < block_count; i++) total += cost(i);
    for (int64_t i = 0; i < count; i++) {
      ranges[i].begin = min_i64(block * keys, shape.kv_len);
      while (block < block_count && (i == count - 1 || done * count < total * (i + 1))) done += cost(block++);
      ranges[i].end = min_i64(block * keys, shape.kv_len);
    }
  }
  static bool sees(const TileKeys& keys, const Range& range) {
    return !keys.any.empty() && keys.any.lo < range.end && keys.any.hi > range.begin;
  }

  // dq_partial: [heads][query_len][head_dim] of this range, or null: dQ is complete and goes to the output.
  void run_unit(Scratch& c, int64_t batch, int64_t kv_head, const Range& range, Acc* dq_partial) const {
    for (int64_t segment = 0; segment < work.segments; segment++) {
      bool any_query = false;
      for (int64_t i = 0; i < panels; i++) {
        const int64_t first = i * L;
        const int count = static_cast<int>(min_i64(L, work.rows - first));
        c.query[i].mask->set_rows(p.mask, shape, work, batch, kv_head, segment, first, count);
        if (dq_partial && !sees(c.query[i].mask->keys, range)) continue;
        pack_panel(c, c.query[i], batch, kv_head, segment, first, count);
        any_query = true;
      }
      for (int64_t begin = range.begin; begin < range.end; begin += keys) {
        KeyBlock& b = c.block[keeps_blocks() ? (begin - range.begin) / keys : 0];
        if (segment == 0) pack_block(b, batch, kv_head, begin);
        for (int64_t i = 0; any_query && i < panels; i += kTilePanels) {
          process_tile(c, b, c.query + i, static_cast<int>(min_i64(kTilePanels, panels - i)));
        }
        if (segment == work.segments - 1) store_block(b, batch, kv_head);
      }
      for (int64_t i = 0; i < panels; i++) {
        if (dq_partial && !sees(c.query[i].mask->keys, range)) continue;
        const int64_t first = i * L, count = min_i64(L, work.rows - first);
        WorkRow row = work.at(kv_head, segment, first);
        for (int64_t m = 0; m < count; m++, work.advance(row)) {
          if (dq_partial) {
            const int64_t at = (batch * shape.heads + row.head) * shape.query_len + row.query;
            store_panel_row(dq_partial + at * shape.head_dim, c.query[i].dq + m * L, L, shape.head_dim, Acc(1));
          } else {
            store_panel_row(row_pointer<T>(p.grad_query, batch, row), c.query[i].dq + m * L, L, shape.head_dim,
                            static_cast<Acc>(p.scale));
          }
        }
      }
    }
  }

  // dQ of a panel, from the partial sums of the ranges that saw its panel, in their order.
  void sum_partials(const Acc* partials, const Range* ranges, int64_t count, int64_t batch, int64_t kv_head, int64_t segment,
                    int64_t panel) const {
    LaneMask<Acc> mask;
    const int64_t first = panel * L, rows = min_i64(L, work.rows - first);
    mask.set_rows(p.mask, shape, work, batch, kv_head, segment, first, static_cast<int>(rows));
    const int64_t size = shape.batch * shape.heads * shape.query_len * shape.head_dim;
    WorkRow at = work.at(kv_head, segment, first);
    for (int64_t m = 0; m < rows; m++, work.advance(at)) {
      const Acc* row = partials + ((batch * shape.heads + at.head) * shape.query_len + at.query) * shape.head_dim;
      T* out = row_pointer<T>(p.grad_query, batch, at);
      for (int64_t d = 0; d < shape.head_dim; d += L) {
        Acc sum[L] = {};
        const int64_t n = min_i64(L, shape.head_dim - d);
        for (int64_t r = 0; r < count; r++) {
          if (!sees(mask.keys, ranges[r])) continue;
          for (int64_t i = 0; i < n; i++) sum[i] += row[r * size + d + i];
        }
        store_row(out + d, sum, n, static_cast<Acc>(p.scale));
      }
    }
  }

  void store_zeros() const {  // keys and values that no query head reads
    for (int64_t row = 0; row < shape.batch * shape.kv_heads * shape.kv_len; row++) {
      const int64_t head = row / shape.kv_len, batch = head / shape.kv_heads;
      std::memset(row_pointer<T>(p.grad_key, batch, head % shape.kv_heads, row % shape.kv_len), 0, shape.head_dim * sizeof(T));
      std::memset(row_pointer<T>(p.grad_value, batch, head % shape.kv_heads, row % shape.kv_len), 0, shape.value_dim * sizeof(T));
    }
  }

 public:
  explicit FlashBackward(const BackwardParams& params) : p(params) {}

  void run(const Executor& executor) const {
    const int64_t heads = shape.batch * shape.kv_heads;
    if (heads == 0) return;
    if (shape.heads == 0) return store_zeros();
    const int64_t range_total = range_count(), units = heads * range_total;
    Range ranges[kUnits];
    split(ranges, range_total);
    const double products = 2.5 * static_cast<double>(shape.batch) * shape.heads * shape.query_len * shape.kv_len *
                            (shape.head_dim + shape.value_dim);
    const int threads = useful_threads(executor, products, units);

    Pieces measure(nullptr);
    take(measure);
    const size_t per_thread = measure.used();
    const int64_t dq_size = shape.batch * shape.heads * shape.query_len * shape.head_dim;
    Pieces partial_measure(nullptr);
    if (range_total > 1) partial_measure.take<Acc>(range_total * dq_size);
    const Workspace workspace(per_thread * threads + partial_measure.used());
    Acc* const partials = range_total > 1 ? reinterpret_cast<Acc*>(workspace.data() + per_thread * threads) : nullptr;

    parallel_tasks(executor, threads, units, [&](int thread, int64_t unit) {
      const int64_t head = unit / range_total, range = unit % range_total;
      Pieces pieces(workspace.data() + per_thread * thread);
      Scratch c = take(pieces);
      run_unit(c, head / shape.kv_heads, head % shape.kv_heads, ranges[range], partials ? partials + range * dq_size : nullptr);
    });
    if (!partials) return;
    const int64_t panels_per_head = work.segments * panels;
    parallel_tasks(executor, threads, heads * panels_per_head, [&](int, int64_t task) {
      const int64_t head = task / panels_per_head, panel = task % panels_per_head;
      sum_partials(partials, ranges, range_total, head / shape.kv_heads, head % shape.kv_heads, panel / panels, panel % panels);
    });
  }
};

template <class Arith, class T>
void flash_backward(const BackwardParams& params, const Executor& executor) {
  FlashBackward<Arith, T>(params).run(executor);
}

}  // namespace
}  // namespace attn_ext::cpu
