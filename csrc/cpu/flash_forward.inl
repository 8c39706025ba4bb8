// Flash attention forward (Dao et al. 2022, 2023), queries in lanes.
//
// A SIMD lane is a query.  Qt[d][lane] is transposed once per tile of queries; then for every tile of keys
//   S^T[n][lane]  = sum_d K[n][d] * Qt[d][lane]            K is broadcast: nothing is transposed
//   P^T[n][lane]  = 2^(S - m)                              maximum, weights and sums are lane by lane: no reductions
//   O^T[d][lane]  = alpha * O^T + sum_n V[n][d] * P^T[n][lane]
// and O^T is transposed back once.  Memory beyond inputs and outputs: one tile per thread, and K and V once more where
// their layout calls for it (see KeyTiles).
namespace attn_ext::cpu {
namespace {

template <class Arith, class T>
class FlashForward {
  using Acc = typename Arith::Acc;
  using Word = typename Arith::Word;
  using V = Vec<Acc>;
  using Tiles = KeyTiles<Arith, T>;
  static constexpr int W = kLanes<Acc>, L = kGroupLanes<Acc>, kGroups = ForwardTile<Arith>::kLaneGroups;
  using Softmax = OnlineSoftmax<Acc, LaneMath<Acc, Arith::kExp2Degree>>;

  const ForwardParams& p;
  const AttentionShape& shape = p.shape;
  const WorkRows work{shape, ForwardTile<Arith>::kQueries};
  const Tiles tiles{p};
  const int64_t query_tiles = div_up(work.rows, ForwardTile<Arith>::kQueries);  // per segment
  const int64_t out_columns = round_up(tiles.v_columns, W), q_columns = round_up(tiles.k_words, W);
  // Scores come out of the product in units of log2, through the queries; bf16 queries cannot carry the factor exactly.
  const Acc scale_log2 = static_cast<Acc>(p.score.scale * kLog2E);
  const Acc query_factor = Arith::kPerWord == 1 ? scale_log2 : Acc(1);
  const bool has_terms = ScoreTerms<Acc>::any(p);

  struct Scratch {
    Word* qt[kGroups];   // [k_words][L]
    Acc* ot[kGroups];    // [out_columns][L]
    Softmax* softmax;    // [kGroups][kGroupVectors]
    LaneMask<Acc>* mask; // [kGroups]
    Acc* s;              // [keys][L]: scores, then weights (as words)
    Acc* terms;          // [keys][L]: what is added to the scores
    LaneBits* seen;      // [keys]: of the group at work, where blocks are listed
    Word* rows;          // [L][max(q_columns, out_columns)]
    typename Tiles::Store tile;
    void take(Pieces& pieces, const FlashForward& f) {
      for (int g = 0; g < kGroups; g++) {
        qt[g] = pieces.take<Word>(f.q_columns * L);
        ot[g] = pieces.take<Acc>(f.out_columns * L);
      }
      softmax = pieces.take<Softmax>(kGroups * kGroupVectors);
      mask = pieces.take<LaneMask<Acc>>(kGroups);
      s = pieces.take<Acc>(f.tiles.keys * L);
      terms = pieces.take<Acc>(f.has_terms ? f.tiles.keys * L : 0);
      seen = pieces.take<LaneBits>(f.p.mask.blocks.offsets ? f.tiles.keys : 0);
      rows = pieces.take<Word>(L * max_i64(f.q_columns, f.out_columns));
      tile.take(pieces, f.tiles, 1);
    }
  };

  // ---------------------------------------------------------------- one group of lanes, one tile of keys
  // score(begin, end) writes the scores of these rows of keys into c.s; accumulate(alpha, begin, end, partial) takes
  // their weights from there.
  template <int N, class Score, class Accumulate>
  void attend(Scratch& c, int g, int64_t tile_begin, int tile_rows, const Score& score, const Accumulate& accumulate) const {
    LaneMask<Acc>& mask = c.mask[g];
    const TileRows rows = mask.rows_in(tile_begin, tile_rows, kMaxRows, kRowQuantum);
    if (rows.empty()) return;
    const Acc* terms = nullptr;
    if (has_terms) {
      const TileClass terms_class = ScoreTerms<Acc>(p, mask, c.terms, tile_begin, rows).read();
      if (terms_class == TileClass::skip) return;
      if (terms_class == TileClass::partial) terms = c.terms;
    }
    const int begin = rows.begin, end = rows.end;

    score(begin, end);
    if (p.score.softcap > 0) cap_scores<N>(c.s, begin, end);
    V s_max[N];
    UNROLL for (int v = 0; v < N; v++) s_max[v] = splat(std::numeric_limits<Acc>::lowest());
    if (terms) add_terms<N>(c.s, terms, rows.full_begin, rows.full_end, s_max);
    else find_maximum<N>(c.s, rows.full_begin, rows.full_end, s_max);
    if (rows.partial()) {  // only the neighbours of the rows that every lane sees need the mask
      mask.set_tile(tile_begin);
      mask_scores<N>(c.s, terms, mask, begin, rows.full_begin, s_max);
      mask_scores<N>(c.s, terms, mask, rows.full_end, end, s_max);
    }

    Softmax* const softmax = c.softmax + g * kGroupVectors;
    Softmax state[N];
    V alpha[N];
    UNROLL for (int v = 0; v < N; v++) {
      state[v] = softmax[v];
      alpha[v] = state[v].raise(s_max[v]);
    }
    weigh<N>(c.s, state, begin, end);
    UNROLL for (int v = 0; v < N; v++) softmax[v] = state[v];
    if (p.dropout.enabled()) drop_weights(c.s, mask, tile_begin, begin, end);
    accumulate(alpha, begin, end, terms || rows.partial());
  }
  // Calls f(begin, end) for the parts of a tile of keys that a group looks at one by one.
  template <class F>
  static INLINE void for_parts(Scratch& c, int g, int64_t tile_begin, int tile_rows, const F& f) {
    LaneMask<Acc>& mask = c.mask[g];
    const auto attend_stretch = [&](int first, int last, bool full) {
      mask.seen = nullptr;
      if (full) return f(first, last);
      mask.blocks.read(c.seen, tile_begin + first, last - first);
      for_runs(c.seen, last - first, [&](int begin, int end) {
        mask.seen = c.seen + begin;
        f(first + begin, first + end);
      });
    };
    if (!mask.blocks.any()) f(0, tile_rows);
    else if (mask.blocks.shares_list(mask.blocks)) mask.blocks.for_stretches(tile_begin, tile_rows, attend_stretch);
    else attend_stretch(0, tile_rows, false);
  }
  template <int N>
  __attribute__((noinline)) void attend(Scratch& c, int g, const KeyTile<Word>& tile) const {
    attend<N>(
        c, g, tile.begin, tile.rows,
        [&](int begin, int end) { score_rows<N>(c.s + begin * L, tile.k + begin * tile.k_row, tile.k_row, c.qt[g], end - begin); },
        [&](const V(&alpha)[N], int begin, int end, bool partial) {
          if (partial && !tiles.values_are_finite(tile, c.mask[g].batch, c.mask[g].lane_row[0].head / shape.group())) {
            return accumulate_nonzero<N>(c, g, tile, alpha, begin, end);
          }
          const int64_t first = begin / Arith::kPerWord;
          add_weighted_values<N>(c.ot[g], alpha, tile.v + first * tile.v_row, tile.v_row,
                                 reinterpret_cast<const Word*>(c.s) + first * L, (end - begin) / Arith::kPerWord);
        });
  }

  // The two products are functions of their own: with anything else alive around them, the compiler keeps it in vector
  // registers and spills operands of the inner loop.
  // s[n][lane] = sum_d k[n][d] * qt[d][lane]
  template <int N>
  __attribute__((noinline)) void score_rows(Acc* s, const Word* k, int64_t k_row, const Word* qt, int rows) const {
    const int64_t steps = tiles.k_words;
    for_row_blocks<kMaxRows>(0, rows, [&](auto block, int r) {
      constexpr int R = block;
      V acc[R][N];
      clear_block(acc);
      multiply_block<Arith>(acc, k + r * k_row, k_row, Int<1>{}, qt, L, steps);
      UNROLL for (int i = 0; i < R; i++) UNROLL for (int v = 0; v < N; v++) {
        if constexpr (Arith::kPerWord != 1) acc[i][v] *= scale_log2;
        store(s + (r + i) * L + v * W, acc[i][v]);
      }
    });
  }
  // ot[d][lane] = alpha[lane] * ot[d][lane] + sum_n values[n][d] * weights[n][lane]
  template <int N>
  __attribute__((noinline)) void add_weighted_values(Acc* ot, const V (&alpha)[N], const Word* values, int64_t v_row,
                                                     const Word* weights, int64_t steps) const {
    for_row_blocks<kMaxRows>(0, static_cast<int>(tiles.v_columns), [&](auto block, int d) {
      constexpr int R = block;
      Acc* const o = ot + d * L;
      V acc[R][N];
      clear_block(acc);  // tile by tile: a sum of sums rounds less than one long sum
      multiply_block<Arith>(acc, values + d, Int<1>{}, v_row, weights, L, steps);
      UNROLL for (int i = 0; i < R; i++) UNROLL for (int v = 0; v < N; v++) {
        store(o + i * L + v * W, fma(load(o + i * L + v * W), alpha[v], acc[i][v]));
      }
    });
  }

  // ---- what happens to the scores of rows [begin, end): each of these is skipped where there is nothing to do
  // s = cap * tanh(s / cap)
  template <int N>
  __attribute__((noinline)) void cap_scores(Acc* scores, int begin, int end) const {
    const Acc cap = static_cast<Acc>(p.score.softcap * kLog2E), inverse = 1 / cap;
    for (int n = begin; n < end; n++) {
      UNROLL for (int v = 0; v < N; v++) {
        Acc* const at = scores + n * L + v * W;
        store(at, tanh<Acc>(load(at) * inverse) * cap);
      }
    }
  }
  template <int N>
  static void find_maximum(const Acc* scores, int begin, int end, V (&s_max)[N]) {
    for (int n = begin; n < end; n++) {
      UNROLL for (int v = 0; v < N; v++) s_max[v] = max(load(scores + n * L + v * W), s_max[v]);
    }
  }
  // -inf hides a key, whatever its score is.
  template <int N>
  static void add_terms(Acc* scores, const Acc* terms, int begin, int end, V (&s_max)[N]) {
    const V minus_infinity = splat(-std::numeric_limits<Acc>::infinity());
    for (int n = begin; n < end; n++) {
      UNROLL for (int v = 0; v < N; v++) {
        Acc* const at = scores + n * L + v * W;
        const V term = load(terms + n * L + v * W), s = term == minus_infinity ? minus_infinity : load(at) + term;
        s_max[v] = max(s, s_max[v]);
        store(at, s);
      }
    }
  }
  // The same, and hides what the lanes' intervals hide.
  template <int N>
  static void mask_scores(Acc* scores, const Acc* terms, const LaneMask<Acc>& mask, int begin, int end, V (&s_max)[N]) {
    const V minus_infinity = splat(-std::numeric_limits<Acc>::infinity());
    for (int n = begin; n < end; n++) {
      UNROLL for (int v = 0; v < N; v++) {
        Acc* const at = scores + n * L + v * W;
        const V term = terms ? load(terms + n * L + v * W) : V{};
        V s = mask.visible(n, v) ? load(at) + term : minus_infinity;
        if (terms) s = term == minus_infinity ? minus_infinity : s;
        s_max[v] = max(s, s_max[v]);
        store(at, s);
      }
    }
  }

  // Scores -> weights, in place; two bf16 weights share a word.
  template <int N>
  static void weigh(Acc* s, Softmax (&state)[N], int begin, int end) {
    V sum[N][2] = {};
    for (int n = begin; n < end; n += 2) {
      UNROLL for (int v = 0; v < N; v++) {
        const V w0 = state[v].weight(load(s + n * L + v * W)), w1 = state[v].weight(load(s + (n + 1) * L + v * W));
        sum[v][0] += w0;
        sum[v][1] += w1;
        if constexpr (Arith::kPerWord == 1) {
          store(s + n * L + v * W, w0);
          store(s + (n + 1) * L + v * W, w1);
        } else {
          store(reinterpret_cast<Word*>(s) + n / 2 * L + v * W, Arith::pack(w0, w1));
        }
      }
    }
    UNROLL for (int v = 0; v < N; v++) state[v].add(sum[v][0] + sum[v][1]);
  }

  // Weights that dropout takes become 0, after they have been summed.
  __attribute__((noinline)) void drop_weights(Acc* weights, const LaneMask<Acc>& mask, int64_t tile_begin, int begin, int end) const {
    for_kept_pairs<Acc>(p.dropout, mask, tile_begin, begin, end, [&](int n, int v, auto low, auto high) {
      if constexpr (Arith::kPerWord == 1) {
        Acc* const at = weights + n * L + v * W;
        store(at, low ? load(at) : V{});
        store(at + L, high ? load(at + L) : V{});
      } else {
        Word* const at = reinterpret_cast<Word*>(weights) + n / 2 * L + v * W;
        store(at, load(at) & (((Vec<Word>)low & 0xffff) | ((Vec<Word>)high & 0xffff0000)));
      }
    });
  }

  // The product with the values, for tiles where 0 * value is not 0: hidden keys must not reach the output.
  template <int N>
  void accumulate_nonzero(Scratch& c, int g, const KeyTile<Word>& tile, const V (&alpha)[N], int begin, int end) const {
    const Word* const weights = reinterpret_cast<const Word*>(c.s);
    for (int64_t d = 0; d < tiles.v_columns; d++) {
      for (int lane = 0; lane < N * W; lane++) {
        Acc sum = 0;
        for (int n = begin; n < end; n++) {
          const int word = n / Arith::kPerWord, which = n % Arith::kPerWord;
          const Acc w = number(weights[word * L + lane], which);
          if (w != 0) sum = fma(number(tile.v[word * tile.v_row + d], which), w, sum);
        }
        Acc& o = c.ot[g][d * L + lane];
        o = fma(o, static_cast<Acc>(alpha[lane / W][lane % W]), sum);
      }
    }
  }

  // ---------------------------------------------------------------- a few queries
  // Decoding has one query a head, and a group of heads at most a handful.  They would leave most lanes empty, and packing
  // or broadcasting every key for them costs more than reading it: here lanes are columns, keys and values are read once,
  // as they lie, and only the softmax keeps a query per lane.
  // Rows are taken one or four at a time.
  static constexpr int kFewRows = 4;
  // How far ahead of its use a key is fetched: what arrives while memory answers once.
  static int64_t elements_ahead(int64_t stride) {
    constexpr int64_t kBytes = 8192, kLeastRows = 8;
    return max_i64(kLeastRows, kBytes / static_cast<int64_t>(sizeof(T)) / max_i64(1, stride)) * stride;
  }
  const bool has_few_rows = Arith::kPerWord == 1 && W >= kFewRows && work.segments == 1 && work.rows <= max_i64(kFewRows, W / 2) &&
                            shape.head_dim % W == 0 && shape.value_dim % W == 0;

  // s[n][i] = q[i] . k[n] for R rows of q and the keys [begin, end), of which `valid` exist.
  template <int R>
  __attribute__((noinline)) void score_few_rows(Acc* s, const T* k, const Acc* q, int begin, int end, int valid) const {
    constexpr int kKeys = W / R;
    const int64_t ahead = elements_ahead(p.key.stride_row);
    for (int n = begin; n < end; n += kKeys) {
      const T* rows[kKeys];
      for (int j = 0; j < kKeys; j++) rows[j] = k + (n + j < valid ? n + j : valid - 1) * p.key.stride_row;
      V acc[W] = {};
      for (int64_t d = 0; d < shape.head_dim; d += W) {
        V query[R];
        UNROLL for (int i = 0; i < R; i++) query[i] = load(q + i * q_columns + d);
        UNROLL for (int j = 0; j < kKeys; j++) {
          __builtin_prefetch(rows[j] + d + ahead);
          const V key = widen(rows[j] + d);
          UNROLL for (int i = 0; i < R; i++) acc[j * R + i] = fma(key, query[i], acc[j * R + i]);
        }
      }
      transpose<Acc>(acc);
      UNROLL for (int width = W / 2; width > 0; width /= 2) UNROLL for (int i = 0; i < width; i++) acc[i] += acc[i + width];
      alignas(V) Acc dots[W];
      store(dots, acc[0]);
      for (int j = 0; j < kKeys && n + j < end; j++) std::memcpy(s + (n + j) * L, dots + j * R, R * sizeof(Acc));
    }
  }
  // o[i][d] = alpha[i] * o[i][d] + sum_n weights[n][i] * v[n][d], N vectors of columns at a time.  In a partial tile a
  // weight of 0 takes nothing, whatever the value is.
  template <int R, int N>
  __attribute__((noinline)) void add_values_to_few_rows(Acc* o, const Acc* alpha, const T* v, const Acc* weights, int begin, int end,
                                                        bool partial) const {
    const int64_t stride = p.value.stride_row, ahead = elements_ahead(stride);
    V acc[R][N];
    clear_block(acc);
    for (int n = begin; n < end; n++) {
      V value[N];
      UNROLL for (int j = 0; j < N; j++) {
        __builtin_prefetch(v + n * stride + j * W + ahead);
        value[j] = widen(v + n * stride + j * W);
      }
      UNROLL for (int i = 0; i < R; i++) {
        const Acc w = weights[n * L + i];
        if (partial && w == 0) continue;
        UNROLL for (int j = 0; j < N; j++) acc[i][j] = fma(splat(w), value[j], acc[i][j]);
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) {
      Acc* const at = o + i * out_columns + j * W;
      store(at, fma(load(at), splat(alpha[i]), acc[i][j]));
    }
  }
  template <int R>
  void attend_few_rows(Scratch& c, int64_t batch, int64_t kv_head) const {
    const int count = static_cast<int>(work.rows), padded = static_cast<int>(round_up(count, R));
    load_queries(c, 0, batch, kv_head, 0, 0, count);
    const Acc* const q = reinterpret_cast<const Acc*>(c.rows);
    Acc* const o = c.ot[0];  // [padded][out_columns]
    const auto attend_keys = [&](int64_t first, int rows) {
      const int valid = static_cast<int>(min_i64(rows, shape.kv_len - first));
      const T* k = row_pointer<T>(p.key, batch, kv_head, first);
      const T* v = row_pointer<T>(p.value, batch, kv_head, first);
      attend<1>(
          c, 0, first, rows,
          [&](int begin, int end) {
            for (int i = 0; i < padded; i += R) score_few_rows<R>(c.s + i, k, q + i * q_columns, begin, end, valid);
          },
          [&](const V(&alpha)[1], int begin, int end, bool is_partial) {
            const bool partial = is_partial && tiles.checks_finite;  // not for a mere tail of keys
            alignas(V) Acc factors[W];
            store(factors, alpha[0]);
            const int last = end < valid ? end : valid;
            constexpr int kWide = R == 1 ? 4 : 2;  // enough sums to hide the latency of one
            for (int i = 0; i < padded; i += R) {
              for (int64_t d = 0; d < shape.value_dim;) {
                Acc* const at = o + i * out_columns + d;
                if (d + kWide * W <= shape.value_dim) {
                  add_values_to_few_rows<R, kWide>(at, factors + i, v + d, c.s + i, begin, last, partial);
                  d += kWide * W;
                } else {
                  add_values_to_few_rows<R, 1>(at, factors + i, v + d, c.s + i, begin, last, partial);
                  d += W;
                }
              }
            }
          });
    };
    for (int64_t key = c.mask[0].next(0); key < shape.kv_len;) {
      const int64_t t = key / tiles.keys, first = t * tiles.keys;
      for_parts(c, 0, first, static_cast<int>(round_up(tiles.valid_keys(t), kRowQuantum)),
                [&](int begin, int end) { attend_keys(first + begin, end - begin); });
      key = c.mask[0].next(first + tiles.keys);
    }
    const Softmax& state = c.softmax[0];
    const V inverse = normaliser(state);
    WorkRow at = work.at(kv_head, 0, 0);
    for (int i = 0; i < count; i++, work.advance(at)) {
      store_row(row_pointer<T>(p.out, batch, at), o + i * out_columns, shape.value_dim, static_cast<Acc>(inverse[i]));
    }
    store_statistics(batch, work.at(kv_head, 0, 0), state, count);
  }

  // ---------------------------------------------------------------- one tile of queries
  // The state of a group before its first key, and its queries, scaled, as rows of c.rows up to a whole vector of lanes.
  void load_queries(Scratch& c, int g, int64_t batch, int64_t kv_head, int64_t segment, int64_t row, int count) const {
    LaneMask<Acc>& mask = c.mask[g];
    mask.set_rows(p.mask, shape, work, batch, kv_head, segment, row, count);
    WorkRow at = work.at(kv_head, segment, row);
    for (int lane = 0; lane < count; lane++, work.advance(at)) {
      load_row(c.rows + lane * q_columns, row_pointer<T>(p.query, batch, at), shape.head_dim, q_columns,
               static_cast<Word>(query_factor));
    }
    std::memset(c.rows + count * q_columns, 0, (round_up(count, W) - count) * q_columns * sizeof(Word));
    for (int v = 0; v < kGroupVectors; v++) c.softmax[g * kGroupVectors + v] = p.score.sinks ? after_sinks(mask, v) : Softmax{};
    std::memset(c.ot[g], 0, out_columns * L * sizeof(Acc));
  }
  Softmax after_sinks(const LaneMask<Acc>& mask, int v) const {
    alignas(V) Acc sinks[W];
    for (int i = 0; i < W; i++) sinks[i] = bias_in_log2<Acc>(p.score.sinks[mask.lane_row[v * W + i].head]);
    return Softmax(load(sinks));
  }
  void start_group(Scratch& c, int g, int64_t batch, int64_t kv_head, int64_t segment, int64_t row, int count) const {
    load_queries(c, g, batch, kv_head, segment, row, count);
    for (int v = 0; v < count; v += W) transpose_rows(c.qt[g] + v, L, c.rows + v * q_columns, q_columns, q_columns);
  }

  V normaliser(const Softmax& state) const {
    return state.l == 0 ? V{} : static_cast<Acc>(p.dropout.inverse_keep) / state.l;
  }
  void finish_group(Scratch& c, int g, int64_t batch, int64_t kv_head, int64_t segment, int64_t row, int count) const {
    Acc* const rows = reinterpret_cast<Acc*>(c.rows);
    WorkRow at = work.at(kv_head, segment, row);
    for (int v = 0; v * W < count; v++) {
      const Softmax& state = c.softmax[g * kGroupVectors + v];
      const V inverse = normaliser(state);
      for (int64_t d = 0; d < out_columns; d += W) {
        V a[W];
        UNROLL for (int i = 0; i < W; i++) a[i] = load(c.ot[g] + (d + i) * L + v * W) * inverse;
        transpose<Acc>(a);
        UNROLL for (int i = 0; i < W; i++) store(rows + i * out_columns + d, a[i]);
      }
      const int valid = count - v * W < W ? count - v * W : W;
      store_statistics(batch, at, state, valid);
      for (int i = 0; i < valid; i++, work.advance(at)) {
        store_row(row_pointer<T>(p.out, batch, at), rows + i * out_columns, shape.value_dim);
      }
    }
  }
  void store_statistics(int64_t batch, WorkRow at, const Softmax& state, int count) const {
    if (!p.lse) return;
    const V log2_l = log2<Acc>(state.l * kHeadroomFactor);
    for (int i = 0; i < count; i++, work.advance(at)) {
      const auto statistics = RowStatistics<Acc>::of(state.m[i], state.l[i], log2_l[i]);
      const int64_t index = (batch * shape.heads + at.head) * shape.query_len + at.query;
      static_cast<Acc*>(p.lse)[index] = statistics.lse;
      static_cast<Acc*>(p.lse_residual)[index] = statistics.residual;
    }
  }

  struct Task {
    int64_t batch, kv_head, segment, first, last;  // rows of work
  };
  Task task_of(int64_t head, int64_t tile) const {
    const int64_t first = tile % query_tiles * ForwardTile<Arith>::kQueries;
    return {head / shape.kv_heads, head % shape.kv_heads, tile / query_tiles, first,
            min_i64(work.rows, first + ForwardTile<Arith>::kQueries)};
  }
  // Blocks that the lists give a task.
  int64_t cost_of(const Task& task) const {
    const WorkRow first = work.at(task.kv_head, task.segment, task.first), last = work.at(task.kv_head, task.segment, task.last - 1);
    int64_t blocks = 0;
    for (int64_t head = first.head; head <= last.head; head++) {
      blocks += listed_blocks(p.mask.blocks, task.batch, head, head == first.head ? first.query : 0,
                              head == last.head ? last.query + 1 : shape.query_len);
    }
    return blocks;
  }

  // head_store: the packed head, or null and `finite`: of the values of each of its tiles.
  void attend_tile(Scratch& c, const typename Tiles::Store* head_store, Finite* finite, const Task& task) const {
    const int64_t batch = task.batch, kv_head = task.kv_head, segment = task.segment, first = task.first;
    if constexpr (Arith::kPerWord == 1 && W >= kFewRows) {
      if (has_few_rows) {
        return work.rows == 1 ? attend_few_rows<1>(c, batch, kv_head) : attend_few_rows<kFewRows>(c, batch, kv_head);
      }
    }
    const int groups = static_cast<int>(div_up(task.last - first, L));
    const auto count_of = [&](int g) { return static_cast<int>(min_i64(L, task.last - task.first - g * L)); };
    for (int g = 0; g < groups; g++) start_group(c, g, batch, kv_head, segment, first + g * L, count_of(g));
    int64_t next_key[kGroups];
    const auto first_key = [&] {
      int64_t key = kNoKey;
      for (int g = 0; g < groups; g++) key = min_i64(key, next_key[g]);
      return key;
    };
    for (int g = 0; g < groups; g++) next_key[g] = c.mask[g].next(0);
    for (int64_t key; (key = first_key()) < shape.kv_len;) {
      const int64_t t = key / tiles.keys, end = (t + 1) * tiles.keys;
      const KeyTile<Word> key_tile = head_store ? tiles.packed(*head_store, t, t) : tiles.fetch(c.tile, finite, batch, kv_head, t);
      for (int g = 0; g < groups; g++) {
        if (next_key[g] >= end) continue;
        for_parts(c, g, key_tile.begin, key_tile.rows, [&](int begin, int end) {
          if (count_of(g) > W) attend<2>(c, g, rows_of<Arith>(key_tile, begin, end));
          else attend<1>(c, g, rows_of<Arith>(key_tile, begin, end));
        });
        next_key[g] = c.mask[g].next(end);
      }
    }
    for (int g = 0; g < groups; g++) finish_group(c, g, batch, kv_head, segment, first + g * L, count_of(g));
  }

 public:
  explicit FlashForward(const ForwardParams& params) : p(params) {}

  // Whether run() reads keys and values as they lie, once for all queries.
  bool reads_keys_once() const { return has_few_rows; }

  void run(const Executor& executor) const {
    if (shape.batch == 0 || shape.heads == 0 || shape.query_len == 0) return;
    const int64_t heads = shape.batch * shape.kv_heads, tiles_per_head = work.segments * query_tiles;
    const double products = static_cast<double>(shape.batch) * shape.heads * shape.query_len * shape.kv_len *
                            (shape.head_dim + shape.value_dim) * listed_share(p);
    const int64_t tasks = heads * tiles_per_head;
    const int threads = useful_threads(executor, products, tasks);
    // Packing a whole head pays once a few tiles of queries share it.
    const bool contiguous = p.key.stride_row == shape.head_dim && p.value.stride_row == shape.value_dim;
    const bool packs_heads = tiles_per_head >= 3 && !(tiles.natural && contiguous);
    // With heads enough for every thread a head is packed by the thread that uses it, and is still in its cache; nor is
    // there memory for all heads to be touched.
    const bool head_per_task = packs_heads && (heads % threads == 0 || heads >= 4 * threads);
    // Under a causal mask the last tiles of queries are the longest; where blocks are listed, any may be.
    const bool orders_tasks = p.mask.blocks.offsets && threads > 1;

    Pieces measure(nullptr);
    Scratch scratch;
    typename Tiles::Store store;
    scratch.take(measure, *this);
    if (head_per_task) store.take(measure, tiles, tiles.tiles);
    const size_t per_thread = measure.used();
    Pieces shared_measure(nullptr);
    if (packs_heads && !head_per_task) store.take(shared_measure, tiles, heads * tiles.tiles);
    if (!packs_heads) shared_measure.take<Finite>(heads * tiles.tiles);
    if (orders_tasks) shared_measure.take<int64_t>(tasks), shared_measure.take<int64_t>(tasks);
    const Workspace workspace(per_thread * threads + shared_measure.used());
    const auto thread_pieces = [&](int thread) { return Pieces(workspace.data() + per_thread * thread); };

    if (head_per_task) {
      parallel_tasks(executor, threads, heads, [&](int thread, int64_t head) {
        Pieces pieces = thread_pieces(thread);
        Scratch c;
        typename Tiles::Store packed;
        c.take(pieces, *this);
        packed.take(pieces, tiles, tiles.tiles);
        for (int64_t t = 0; t < tiles.tiles; t++) tiles.pack(packed, t, head / shape.kv_heads, head % shape.kv_heads, t);
        for (int64_t t = 0; t < tiles_per_head; t++) attend_tile(c, &packed, nullptr, task_of(head, t));
      });
      return;
    }
    Pieces shared(workspace.data() + per_thread * threads);
    Finite* const finite = shared.take<Finite>(packs_heads ? 0 : heads * tiles.tiles);
    if (!packs_heads) {
      std::memset(finite, 0, heads * tiles.tiles * sizeof(Finite));
    } else {
      store.take(shared, tiles, heads * tiles.tiles);
      parallel_tasks(executor, threads, heads * tiles.tiles, [&](int, int64_t task) {
        const int64_t head = task / tiles.tiles;
        tiles.pack(store, task, head / shape.kv_heads, head % shape.kv_heads, task % tiles.tiles);
      });
    }
    int64_t* order = nullptr;
    if (orders_tasks) {
      order = shared.take<int64_t>(tasks);
      int64_t* const costs = shared.take<int64_t>(tasks);
      for (int64_t i = 0; i < tasks; i++) costs[i] = cost_of(task_of(i / tiles_per_head, i % tiles_per_head));
      longest_first(costs, order, tasks);
    }
    parallel_tasks(executor, threads, tasks, [&](int thread, int64_t i) {
      const int64_t head = (order ? order[i] : i) / tiles_per_head;
      const int64_t tile = order ? order[i] % tiles_per_head : tiles_per_head - 1 - i % tiles_per_head;
      Pieces pieces = thread_pieces(thread);
      Scratch c;
      c.take(pieces, *this);
      typename Tiles::Store head_store;
      if (packs_heads) head_store = {store.k + head * tiles.tiles * tiles.keys * tiles.k_words,
                                     store.v + head * tiles.tiles * tiles.keys / Arith::kPerWord * tiles.v_columns,
                                     store.finite + head * tiles.tiles};
      attend_tile(c, packs_heads ? &head_store : nullptr, finite + (packs_heads ? 0 : head * tiles.tiles), task_of(head, tile));
    });
  }
};

template <class Arith, class T>
void flash_forward(const ForwardParams& params, const Executor& executor) {
  if constexpr (Arith::kPerWord != 1) {  // pairs of bf16 pay with many rows only
    const FlashForward<PlainArithmetic<float>, T> plain(params);
    if (plain.reads_keys_once()) return plain.run(executor);
  }
  FlashForward<Arith, T>(params).run(executor);
}

}  // namespace
}  // namespace attn_ext::cpu
