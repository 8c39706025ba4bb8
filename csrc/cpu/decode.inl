// Attention of a few queries over a long cache (flash-decoding, Dao et al. 2023; paged as in Kwon et al. 2023, "vLLM").
//
// Reading the cache is the work, so each key and value is read once, where it lies, for all rows that share its head: the
// heads of a group and the queries of a sequence.  Lanes are columns; a table of addresses, one per key, makes pages,
// strides and the end of a sequence all the same to the products, and tells them what to fetch ahead.
//   S[row][n]  = q[row] . k[n]          4 rows x 4 keys at a time; the sums over lanes of 16 accumulators make one vector
//   P[row][n]  = 2^(S - m)              lanes are keys
//   O[row][:]  = alpha * O + sum_n P[row][n] v[n]
// The keys of a sequence are cut into ranges, each summed by itself; their states are merged in order, so that results
// depend on the lengths and on nothing else in the batch, least of all on the number of threads.  A range is done for all
// kv heads before the next: in a paged cache they are neighbours, and share what translates their addresses.
namespace attn_ext::cpu {
namespace {

// A chunk is a few neighbouring numbers of a row that are widened together, into kParts vectors.
template <class Acc, class C>
class Chunk {
 public:
  static constexpr int W = kLanes<Acc>, kParts = sizeof(C) < sizeof(Acc) ? 2 : 1, kColumns = kParts * W;

  template <int Part>
  static INLINE Vec<Acc> load(const C* p) {
    if constexpr (kSharesLanes) {
      const Vec<uint32_t> words = cpu::load(reinterpret_cast<const uint32_t*>(p));
      return (Vec<Acc>)(Part == 0 ? words << 16 : words & 0xffff0000);
    } else {
      return widen(p + Part * W);
    }
  }
  // Between neighbouring numbers and the parts they make.
  static INLINE void pack(Acc* parts, const Acc* numbers) {
    if constexpr (kSharesLanes) {
      const Vec<Acc> first = cpu::load(numbers), second = cpu::load(numbers + W);
      store(parts, every_second<0>(first, second, Lanes{}));
      store(parts + W, every_second<1>(first, second, Lanes{}));
    } else {
      std::memcpy(parts, numbers, kColumns * sizeof(Acc));
    }
  }
  static INLINE void unpack(Acc* numbers, const Acc* parts) {
    if constexpr (kSharesLanes) {
      const Vec<Acc> first = cpu::load(parts), second = cpu::load(parts + W);
      store(numbers, interleave_low<Acc>(first, second, Lanes{}));
      store(numbers + W, interleave_high<Acc>(first, second, Lanes{}));
    } else {
      std::memcpy(numbers, parts, kColumns * sizeof(Acc));
    }
  }

 private:
  // Two bf16 numbers share a lane: taking them apart so needs one instruction each.
  static constexpr bool kSharesLanes = std::is_same_v<C, BFloat16>;
  using Lanes = std::make_integer_sequence<int, W>;
  template <int First, int... I>
  static INLINE Vec<Acc> every_second(Vec<Acc> a, Vec<Acc> b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + First)...);
  }
};

// Rows of at least one chunk.  The last chunk ends where the row ends; what it repeats of the chunk before meets zeros in
// the queries, and is written twice to the output.
template <class Acc, class C>
struct Chunks {
  using Piece = Chunk<Acc, C>;
  int64_t columns, count = div_up(columns, Piece::kColumns);

  INLINE int64_t begin(int64_t chunk) const {
    return chunk + 1 < count ? chunk * Piece::kColumns : columns - Piece::kColumns;
  }
  // Between a row in order and a packed one; packing leaves zeros in the row where the last chunk repeats.
  void pack(Acc* packed, Acc* row) const {
    for (int64_t c = 0; c < count; c++, packed += Piece::kColumns) {
      for (int64_t d = begin(c); d < c * Piece::kColumns; d++) row[d] = 0;
      Piece::pack(packed, row + begin(c));
    }
  }
  void unpack(Acc* row, const Acc* packed) const {
    for (int64_t c = 0; c < count; c++, packed += Piece::kColumns) Piece::unpack(row + begin(c), packed);
  }
};

// Whether there are instances for each number of rows and columns.  Where speed is not the point, a few must do: they
// take a second of compilation each.
template <class Acc, class C>
constexpr bool kManyInstances = sizeof(Acc) == 4 && sizeof(C) > 1 && (kVectorRegisters == 32 || kLanes<Acc> > 4);

// The two products, for rows of C.
template <class Acc, class C>
struct DecodeProducts {
  using V = Vec<Acc>;
  using Piece = Chunk<Acc, C>;
  static constexpr int W = kLanes<Acc>, kParts = Piece::kParts;

  template <class F>
  static INLINE void for_parts(const F& f) {
    f(Int<0>{});
    if constexpr (kParts == 2) f(Int<1>{});
  }

  // s[i][n] = q[i] . rows[n] for R rows of packed queries and `count` keys, up to the next multiple of W.
  template <int R>
  static __attribute__((noinline)) void score(Acc* s, int64_t s_row, const Acc* q, int64_t q_row, const void* const* rows,
                                              int64_t ahead, int count, const Chunks<Acc, C>& chunks) {
    constexpr int kKeys = W > R ? W / R : 1, kSums = R * kKeys;
    for (int n = 0; n < count; n += kKeys) {
      V acc[kSums] = {};
      for (int64_t c = 0; c < chunks.count; c++) {
        const int64_t at = chunks.begin(c);
        for_parts([&](auto part) {
          V query[R];
          UNROLL for (int i = 0; i < R; i++) query[i] = load(q + i * q_row + (c * kParts + part) * W);
          UNROLL for (int j = 0; j < kKeys; j++) {
            const V key = Piece::template load<part>(static_cast<const C*>(rows[n + j]) + at);
            if constexpr (part == 0) __builtin_prefetch(static_cast<const C*>(rows[n + j + ahead]) + at);
            UNROLL for (int i = 0; i < R; i++) acc[i * kKeys + j] = fma(key, query[i], acc[i * kKeys + j]);
          }
        });
      }
      alignas(V) Acc dots[kSums];
      UNROLL for (int i = 0; i < kSums; i += W) store(dots + i, sums_of_lanes<Acc>(acc + i));
      UNROLL for (int i = 0; i < R; i++) std::memcpy(s + i * s_row + n, dots + i * kKeys, kKeys * sizeof(Acc));
    }
  }

  // o[i][:] += sum_n weights[i][n] * rows[n], N chunks of columns.
  template <int R, int N>
  static __attribute__((noinline)) void add_chunks(Acc* o, int64_t o_row, const Acc* weights, int64_t w_row,
                                                   const void* const* rows, int64_t ahead, int count,
                                                   const Chunks<Acc, C>& chunks, int64_t first) {
    int64_t at[N];
    UNROLL for (int j = 0; j < N; j++) at[j] = chunks.begin(first + j);
    V acc[R][N * kParts];
    clear_block(acc);
    for (int n = 0; n < count; n++) {
      const C* const row = static_cast<const C*>(rows[n]);
      V value[N * kParts];
      UNROLL for (int j = 0; j < N; j++) {
        __builtin_prefetch(static_cast<const C*>(rows[n + ahead]) + at[j]);
        for_parts([&](auto part) { value[j * kParts + part] = Piece::template load<part>(row + at[j]); });
      }
      UNROLL for (int i = 0; i < R; i++) {
        const V w = splat(weights[i * w_row + n]);
        UNROLL for (int j = 0; j < N * kParts; j++) acc[i][j] = fma(w, value[j], acc[i][j]);
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N * kParts; j++) {
      Acc* const out = o + i * o_row + (first * kParts + j) * W;
      store(out, load(out) + acc[i][j]);
    }
  }
  // o[i][:] = alpha[i] * o[i][:] + sum_n weights[i][n] * rows[n].  Where registers do not hold all columns at once, a few
  // rows are finished before the next, if they come from memory: a pass over part of many would fetch all of them, and leave
  // memory idle in the next.
  template <int R>
  static void add_values(Acc* o, int64_t o_row, const Acc* alpha, const Acc* weights, int64_t w_row, const void* const* rows,
                         int64_t ahead, int count, const Chunks<Acc, C>& chunks, bool from_memory) {
    constexpr int kMost = (R == 1 ? 8 : kVectorRegisters / 2 / R) / kParts, kBytesAtOnce = 4096;
    for (int i = 0; i < R; i++) {
      Acc* const row = o + i * o_row;
      for (int64_t d = 0; d < chunks.count * Piece::kColumns; d += W) store(row + d, load(row + d) * alpha[i]);
    }
    const int64_t row_bytes = chunks.columns * static_cast<int64_t>(sizeof(C));
    const int block = from_memory && chunks.count > kMost ? static_cast<int>(max_i64(1, kBytesAtOnce / row_bytes)) : count;
    for (int n = 0; n < count; n += block) {
      const int some = count - n < block ? count - n : block;
      int64_t c = 0;
      const auto add = [&](auto chunk_count) {
        for (; c + chunk_count <= chunks.count; c += chunk_count) {
          add_chunks<R, chunk_count>(o, o_row, weights + n, w_row, rows + n, ahead, some, chunks, c);
        }
      };
      add(Int<kMost>{});
      if constexpr (kMost > 2 && kManyInstances<Acc, C>) add(Int<kMost / 2>{});
      if constexpr (kMost > 1) add(Int<1>{});
    }
  }
};

// Keys or values of the cache.  Rows shorter than a chunk are widened first, and padded with zeros.
template <class Acc, class C>
struct DecodeOperand {
  const CacheView& view;
  const int64_t columns;
  const bool widened = columns < Chunk<Acc, C>::kColumns;
  const Chunks<Acc, C> chunks{columns};
  const Chunks<Acc, Acc> wide_chunks{round_up(columns, kLanes<Acc>)};

  // Calls f(products, chunks) with those that suit what the table of addresses points to.
  template <class F>
  INLINE auto with_products(const F& f) const {
    return widened ? f(DecodeProducts<Acc, Acc>{}, wide_chunks) : f(DecodeProducts<Acc, C>{}, chunks);
  }
  // Of a packed row.
  int64_t packed_columns() const {
    return with_products([](auto, const auto& c) { return c.count * std::decay_t<decltype(c)>::Piece::kColumns; });
  }
  int64_t padded_columns() const { return round_up(columns, kLanes<Acc>); }
};

// Rows of queries, new tokens and outputs, of which there are few: their dtype is looked up, not compiled in.
template <class Acc, class Pointer, class F>
INLINE void with_row(DType dtype, const BasicTensorView<Pointer>& view, int64_t batch, int64_t head, int64_t row, const F& f) {
  if constexpr (sizeof(Acc) == 8) return f(row_pointer<double>(view, batch, head, row));
  else if (dtype == DType::float16) return f(row_pointer<Float16>(view, batch, head, row));
  else if (dtype == DType::bfloat16) return f(row_pointer<BFloat16>(view, batch, head, row));
  else return f(row_pointer<float>(view, batch, head, row));
}

template <class Acc, class C>
class Decode {
  using V = Vec<Acc>;
  using Operand = DecodeOperand<Acc, C>;
  static constexpr int W = kLanes<Acc>, kTile = 256, kKeyQuantum = 16, kRows = 4, kMostAhead = 64;
  static constexpr int64_t kKeysPerSplit = 512;
  using Softmax = OnlineSoftmax<Acc, LaneMath<Acc, 5>>;
  using Addresses = Vec<uint64_t>;
  static constexpr int kAddresses = kLanes<uint64_t>;

  const DecodeParams& p;
  const AttentionShape& shape = p.shape;
  const Operand key{p.key_cache, shape.head_dim}, value{p.value_cache, shape.value_dim};
  // Row r of a kv head is query r / group of head r % group: neighbours see the same keys.
  const int64_t group = shape.group(), rows = group * shape.query_len;
  const int64_t padded_rows = rows == 1 && kManyInstances<Acc, C> ? 1 : round_up(rows, kRows);
  const int64_t q_row = key.packed_columns(), o_row = value.packed_columns();
  // How far ahead of its use a row is fetched: what arrives while memory answers once.
  const int64_t row_bytes = max_i64(shape.head_dim, shape.value_dim) * static_cast<int64_t>(sizeof(C));
  const int64_t ahead = max_i64(8, min_i64(kMostAhead, 8192 / row_bytes));

  struct Shared {
    Acc* q;               // [batch][kv_heads][padded_rows][q_row], scaled to units of log2
    int64_t* first_unit;  // [batch + 1]: the units of a sequence are its first range for each kv head, its second, ...
    Acc *m, *l;           // [units][padded_rows]
    Acc* o;               // [units][padded_rows][o_row]
  };
  struct Scratch {
    const void** rows;  // [2 * kTile + kMostAhead + kAddresses]: keys of a tile, its values, the first keys of the next
    Acc* s;             // [padded_rows][kTile]: scores, then weights
    Acc* alpha;         // [padded_rows]
    Softmax* state;     // [padded_rows], sums still spread over lanes
    Acc *key_scale, *value_scale;  // [kTile]
    Acc *wide_keys, *wide_values;  // [kTile][padded columns]
    Acc *row, *cos, *sin;
    void take(Pieces& pieces, const Decode& d) {
      rows = pieces.take<const void*>(2 * kTile + kMostAhead + kAddresses);
      s = pieces.take<Acc>(d.padded_rows * kTile);
      alpha = pieces.take<Acc>(d.padded_rows);
      state = pieces.take<Softmax>(d.padded_rows);
      key_scale = pieces.take<Acc>(d.p.key_cache.scale ? kTile : 0);
      value_scale = pieces.take<Acc>(d.p.value_cache.scale ? kTile : 0);
      wide_keys = pieces.take<Acc>(d.key.widened ? kTile * d.key.padded_columns() : 0);
      wide_values = pieces.take<Acc>(d.value.widened ? kTile * d.value.padded_columns() : 0);
      row = pieces.take<Acc>(max_i64(d.key.padded_columns(), d.value.padded_columns()) + W);
      cos = pieces.take<Acc>(d.p.rotary.half);
      sin = pieces.take<Acc>(d.p.rotary.half);
    }
  };

  // ---------------------------------------------------------------- ranges of keys
  KeyInterval keys_of(int64_t b) const { return {p.first_key(b), p.total(b)}; }
  int64_t keys_per_split(KeyInterval keys) const {
    return p.splits ? max_i64(kKeyQuantum, div_up(keys.hi - keys.lo, p.splits)) : kKeysPerSplit;
  }
  int64_t splits_of(int64_t b) const {
    const KeyInterval keys = keys_of(b);
    return keys.empty() ? 0 : div_up(keys.hi - keys.lo, keys_per_split(keys));
  }
  // What row `row` sees of the `count` keys from `begin` on.
  KeyInterval visible(int64_t b, int64_t row, int64_t begin, int count) const {
    const int64_t query = row / group;
    const int64_t lo = max_i64(0, min_i64(count, p.first_key(b, query) - begin));
    return {lo, max_i64(lo, min_i64(count, p.position(b, query) + 1 - begin))};
  }

  // ---------------------------------------------------------------- the cache
  // f(page, first, n, run): keys begin + n .. + run - 1 are rows first .. of the page.
  template <class F>
  INLINE void for_runs(int64_t b, int64_t begin, int count, const F& f) const {
    int64_t index = begin / p.page_size, first = begin % p.page_size;
    for (int n = 0; n < count; index++, first = 0) {
      const int run = static_cast<int>(min_i64(count - n, p.page_size - first));
      f(p.pages ? p.pages[b * p.pages_per_sequence + index] : b, first, n, run);
      n += run;
    }
  }
  // A vector of addresses at a time: what it writes after the last row is for others to overwrite.
  void point(const void** rows, const CacheView& view, int64_t b, int64_t kv_head, int64_t begin, int count) const {
    for_runs(b, begin, count, [&](int64_t page, int64_t first, int n, int run) {
      const auto address = reinterpret_cast<uint64_t>(row_pointer<C>(view, page, kv_head, first));
      const auto stride = static_cast<uint64_t>(view.stride_row) * sizeof(C);
      Addresses at;
      UNROLL for (int i = 0; i < kAddresses; i++) at[i] = address + i * stride;
      for (int i = 0; i < run; i += kAddresses, at += kAddresses * stride) store(reinterpret_cast<uint64_t*>(rows + n + i), at);
    });
  }
  void read_scales(Acc* out, const CacheView& view, int64_t b, int64_t kv_head, int64_t begin, int count) const {
    for_runs(b, begin, count, [&](int64_t page, int64_t, int n, int run) {
      for (int k = 0; k < run; k++) out[n + k] = view.scale[page * shape.kv_heads + kv_head];
    });
  }
  static void widen_rows(Acc* wide, const void** rows, int count, const Operand& operand) {
    for (int n = 0; n < count; n++, wide += operand.padded_columns()) {
      load_row(wide, static_cast<const C*>(rows[n]), operand.columns, operand.padded_columns());
      rows[n] = wide;
    }
  }
  // The addresses of a tile: keys, from a multiple of kKeyQuantum on values, then what is next.  Returns where values start.
  int load_tile(Scratch& c, int64_t b, int64_t kv_head, int64_t begin, int count, int64_t end) const {
    const int padded = static_cast<int>(round_up(count, kKeyQuantum)), next = padded + count;
    point(c.rows, p.key_cache, b, kv_head, begin, count);
    for (int n = count; n < padded; n++) c.rows[n] = c.rows[count - 1];
    point(c.rows + padded, p.value_cache, b, kv_head, begin, count);
    const int following = static_cast<int>(min_i64(ahead, end - (begin + count)));
    point(c.rows + next, p.key_cache, b, kv_head, begin + count, following);
    for (int n = following; n < ahead; n++) c.rows[next + n] = c.rows[next + n - 1];
    if (p.key_cache.scale) read_scales(c.key_scale, p.key_cache, b, kv_head, begin, count);
    if (p.value_cache.scale) read_scales(c.value_scale, p.value_cache, b, kv_head, begin, count);
    if (key.widened) {
      widen_rows(c.wide_keys, c.rows, count, key);
      for (int n = count; n < padded; n++) c.rows[n] = c.rows[count - 1];
    }
    if (value.widened) widen_rows(c.wide_values, c.rows + padded, count, value);
    return padded;
  }

  // ---------------------------------------------------------------- one range of keys
  // Scores of a row -> weights, in place.
  void weigh(Scratch& c, int64_t b, int64_t kv_head, int64_t row, int64_t begin, int count) const {
    Acc* const s = c.s + row * kTile;
    const int padded = static_cast<int>(round_up(count, 2 * W));
    if (p.key_cache.scale) {
      for (int n = 0; n < count; n += W) store(s + n, load(s + n) * load(c.key_scale + n));
    }
    if (p.score.softcap > 0) {
      const Acc cap = static_cast<Acc>(p.score.softcap * kLog2E), inverse = 1 / cap;
      for (int n = 0; n < count; n += W) store(s + n, tanh<Acc>(load(s + n) * inverse) * cap);
    }
    if (p.score.alibi_slopes) add_alibi(s, b, kv_head, row, begin, count);
    const KeyInterval seen = visible(b, row, begin, count);
    for (int64_t n = 0; n < seen.lo; n++) s[n] = -std::numeric_limits<Acc>::infinity();
    for (int64_t n = seen.hi; n < padded; n++) s[n] = -std::numeric_limits<Acc>::infinity();

    V top[2] = {splat(std::numeric_limits<Acc>::lowest()), splat(std::numeric_limits<Acc>::lowest())}, sum[2] = {};
    for (int n = 0; n < padded; n += 2 * W) {
      UNROLL for (int i = 0; i < 2; i++) top[i] = max(load(s + n + i * W), top[i]);
    }
    Softmax state = c.state[row];
    c.alpha[row] = state.raise(max_of_lanes<Acc>(max(top[0], top[1])))[0];
    for (int n = 0; n < padded; n += 2 * W) {
      UNROLL for (int i = 0; i < 2; i++) {
        Acc* const at = s + n + i * W;
        const V w = state.weight(load(at));
        sum[i] += w;
        store(at, p.value_cache.scale ? w * load(c.value_scale + n + i * W) : w);
      }
    }
    state.add(sum[0] + sum[1]);
    c.state[row] = state;
  }
  void add_alibi(Acc* s, int64_t b, int64_t kv_head, int64_t row, int64_t begin, int count) const {
    const int64_t head = kv_head * group + row % group;
    const double slope = p.score.alibi_slopes[b * p.score.alibi_stride_batch + head];
    const V factor = splat(static_cast<Acc>(-slope * kLog2E));
    V distance{};
    for (int lane = 0; lane < W; lane++) distance[lane] = static_cast<Acc>(p.position(b, row / group) - begin - lane);
    for (int n = 0; n < count; n += W, distance -= static_cast<Acc>(W)) {
      store(s + n, fma(max(distance, -distance), factor, load(s + n)));
    }
  }

  template <int R>
  void attend_range(Scratch& c, const Shared& shared, int64_t unit, int64_t b, int64_t kv_head, KeyInterval keys) const {
    const Acc* const q = shared.q + (b * shape.kv_heads + kv_head) * padded_rows * q_row;
    Acc* const o = shared.o + unit * padded_rows * o_row;
    std::memset(o, 0, padded_rows * o_row * sizeof(Acc));
    for (int64_t row = 0; row < padded_rows; row++) c.state[row] = Softmax{};
    for (int64_t begin = keys.lo; begin < keys.hi; begin += kTile) {
      const int count = static_cast<int>(min_i64(kTile, keys.hi - begin));
      const int values = load_tile(c, b, kv_head, begin, count, keys.hi);
      key.with_products([&](auto products, const auto& chunks) {
        for (int64_t row = 0; row < rows; row += R) {
          products.template score<R>(c.s + row * kTile, kTile, q + row * q_row, q_row, c.rows, ahead, count, chunks);
        }
      });
      for (int64_t row = 0; row < rows; row++) weigh(c, b, kv_head, row, begin, count);
      value.with_products([&](auto products, const auto& chunks) {
        const auto add = [&](auto r, int64_t row, KeyInterval seen) {
          products.template add_values<r>(o + row * o_row, o_row, c.alpha + row, c.s + row * kTile + seen.lo, kTile,
                                          c.rows + values + seen.lo, ahead, static_cast<int>(seen.hi - seen.lo), chunks, row == 0);
        };
        for (int64_t row = 0; row < rows; row += R) {  // a row's sum never meets a value that it does not see
          const int64_t last = min_i64(rows, row + R) - 1;
          const KeyInterval seen = visible(b, row, begin, count), of_last = visible(b, last, begin, count);
          if (last == row + R - 1 && seen.lo == of_last.lo && seen.hi == of_last.hi) {
            add(Int<R>{}, row, seen);
          } else {
            for (int64_t i = row; i <= last; i++) add(Int<1>{}, i, visible(b, i, begin, count));
          }
        }
      });
    }
    for (int64_t row = 0; row < rows; row++) {
      shared.m[unit * padded_rows + row] = c.state[row].m[0];
      Acc sum = 0;
      for (int lane = 0; lane < W; lane++) sum += c.state[row].l[lane];
      shared.l[unit * padded_rows + row] = sum;
    }
  }

  // ---------------------------------------------------------------- before and after
  static void read_row(Acc* out, DType dtype, const ConstTensorView& view, int64_t b, int64_t head, int64_t row, int64_t columns,
                   int64_t padded) {
    with_row<Acc>(dtype, view, b, head, row, [&](const auto* numbers) { load_row(out, numbers, columns, padded); });
  }
  void rotate(Scratch& c, Acc* x, int64_t position) const {
    const auto& rotary = p.rotary;
    read_row(c.cos, rotary.dtype, rotary.cos, 0, 0, position, rotary.half, rotary.half);
    read_row(c.sin, rotary.dtype, rotary.sin, 0, 0, position, rotary.half, rotary.half);
    const int64_t step = rotary.interleaved ? 2 : 1, apart = rotary.interleaved ? 1 : rotary.half;
    for (int64_t i = 0; i < rotary.half; i++) {
      Acc &a = x[i * step], &b = x[i * step + apart];
      const Acc a0 = a, b0 = b;
      a = a0 * c.cos[i] - b0 * c.sin[i];
      b = b0 * c.cos[i] + a0 * c.sin[i];
    }
  }
  void load_queries(Scratch& c, const Shared& shared, int64_t b, int64_t kv_head) const {
    Acc* const q = shared.q + (b * shape.kv_heads + kv_head) * padded_rows * q_row;
    const Acc factor = static_cast<Acc>(p.score.scale * kLog2E);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t query = row / group, position = p.position(b, query);
      read_row(c.row, p.dtype, p.query, b, kv_head * group + row % group, query, shape.head_dim, key.padded_columns());
      if (p.rotary.cos.data && position >= 0) rotate(c, c.row, position);
      for (int64_t d = 0; d < key.padded_columns(); d += W) store(c.row + d, load(c.row + d) * factor);
      key.with_products([&](auto, const auto& chunks) { chunks.pack(q + row * q_row, c.row); });
    }
    std::memset(q + rows * q_row, 0, (padded_rows - rows) * q_row * sizeof(Acc));
  }
  void append(Scratch& c, int64_t b, int64_t kv_head) const {
    for (int64_t i = 0; i < shape.kv_len; i++) {
      const int64_t position = p.lengths[b] + i;
      read_row(c.row, p.dtype, p.new_key, b, kv_head, i, shape.head_dim, shape.head_dim);
      if (p.rotary.cos.data) rotate(c, c.row, position);
      append_row(c.row, p.key_cache, shape.head_dim, b, kv_head, position);
      read_row(c.row, p.dtype, p.new_value, b, kv_head, i, shape.value_dim, shape.value_dim);
      append_row(c.row, p.value_cache, shape.value_dim, b, kv_head, position);
    }
  }
  void append_row(const Acc* row, const CacheView& view, int64_t columns, int64_t b, int64_t kv_head, int64_t position) const {
    for_runs(b, position, 1, [&](int64_t page, int64_t at, int, int) {
      C* const out = row_pointer<C>(view, page, kv_head, at);
      if constexpr (sizeof(C) == 1) {
        const Acc scale = view.scale[page * shape.kv_heads + kv_head];  // not 0; its inverse may be infinite
        for (int64_t d = 0; d < columns; d++) out[d] = from_float<C>(row[d] / scale);
      } else {
        store_row(out, row, columns);
      }
    });
  }

  // Merges the states of all ranges, in order, in place of the first; lanes are rows.
  void merge_ranges(Scratch& c, const Shared& shared, int64_t b, int64_t kv_head) const {
    const int64_t unit = shared.first_unit[b] + kv_head, splits = splits_of(b);
    for (int64_t row = 0; row < rows; row += W) {
      const int count = static_cast<int>(min_i64(W, rows - row));
      Softmax state = p.score.sinks ? after_sinks(kv_head, row, count) : Softmax{};
      for (int64_t split = 0; split < splits; split++) {
        Softmax range;
        const int64_t at = (unit + split * shape.kv_heads) * padded_rows + row;
        std::memcpy(&range.m, shared.m + at, count * sizeof(Acc));
        std::memcpy(&range.l, shared.l + at, count * sizeof(Acc));
        V theirs;
        const V own = state.merge(range, &theirs);
        for (int i = 0; i < count; i++) {
          Acc* const o = shared.o + (unit * padded_rows + row + i) * o_row;
          const Acc* const other = o + split * shape.kv_heads * padded_rows * o_row;
          for (int64_t d = 0; d < o_row; d += W) {
            const V added = load(other + d) * theirs[i];
            store(o + d, split ? fma(load(o + d), splat(static_cast<Acc>(own[i])), added) : added);
          }
        }
      }
      const V inverse = state.l == 0 ? V{} : 1 / state.l, log2_l = log2<Acc>(state.l * kHeadroomFactor);
      for (int i = 0; i < count; i++) {
        const int64_t query = (row + i) / group, head = kv_head * group + (row + i) % group;
        if (splits) {
          value.with_products([&](auto, const auto& chunks) {
            chunks.unpack(c.row, shared.o + (unit * padded_rows + row + i) * o_row);
          });
        } else {
          std::memset(c.row, 0, shape.value_dim * sizeof(Acc));
        }
        with_row<Acc>(p.dtype, p.out, b, head, query, [&](auto* out) {
          store_row(out, c.row, shape.value_dim, static_cast<Acc>(inverse[i]));
        });
        if (p.lse) {
          static_cast<Acc*>(p.lse)[(b * shape.heads + head) * shape.query_len + query] =
              RowStatistics<Acc>::of(state.m[i], state.l[i], log2_l[i]).lse;
        }
      }
    }
  }
  Softmax after_sinks(int64_t kv_head, int64_t row, int count) const {
    alignas(V) Acc sinks[W] = {};
    for (int i = 0; i < count; i++) sinks[i] = bias_in_log2<Acc>(p.score.sinks[kv_head * group + (row + i) % group]);
    return Softmax(load(sinks));
  }

 public:
  explicit Decode(const DecodeParams& params) : p(params) {}

  void run(const Executor& executor) const {
    if (shape.batch == 0 || shape.kv_heads == 0) return;
    const int64_t heads = shape.batch * shape.kv_heads;
    int64_t units = 0, keys = 0;
    for (int64_t b = 0; b < shape.batch; b++) {
      units += splits_of(b) * shape.kv_heads;
      keys += max_i64(0, p.total(b) - p.first_key(b));
    }
    const double width = static_cast<double>(shape.head_dim + shape.value_dim);
    const int threads = useful_threads(executor, keys * width * shape.heads * shape.query_len, units);
    const int preparing = useful_threads(executor, heads * width * (rows + shape.kv_len), heads);

    Pieces measure(nullptr);
    Scratch scratch;
    scratch.take(measure, *this);
    const size_t per_thread = measure.used();
    const auto take_shared = [&](Pieces& pieces) {
      return Shared{pieces.take<Acc>(heads * padded_rows * q_row), pieces.take<int64_t>(shape.batch + 1),
                    pieces.take<Acc>(units * padded_rows), pieces.take<Acc>(units * padded_rows),
                    pieces.take<Acc>(units * padded_rows * o_row)};
    };
    Pieces shared_measure(nullptr);
    take_shared(shared_measure);
    const int most_threads = threads > preparing ? threads : preparing;
    const Workspace workspace(per_thread * most_threads + shared_measure.used());
    Pieces shared_pieces(workspace.data() + per_thread * most_threads);
    const Shared shared = take_shared(shared_pieces);
    const auto scratch_of = [&](int thread) {
      Pieces pieces(workspace.data() + per_thread * thread);
      Scratch c;
      c.take(pieces, *this);
      return c;
    };

    shared.first_unit[0] = 0;
    for (int64_t b = 0; b < shape.batch; b++) shared.first_unit[b + 1] = shared.first_unit[b] + splits_of(b) * shape.kv_heads;
    parallel_tasks(executor, preparing, heads, [&](int thread, int64_t head) {
      Scratch c = scratch_of(thread);
      append(c, head / shape.kv_heads, head % shape.kv_heads);
      load_queries(c, shared, head / shape.kv_heads, head % shape.kv_heads);
    });
    if (rows == 0) return;
    parallel_tasks(executor, threads, units, [&](int thread, int64_t unit) {
      Scratch c = scratch_of(thread);
      int64_t b = 0;
      for (int64_t end = shape.batch; end - b > 1;) {  // the last sequence whose first unit is not beyond this one
        const int64_t middle = (b + end) / 2;
        if (shared.first_unit[middle] <= unit) b = middle;
        else end = middle;
      }
      const KeyInterval all = keys_of(b);
      const int64_t step = keys_per_split(all), within = unit - shared.first_unit[b], kv_head = within % shape.kv_heads;
      const int64_t begin = all.lo + within / shape.kv_heads * step;
      const KeyInterval range{begin, min_i64(all.hi, begin + step)};
      if constexpr (kManyInstances<Acc, C>) {
        if (rows == 1) return attend_range<1>(c, shared, unit, b, kv_head, range);
      }
      attend_range<kRows>(c, shared, unit, b, kv_head, range);
    });
    parallel_tasks(executor, preparing, heads, [&](int thread, int64_t head) {
      Scratch c = scratch_of(thread);
      merge_ranges(c, shared, head / shape.kv_heads, head % shape.kv_heads);
    });
  }
};

template <class T>
void decode(const DecodeParams& params, const Executor& executor) {
  if constexpr (!std::is_same_v<T, double>) {
    if (params.format == CacheFormat::int8) return Decode<float, int8_t>(params).run(executor);
    if (params.format == CacheFormat::float8_e4m3) return Decode<float, Float8E4M3>(params).run(executor);
  }
  Decode<decltype(to_float(T{})), T>(params).run(executor);
}

}  // namespace
}  // namespace attn_ext::cpu
