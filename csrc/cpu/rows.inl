// Rows of tensors <-> the layouts the kernels work on.
namespace attn_ext::cpu {
namespace {

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t div_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Numbers of a row as words, times factor; zeros up to `padded` words.
template <class E, class T>
INLINE void load_row(E* words, const T* row, int64_t count, int64_t padded, E factor = 1) {
  int64_t i = 0;
  for (; i + kLanes<E> <= count; i += kLanes<E>) store(words + i, widen(row + i) * factor);
  for (; i < count; i++) words[i] = to_float(row[i]) * factor;
  for (; i < padded; i++) words[i] = 0;
}
template <class E, class T>
INLINE void store_row(T* row, const E* values, int64_t count, E factor = 1) {
  int64_t i = 0;
  for (; i + kLanes<E> <= count; i += kLanes<E>) narrow(row + i, load(values + i) * factor);
  for (; i < count; i++) row[i] = from_float<T>(values[i] * factor);
}

// The rows of one word side by side: a row of words, from one row of numbers or two interleaved ones.  A null row reads
// as zeros.
template <class E, class T>
INLINE void load_word_row(E* words, const T* const* rows, int64_t columns, int64_t padded) {
  load_row(words, rows[0], rows[0] ? columns : 0, padded);
}
#if defined(ATTN_EXT_AVX512_BF16)
INLINE void load_row(uint32_t* words, const BFloat16* row, int64_t count, int64_t padded, uint32_t = 1) {
  if (count) std::memcpy(words, row, count * sizeof(BFloat16));
  std::memset(reinterpret_cast<BFloat16*>(words) + count, 0, padded * sizeof(uint32_t) - count * sizeof(BFloat16));
}
INLINE void load_word_row(uint32_t* words, const BFloat16* const* rows, int64_t columns, int64_t padded) {
  const BFloat16 *low = rows[0], *high = rows[1];
  int64_t i = 0;
  if (low && high) {
    for (; i + kLanes<uint32_t> <= columns; i += kLanes<uint32_t>) {
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + i)));
      const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + i)));
      store(words + i, (Vec<uint32_t>)_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
  for (; i < columns; i++) words[i] = (low ? low[i].bits : 0u) | static_cast<uint32_t>(high ? high[i].bits : 0) << 16;
  for (; i < padded; i++) words[i] = 0;
}
#endif

// `count` rows as rows of words; those from `valid` on are zeros.
template <int PerWord, class Word, class T>
INLINE void load_word_rows(Word* words, const T* rows, int64_t stride, int64_t valid, int64_t count, int64_t columns,
                           int64_t padded) {
  for (int64_t r = 0; r < count; r += PerWord) {
    const T* group[PerWord];
    for (int i = 0; i < PerWord; i++) group[i] = r + i < valid ? rows + (r + i) * stride : nullptr;
    load_word_row(words + r / PerWord * padded, group, columns, padded);
  }
}

// Whether all numbers are finite: 0 * x is 0 for every finite x and NaN for the others.
template <class T>
INLINE bool rows_are_finite(const T* rows, int64_t stride, int64_t count_rows, int64_t columns) {
  using E = decltype(to_float(*rows));
  Vec<E> zeros[4] = {};  // independent sums hide the latency of one
  E zero = 0;
  for (int64_t r = 0; r < count_rows; r++) {
    const T* const row = rows + r * stride;
    int64_t i = 0;
    for (; i + 4 * kLanes<E> <= columns; i += 4 * kLanes<E>) {
      UNROLL for (int k = 0; k < 4; k++) zeros[k] = fma(widen(row + i + k * kLanes<E>), Vec<E>{}, zeros[k]);
    }
    for (; i + kLanes<E> <= columns; i += kLanes<E>) zeros[0] = fma(widen(row + i), Vec<E>{}, zeros[0]);
    for (; i < columns; i++) zero += to_float(row[i]) * 0;
  }
  const Vec<E> sum = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
  for (int lane = 0; lane < kLanes<E>; lane++) zero += sum[lane];
  return zero == 0;
}
template <class T>
INLINE bool row_is_finite(const T* row, int64_t count) {
  return rows_are_finite(row, 0, 1, count);
}

// Number `which` of a word.
template <class E>
INLINE E number(E word, int) { return word; }
INLINE float number(uint32_t word, int which) { return to_float(BFloat16{static_cast<uint16_t>(word >> 16 * which)}); }

// out[c * out_stride + r] = in[r * in_stride + c] for kLanes rows r and `columns` (a multiple of kLanes) columns c.
template <class E>
INLINE void transpose_rows(E* out, int64_t out_stride, const E* in, int64_t in_stride, int64_t columns) {
  constexpr int W = kLanes<E>;
  for (int64_t c = 0; c < columns; c += W) {
    Vec<E> a[W];
    UNROLL for (int r = 0; r < W; r++) a[r] = load(in + r * in_stride + c);
    transpose<E>(a);
    UNROLL for (int r = 0; r < W; r++) store(out + (c + r) * out_stride, a[r]);
  }
}

struct WorkRow {
  int64_t head, query;
};

// The query rows that share a kv head, as rows of work.  Usually each head of the group is a segment of its own; when
// the queries of one head are fewer than are worked on together, all heads of the group are laid end to end in a single
// segment.
struct WorkRows {
  int64_t segments, rows;  // per kv head
  int64_t group, query_len;

  INLINE WorkRows(const AttentionShape& shape, int64_t rows_together) : group(shape.group()), query_len(shape.query_len) {
    const bool joined = group > 1 && query_len < rows_together;
    segments = joined ? 1 : group;
    rows = joined ? group * query_len : query_len;
  }
  INLINE WorkRow at(int64_t kv_head, int64_t segment, int64_t row) const {
    return {kv_head * group + segment + row / query_len, row % query_len};
  }
  INLINE void advance(WorkRow& row) const {
    if (++row.query == query_len) row = {row.head + 1, 0};
  }
};

template <class T, class Pointer>
INLINE auto row_pointer(const BasicTensorView<Pointer>& view, int64_t batch, int64_t head, int64_t row) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T, T>;
  return static_cast<Element*>(view.data) + batch * view.stride_batch + head * view.stride_head + row * view.stride_row;
}
template <class T, class Pointer>
INLINE auto row_pointer(const BasicTensorView<Pointer>& view, int64_t batch, WorkRow row) {
  return row_pointer<T>(view, batch, row.head, row.query);
}

}  // namespace
}  // namespace attn_ext::cpu
