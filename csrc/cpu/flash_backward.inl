// Flash attention backward (Dao et al. 2022, algorithm 4), queries in lanes for the scores, columns in lanes for the
// gradients.  For a block of keys (outer loop) and a few panels of queries (inner loop):
//   S^T[n][m]  = K[n][:] . Qt[:][m],    P  = 2^(S - lse)            lanes m
//   dP^T[n][m] = V[n][:] . dOt[:][m],   dS = P * (dP - D_i)         lanes m, one register block with S: P never leaves it
//   dV[n][d]  += sum_m P [n][m] * dO[m][d]                          lanes d
//   dK[n][d]  += sum_m dS[n][m] * Q [m][d]                          lanes d
//   dQ[m][d]  += sum_n dS[n][m] * K [n][d]                          lanes d
// D_i = rowsum(dO * O) - d_lse: the gradient of lse enters as a shift.  dQ and dK get the softmax scale when stored.
// dS is the gradient of the bias; a softcap puts its derivative between it and dK, dQ.
//
// A unit of work owns (batch, kv head, a range of keys), so dK and dV need no sharing; every range has its own partial
// dQ, and they are added in the order of the ranges.  Where a bias that wants a gradient is the same for several heads or
// batch elements, a unit owns all of these, so that the gradient needs no sharing either.  Ranges follow from the shape
// of one batch element alone: its bits depend neither on the number of threads nor on the rest of the batch.
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
  static constexpr int kTilePanels = L < 128 ? 128 / L : 1;    // panels of queries per tile, at most
  static constexpr int kMaxKeys = 12 * 12 * kPer;              // keys in a block: K, V, dK, dV of it stay in L2
  static constexpr int64_t kUnits = 8;                         // units of work worth having, for balance

  const BackwardParams& p;
  const AttentionShape& shape = p.shape;
  const WorkRows work{shape, L};
  const int64_t panels = div_up(work.rows, L);  // per segment
  const int64_t k_words = div_up(shape.head_dim, kPer), v_words = div_up(shape.value_dim, kPer);
  const int64_t k_panels = div_up(shape.head_dim, L), v_panels = div_up(shape.value_dim, L);
  const int keys = static_cast<int>(keys_per_tile(shape.kv_len, p.mask.blocks, kMaxKeys));  // per block
  const int64_t blocks = div_up(shape.kv_len, keys);
  const int tile_panels = panels_per_tile();
  const int64_t tiles = div_up(panels, tile_panels);
  const Acc scale_log2 = static_cast<Acc>(p.score.scale * kLog2E);

  const bool has_terms = ScoreTerms<Acc>::any(p);
  const BiasGradient<Acc> bias_gradient{p.grad_bias, work};
  const Acc softcap_log2 = static_cast<Acc>(p.score.softcap * kLog2E);
  const Acc inverse_keep = static_cast<Acc>(p.dropout.inverse_keep);

  struct QueryPanel {  // everything about L queries, packed once per unit
    Word *qt, *gt;     // [k_words][L], [v_words][L]: Q and dO, lanes are queries; fp32 queries carry scale * log2(e)
    Word *q, *g;       // [k_panels][kPanelWords][L], [v_panels][kPanelWords][L]: lanes are columns
    Acc* dq;           // [k_panels][L][L]
    Acc *lse, *residual, *delta;  // [L]; lse in units of log2, +inf for rows without keys: their weights become 0
    LaneMask<Acc>* mask;
    int64_t* bias_row; // [L]: offsets of the lanes' rows in the gradient of the bias
    int rows = 0;      // in use, up to a multiple of kRowQuantum
    bool is_finite = true;
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
    int64_t* next_key;   // [tiles]: the first key, from the block at work on, that a query of the tile may see
    Weights weights[kTilePanels];
    LaneBits *seen, *seen_by_any;  // [kTilePanels][keys], [keys]: by the panels of a tile, where blocks are listed
    Acc* terms;          // [keys][L]: what is added to the scores
    Acc* ds;             // [keys][L]: dS of one panel, for the gradient of the bias; the same memory
    IntVec<Acc>* kept;   // [keys][L / W]: the weights that dropout keeps
    Acc* grad_bias;      // null, or where the unit adds to the gradient of the bias
    bool clears_bias;    // a tile of it is set to 0 before it is added to
    Word* rows;          // [L][row_words]
  };

  // The panels of a tile meet the same keys: they are to share a list of blocks.
  int panels_per_tile() const {
    const int in_block = p.mask.blocks.query_block / L;
    if (!p.mask.blocks.offsets || in_block * L != p.mask.blocks.query_block) return kTilePanels;
    int count = kTilePanels;
    while (in_block % count) count--;
    return count;
  }
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
      q.bias_row = pieces.take<int64_t>(p.grad_bias.data ? L : 0);
      if (c.query) c.query[i] = q;
    }
    c.next_key = pieces.take<int64_t>(tiles);
    c.seen = pieces.take<LaneBits>(p.mask.blocks.offsets ? kTilePanels * keys : 0);
    c.seen_by_any = pieces.take<LaneBits>(p.mask.blocks.offsets ? keys : 0);
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
    c.grad_bias = nullptr;
    c.terms = c.ds = pieces.take<Acc>(has_terms ? keys * L : 0);
    c.kept = pieces.take<IntVec<Acc>>(p.dropout.enabled() ? keys * (L / W) : 0);
    c.rows = pieces.take<Word>(L * row_words());
    return c;
  }

  // ---------------------------------------------------------------- S, P, dP, dS
  // What a panel and a block of keys have beside their products; null where there is nothing of it.
  struct Extras {
    const Acc* terms = nullptr;
    const IntVec<Acc>* kept = nullptr;
    Acc* ds = nullptr;
    bool any() const { return terms || kept || ds; }
  };
  // R rows of keys against a panel of queries.  General: whatever there is beside the products; what the mask hides then
  // weighs exactly 0, whatever the hidden numbers are.
  template <int R, bool General>
  __attribute__((noinline)) void weigh(const KeyBlock& b, const QueryPanel& q, const Weights& w, const Extras& extras, int r) const {
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
        if constexpr (General) weigh_general(q, extras, r + i, j, s[i][j], dp[i][j]);
        else {
          s[i][j] = exp2<Arith::kExp2Degree>((s[i][j] - load(q.lse + j * W)) - load(q.residual + j * W));
          dp[i][j] = s[i][j] * (dp[i][j] - load(q.delta + j * W));
        }
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
  // Of key n and vector j of queries: score -> weight as dV wants it, dP -> dS as dK and dQ want it.
  INLINE void weigh_general(const QueryPanel& q, const Extras& extras, int n, int j, V& s, V& dp) const {
    V slope{};  // of the softcap, less 1
    if (softcap_log2 > 0) {
      const V t = tanh<Acc>(s * (1 / softcap_log2));
      s = t * softcap_log2;
      slope = -t * t;
    }
    auto visible = q.mask->visible(n, j);
    if (extras.terms) {
      const V term = load(extras.terms + n * L + j * W);
      s += term;
      visible &= ~(term == splat(-std::numeric_limits<Acc>::infinity()));
    }
    V weight = exp2<Arith::kExp2Degree>((s - load(q.lse + j * W)) - load(q.residual + j * W));
    weight = visible ? weight : V{};
    s = weight;
    if (extras.kept) {
      const IntVec<Acc> kept = extras.kept[n * (L / W) + j];
      dp = kept ? dp * inverse_keep : V{};
      s = kept ? weight : V{};
    }
    dp = visible ? weight * (dp - load(q.delta + j * W)) : V{};
    if (extras.ds) store(extras.ds + n * L + j * W, dp);
    if (softcap_log2 > 0) dp = visible ? fma(dp, slope, dp) : V{};
  }
  static INLINE void store_weights(Word* row, const V (&weights)[2]) {
    if constexpr (kPer == 1) {
      store(row, weights[0]);
      store(row + W, weights[1]);
    } else {
      store(row, Arith::concatenate(weights[0], weights[1]));
    }
  }

  void weigh_panel(Scratch& c, const KeyBlock& b, const QueryPanel& q, Weights& w) const {
    w.begin = w.end = 0;
    // Whole row blocks, so that every product that reads the weights finds its rows written.
    const TileRows rows = q.mask->rows_in(b.begin, b.rows, kMaxRows, kMaxRows);
    if (rows.empty()) return;
    Extras extras;
    if (has_terms) {
      const TileClass terms_class = ScoreTerms<Acc>(p, *q.mask, c.terms, b.begin, rows).read();
      if (terms_class == TileClass::skip) return;
      if (terms_class == TileClass::partial) extras.terms = c.terms;
    }
    if (p.dropout.enabled()) {
      for_kept_pairs<Acc>(p.dropout, *q.mask, b.begin, rows.begin, rows.end, [&](int n, int v, auto low, auto high) {
        c.kept[n * (L / W) + v] = (IntVec<Acc>)low;
        c.kept[(n + 1) * (L / W) + v] = (IntVec<Acc>)high;
      });
      extras.kept = c.kept;
    }
    if (c.grad_bias) extras.ds = c.ds;
    // Idle lanes are hidden only where the mask is looked at, and must be where 0 * key is not 0.
    const bool general = extras.any() || softcap_log2 > 0 || !b.is_finite;
    if (general || rows.partial()) q.mask->set_tile(b.begin);
    for_row_blocks<kMaxRows / 2>(rows.begin, rows.end, [&](auto block, int r) {
      constexpr int R = block;
      if (general || q.mask->must_look(rows, r, R)) weigh<R, true>(b, q, w, extras, r);
      else weigh<R, false>(b, q, w, extras, r);
    });
    w.begin = rows.begin;
    w.end = rows.end;
    if (c.grad_bias) {
      bias_gradient.add(c.grad_bias, c.ds, q.bias_row, q.mask->rows, b.begin, rows.begin,
                        static_cast<int>(min_i64(rows.end, shape.kv_len - b.begin)));
    }
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
  void add_nonzero(const Scratch& c, const KeyBlock& b, QueryPanel* query, int count) const {
    const auto at = [](const Word* words, int n, int m) { return number(words[n * kPanelWords + m / kPer], m % kPer); };
    const auto column = [](const Word* rows, int m, int64_t d) {
      return number(rows[(d / L * kPanelWords + m / kPer) * L + d % L], m % kPer);
    };
    const auto add_rows = [&](Acc* out, int64_t columns, Word* QueryPanel::*rows, Word* Weights::*weights) {
      for (int n = 0; n < b.rows; n++) {
        for (int64_t d = 0; d < columns; d++) {
          Acc sum = 0;
          for (int i = 0; i < count; i++) {
            if (n < c.weights[i].begin || n >= c.weights[i].end) continue;
            for (int m = 0; m < query[i].rows; m++) {
              const Acc weight = at(c.weights[i].*weights, n, m);
              if (weight != 0) sum = fma(weight, column(query[i].*rows, m, d), sum);
            }
          }
          out[(d / L * keys + n) * L + d % L] += sum;
        }
      }
    };
    add_rows(b.dv, v_panels * L, &QueryPanel::g, &Weights::p);
    add_rows(b.dk, k_panels * L, &QueryPanel::q, &Weights::ds);
    for (int i = 0; i < count; i++) {
      if (c.weights[i].begin == c.weights[i].end) continue;  // and such a panel need not have been packed
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

  // A tile of panels and a block of keys; where blocks are listed, the runs of keys that some panel sees one by one.
  void meet(Scratch& c, const KeyBlock& b, QueryPanel* query, int count) const {
    for (int i = 0; c.clears_bias && i < count; i++) {
      bias_gradient.clear(c.grad_bias, query[i].bias_row, query[i].mask->rows, b.begin, min_i64(keys, shape.kv_len - b.begin));
    }
    if (!p.mask.blocks.offsets) return meet_rows(c, b, query, count);
    const auto meet_stretch = [&](int first, int last, bool full) {
      for (int i = 0; i < count; i++) query[i].mask->seen = nullptr;
      if (full) return meet_rows(c, rows_of(b, first, last), query, count);
      std::memset(c.seen_by_any, 0, (last - first) * sizeof(LaneBits));
      for (int i = 0; i < count; i++) {
        LaneBits* const seen = c.seen + i * keys;
        query[i].mask->blocks.read(seen, b.begin + first, last - first);
        for (int n = 0; n < last - first; n++) c.seen_by_any[n] |= seen[n];
      }
      for_runs(c.seen_by_any, last - first, [&](int begin, int end) {
        for (int i = 0; i < count; i++) query[i].mask->seen = c.seen + i * keys + begin;
        meet_rows(c, rows_of(b, first + begin, first + end), query, count);
      });
    };
    bool share = true;
    for (int i = 0; i < count; i++) share &= query[0].mask->blocks.shares_list(query[i].mask->blocks);
    if (share) query[0].mask->blocks.for_stretches(b.begin, b.rows, meet_stretch);
    else meet_stretch(0, b.rows, false);
  }
  // The rows [first, last) of a block; multiples of kRowQuantum.
  KeyBlock rows_of(KeyBlock b, int first, int last) const {
    b.k += first * k_words, b.v += first * v_words, b.k_lanes += first / kPer * L;
    b.dk += first * L, b.dv += first * L;
    b.begin += first;
    b.rows = last - first;
    return b;
  }
  __attribute__((noinline)) void meet_rows(Scratch& c, const KeyBlock& b, QueryPanel* query, int count) const {
    int begin = b.rows, end = 0;
    bool is_finite = b.is_finite;
    for (int i = 0; i < count; i++) {
      Weights& w = c.weights[i];
      weigh_panel(c, b, query[i], w);
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
          delta = row_delta(batch, row, at);
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
      store_panel_row(dk, b.dk + r * L, keys, shape.head_dim, static_cast<Acc>(p.score.scale));
      store_panel_row(dv, b.dv + r * L, keys, shape.value_dim, inverse_keep);
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

  // A unit owns a range of keys of this many batch elements and kv heads.
  const int64_t unit_batches = p.grad_bias.data && p.grad_bias.stride_batch == 0 ? max_i64(1, shape.batch) : 1;
  const int64_t unit_heads = p.grad_bias.data && p.grad_bias.stride_head == 0 ? max_i64(1, shape.kv_heads) : 1;

  int64_t range_count() const {
    // Ranges cost memory, a sum, and packing the queries once more: a few blocks each.  With a gradient of the bias they
    // may be all there is to run in parallel.
    const int64_t most = p.grad_bias.data && blocks > 1 ? max_i64(2, blocks / 4) : blocks / 4;
    return max_i64(1, min_i64(div_up(kUnits, div_up(shape.kv_heads, unit_heads)), most));
  }
  // How many queries see each block of keys, or about: costs[blocks].
  void count_queries(int64_t batch, int64_t* costs) const {
    const MaskParams::BlockLists& lists = p.mask.blocks;
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t begin = block * keys, end = min_i64(begin + keys, shape.kv_len);
      int64_t first = 0, last = shape.query_len;
      if (p.mask.band_upper < shape.kv_len) first = max_i64(0, begin - max_i64(p.mask.band_upper, -shape.query_len));
      if (p.mask.band_lower > -shape.query_len) last = min_i64(last, end - min_i64(p.mask.band_lower, shape.kv_len));
      costs[block] = lists.offsets ? 0 : max_i64(0, last - first);
    }
    for (int64_t head = 0; lists.offsets && head < (lists.stride_head ? shape.heads : 1); head++) {
      const int64_t first = lists.row(batch, head, 0)[0], count = listed_blocks(lists, batch, head, 0, shape.query_len);
      for (int64_t i = first; i < first + count; i++) {
        const int64_t begin = int64_t(lists.indices[i]) * lists.kv_block, end = min_i64(begin + lists.kv_block, shape.kv_len);
        for (int64_t block = begin / keys; block * keys < end; block++) costs[block] += lists.query_block;
      }
    }
  }
  // Boundaries of equal work.
  void split(const int64_t* costs, Range* ranges, int64_t count) const {
    int64_t total = 0, done = 0, block = 0;
    for (int64_t i = 0; i < blocks; i++) total += costs[i];
    for (int64_t i = 0; i < count; i++) {
      ranges[i].begin = min_i64(block * keys, shape.kv_len);
      while (block < blocks && (i == count - 1 || done * count < total * (i + 1))) done += costs[block++];
      ranges[i].end = min_i64(block * keys, shape.kv_len);
    }
  }
  // dq_partial: [heads][query_len][head_dim] of this range, or null: dQ is complete and goes to the output.
  // first_of_unit: nothing has been added to this unit's part of the gradient of the bias by an earlier batch element or
  // head that shares it.
  void run_unit(Scratch& c, int64_t batch, int64_t kv_head, bool first_of_unit, const Range& range, Acc* dq_partial) const {
    for (int64_t segment = 0; segment < work.segments; segment++) {
      c.clears_bias = c.grad_bias && bias_gradient.clears_tiles && first_of_unit && (segment == 0 || p.grad_bias.stride_head != 0);
      for (int64_t i = 0; i < panels; i++) {
        const int64_t first = i * L;
        const int count = static_cast<int>(min_i64(L, work.rows - first));
        QueryPanel& q = c.query[i];
        q.mask->set_rows(p.mask, shape, work, batch, kv_head, segment, first, count);
        if (c.grad_bias) bias_gradient.set_rows(q.bias_row, *q.mask);
        if (dq_partial && !q.mask->sees(range.begin, range.end)) continue;
        pack_panel(c, q, batch, kv_head, segment, first, count);
      }
      const auto panels_of = [&](int64_t tile) { return static_cast<int>(min_i64(tile_panels, panels - tile * tile_panels)); };
      const auto next_key = [&](int64_t tile, int64_t from) {
        if (c.clears_bias) return from;
        int64_t key = kNoKey;
        for (int i = 0; i < panels_of(tile); i++) key = min_i64(key, c.query[tile * tile_panels + i].mask->next(from));
        return key;
      };
      for (int64_t tile = 0; tile < tiles; tile++) c.next_key[tile] = next_key(tile, range.begin);
      for (int64_t begin = range.begin; begin < range.end; begin += keys) {
        KeyBlock& b = c.block[keeps_blocks() ? (begin - range.begin) / keys : 0];
        if (segment == 0) pack_block(b, batch, kv_head, begin);
        for (int64_t tile = 0; tile < tiles; tile++) {
          if (c.next_key[tile] >= begin + keys) continue;
          meet(c, b, c.query + tile * tile_panels, panels_of(tile));
          c.next_key[tile] = next_key(tile, begin + keys);
        }
        if (segment == work.segments - 1) store_block(b, batch, kv_head);
      }
      for (int64_t i = 0; i < panels; i++) {
        if (dq_partial && !c.query[i].mask->sees(range.begin, range.end)) continue;
        const int64_t first = i * L, count = min_i64(L, work.rows - first);
        WorkRow row = work.at(kv_head, segment, first);
        for (int64_t m = 0; m < count; m++, work.advance(row)) {
          if (dq_partial) {
            const int64_t at = (batch * shape.heads + row.head) * shape.query_len + row.query;
            store_panel_row(dq_partial + at * shape.head_dim, c.query[i].dq + m * L, L, shape.head_dim, Acc(1));
          } else {
            store_panel_row(row_pointer<T>(p.grad_query, batch, row), c.query[i].dq + m * L, L, shape.head_dim,
                            static_cast<Acc>(p.score.scale));
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
          if (!mask.sees(ranges[r].begin, ranges[r].end)) continue;
          for (int64_t i = 0; i < n; i++) sum[i] += row[r * size + d + i];
        }
        store_row(out + d, sum, n, static_cast<Acc>(p.score.scale));
      }
    }
  }

  // A sink is a score whose value is 0: dS = P * (0 - D_i).
  double sink_gradient(int64_t head) const {
    const Acc sink = bias_in_log2<Acc>(p.score.sinks[head]);
    double sum = 0;
    for (int64_t batch = 0; batch < shape.batch; batch++) {
      for (int64_t i = 0; i < shape.query_len; i++) {
        const int64_t at = (batch * shape.heads + head) * shape.query_len + i;
        const Acc lse = static_cast<const Acc*>(p.lse)[at];
        if (lse == -std::numeric_limits<Acc>::infinity()) continue;
        const Acc weight = std::exp2((sink - RowStatistics<Acc>::to_log2(lse)) - static_cast<const Acc*>(p.lse_residual)[at]);
        if (weight == 0) continue;
        // A row that sees no key has out 0, and is not to feel its incoming gradient, which may be NaN.
        const T* out = row_pointer<T>(p.out, batch, WorkRow{head, i});
        bool is_zero = true;
        for (int64_t d = 0; d < shape.value_dim && is_zero; d++) is_zero = to_float(out[d]) == 0;
        const Acc delta = is_zero ? -(p.grad_lse ? static_cast<const Acc*>(p.grad_lse)[at] : Acc(0)) : row_delta(batch, {head, i}, at);
        sum -= double(weight) * delta;
      }
    }
    return sum;
  }
  Acc row_delta(int64_t batch, WorkRow row, int64_t at) const {
    const Acc delta = dot_rows(row_pointer<T>(p.grad_out, batch, row), row_pointer<T>(p.out, batch, row), shape.value_dim);
    return p.grad_lse ? delta - static_cast<const Acc*>(p.grad_lse)[at] : delta;
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
    if (p.grad_bias.data && !(bias_gradient.clears_tiles && heads && shape.heads)) {
      std::memset(p.grad_bias.data, 0, p.grad_bias_elements * sizeof(Acc));
    }
    for (int64_t head = 0; p.grad_sinks && head < shape.heads; head++) p.grad_sinks[head] = 0;
    if (heads == 0) return;
    if (shape.heads == 0) return store_zeros();
    const int64_t range_total = range_count();
    const int64_t head_sets = div_up(shape.kv_heads, unit_heads), sets = div_up(shape.batch, unit_batches) * head_sets;
    const double products = 2.5 * static_cast<double>(shape.batch) * shape.heads * shape.query_len * shape.kv_len *
                            (shape.head_dim + shape.value_dim) * listed_share(p);
    const int threads = useful_threads(executor, products, heads * range_total);

    Pieces measure(nullptr);
    take(measure);
    const size_t per_thread = measure.used();
    const int64_t dq_size = shape.batch * shape.heads * shape.query_len * shape.head_dim;
    // Ranges add to different columns of the gradient of the bias, unless it has only one.
    const bool sums_bias = p.grad_bias.data && p.grad_bias.stride_column == 0 && range_total > 1;
    Pieces partial_measure(nullptr);
    if (range_total > 1) partial_measure.take<Acc>(range_total * dq_size);
    if (sums_bias) partial_measure.take<Acc>(range_total * p.grad_bias_elements);
    partial_measure.take<int64_t>(blocks);
    partial_measure.take<Range>(shape.batch * range_total);
    const Workspace workspace(per_thread * threads + partial_measure.used());
    Pieces shared(workspace.data() + per_thread * threads);
    Acc* const partials = range_total > 1 ? shared.take<Acc>(range_total * dq_size) : nullptr;
    Acc* const grad_bias = sums_bias ? shared.take<Acc>(range_total * p.grad_bias_elements) : static_cast<Acc*>(p.grad_bias.data);
    int64_t* const costs = shared.take<int64_t>(blocks);
    Range* const ranges = shared.take<Range>(shape.batch * range_total);  // [batch][range_total]
    for (int64_t batch = 0; batch < shape.batch; batch++) {
      // Where batch elements share a gradient of the bias, a unit owns the same keys of all of them.
      if (batch == 0 || (unit_batches == 1 && p.mask.blocks.stride_batch)) count_queries(batch, costs);
      split(costs, ranges + batch * range_total, range_total);
    }
    if (sums_bias) std::memset(grad_bias, 0, range_total * p.grad_bias_elements * sizeof(Acc));

    parallel_tasks(executor, threads, sets * range_total, [&](int thread, int64_t unit) {
      const int64_t set = unit / range_total, range = unit % range_total;
      Pieces pieces(workspace.data() + per_thread * thread);
      Scratch c = take(pieces);
      if (grad_bias) c.grad_bias = grad_bias + (sums_bias ? range * p.grad_bias_elements : 0);
      const int64_t first_batch = set / head_sets * unit_batches, first_head = set % head_sets * unit_heads;
      for (int64_t batch = first_batch; batch < first_batch + unit_batches; batch++) {
        for (int64_t head = first_head; head < first_head + unit_heads; head++) {
          const bool first = batch == first_batch && (head == first_head || p.grad_bias.stride_head != 0);
          run_unit(c, batch, head, first, ranges[batch * range_total + range], partials ? partials + range * dq_size : nullptr);
        }
      }
    });
    if (sums_bias) {
      for (int64_t i = 0; i < p.grad_bias_elements; i++) {
        Acc sum = 0;
        for (int64_t r = 0; r < range_total; r++) sum += grad_bias[r * p.grad_bias_elements + i];
        static_cast<Acc*>(p.grad_bias.data)[i] = sum;
      }
    }
    if (p.grad_sinks) {
      parallel_tasks(executor, threads, shape.heads, [&](int, int64_t head) { p.grad_sinks[head] = sink_gradient(head); });
    }
    if (!partials) return;
    const int64_t panels_per_head = work.segments * panels;
    parallel_tasks(executor, threads, heads * panels_per_head, [&](int, int64_t task) {
      const int64_t head = task / panels_per_head, panel = task % panels_per_head;
      const int64_t batch = head / shape.kv_heads;
      sum_partials(partials, ranges + batch * range_total, range_total, batch, head % shape.kv_heads, panel / panels, panel % panels);
    });
  }
};

template <class Arith, class T>
void flash_backward(const BackwardParams& params, const Executor& executor) {
  FlashBackward<Arith, T>(params).run(executor);
}

}  // namespace
}  // namespace attn_ext::cpu
