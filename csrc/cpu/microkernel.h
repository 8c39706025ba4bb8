// The register-blocked product:
//
//   acc[r][v] += sum_k  a(r, k) * b(k)[v]        rows r, vectors v, k = 0 .. steps - 1
//
// a is broadcast word by word, b is loaded as vectors.  What a, b, rows and lanes mean (keys, queries, columns) is
// the caller's business: every product of the forward and backward passes is this block, walked differently (but for a few queries, which want
// another order: see flash_forward.inl).
// An arithmetic says what a word is: one number, or the two bf16 numbers that vdpbf16ps multiplies and adds at once.
namespace attn_ext::cpu {
namespace {

template <class E>
struct PlainArithmetic {
  using Acc = E;       // accumulator element
  using Word = E;      // what is broadcast, and what a lane of b holds
  static constexpr int kPerWord = 1;  // numbers along the reduction in a word
  static constexpr int kExp2Degree = 5;
  static INLINE Vec<E> multiply_add(Vec<E> a, Vec<E> b, Vec<E> acc) { return fma(a, b, acc); }
};

#if defined(ATTN_EXT_AVX512_BF16)
struct BFloat16Arithmetic {
  using Acc = float;
  using Word = uint32_t;  // the number with the lower index in the lower half
  static constexpr int kPerWord = 2;
  static constexpr int kExp2Degree = 3;
  static INLINE Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> acc) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  // The two numbers of a lane become its word.
  static INLINE Vec<uint32_t> pack(Vec<float> low, Vec<float> high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);  // 16 low, then 16 high
    return (Vec<uint32_t>)_mm512_permutexvar_epi16(
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                         18, 2, 17, 1, 16, 0),
        both);
  }
  // 2 x kLanes numbers in order.
  static INLINE Vec<uint32_t> concatenate(Vec<float> first, Vec<float> second) {
    return (Vec<uint32_t>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
};
#endif

// Register blocks are kMaxRows x 2 accumulators (24 of 32 registers, 12 of 16); rows come in multiples of kRowQuantum
// and remainders take 2/3 or 1/3 of a block.
constexpr int kMaxRows = kVectorRegisters == 32 ? 12 : 6;
constexpr int kRowQuantum = kMaxRows / 3;

template <int N>
using Int = std::integral_constant<int, N>;

// Calls f(Int<R>, first) for blocks that cover the rows [begin, end); end - begin is a multiple of Max / 3.  A block of
// Max / 3 rows has too few sums to hide their latency, so that 4/3 Max is taken as two blocks of 2/3 Max, unless every
// block must start a multiple of Max from `begin`.
template <int Max, bool Aligned = false, class F>
INLINE void for_row_blocks(int begin, int end, F&& f) {
  constexpr int kTwoThirds = 2 * Max / 3, kThird = Max / 3;
  int r = begin;
  for (; end - r >= Max && (Aligned || end - r != 2 * kTwoThirds); r += Max) f(Int<Max>{}, r);
  for (; end - r >= kTwoThirds; r += kTwoThirds) f(Int<kTwoThirds>{}, r);
  if (r < end) f(Int<kThird>{}, r);
}

template <class Arith, int R, int N, class RowStride, class StepStride>
INLINE void multiply_block(Vec<typename Arith::Acc> (&acc)[R][N], const typename Arith::Word* a, RowStride a_row,
                           StepStride a_step, const typename Arith::Word* b, int b_step, int64_t steps) {
  using Word = typename Arith::Word;
  const ptrdiff_t row = a_row, step = a_step;
  for (int64_t k = 0; k < steps; k++) {
    Vec<Word> bv[N];
    UNROLL for (int v = 0; v < N; v++) bv[v] = load(b + v * kLanes<Word>);
    UNROLL for (int r = 0; r < R; r++) {
      const Vec<Word> av = splat(a[r * row]);
      UNROLL for (int v = 0; v < N; v++) acc[r][v] = Arith::multiply_add(av, bv[v], acc[r][v]);
    }
    a += step;
    b += b_step;
  }
}

template <class V, int R, int N>
INLINE void clear_block(V (&acc)[R][N]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < N; v++) acc[r][v] = V{};
}

}  // namespace
}  // namespace attn_ext::cpu
