// The vector vocabulary: GCC/Clang vector types of the native width plus the few operations they lack.
// Included once per instruction set, inside its target region (see isa/*.cpp), which defines ATTN_EXT_VECTOR_BYTES
// and one of ATTN_EXT_AVX2, ATTN_EXT_AVX512 where their intrinsics may be used.
// Everything lives in an anonymous namespace: two instruction sets never share a function.
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace attn_ext::cpu {
namespace {

constexpr int kVectorBytes = ATTN_EXT_VECTOR_BYTES;
#if defined(ATTN_EXT_AVX512) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

template <class E>
struct VectorOf {
  typedef E type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef E unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(1)));
};
template <class E>
using Vec = typename VectorOf<E>::type;
template <class E>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(E));

template <class E>
struct IntOf;
template <>
struct IntOf<float> { using type = int32_t; };
template <>
struct IntOf<double> { using type = int64_t; };
template <class E>
using IntVec = Vec<typename IntOf<E>::type>;

template <class E>
INLINE Vec<E> load(const E* p) { return *reinterpret_cast<const typename VectorOf<E>::unaligned*>(p); }
template <class E>
INLINE void store(E* p, Vec<E> v) { *reinterpret_cast<typename VectorOf<E>::unaligned*>(p) = v; }
// x - 0 is x for every x, so this is a broadcast and no subtraction.
template <class E>
INLINE Vec<E> splat(E x) { return x - Vec<E>{}; }
INLINE Vec<uint32_t> splat(uint32_t x) { return x - Vec<uint32_t>{}; }
INLINE Vec<uint64_t> splat(uint64_t x) { return x - Vec<uint64_t>{}; }
// An integer in every lane of a vector of as many lanes as Vec<E> has.
template <class E>
INLINE IntVec<E> splat_int(int32_t x) { return static_cast<typename IntOf<E>::type>(x) - IntVec<E>{}; }

// One number as a lane of the vector fma would have it.
template <class E>
INLINE E fma(E a, E b, E c) requires std::is_floating_point_v<E> {
#if defined(ATTN_EXT_AVX512) || defined(ATTN_EXT_AVX2) || defined(__aarch64__)
  if constexpr (sizeof(E) == 4) return __builtin_fmaf(a, b, c);
  else return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// max(a, b) and min(a, b) are b when either is NaN, as on x86.
#if defined(ATTN_EXT_AVX512)
INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b); }
INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(ATTN_EXT_AVX2)
INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b); }
INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
#if defined(__SSE2__)
INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b); }
INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_max_pd((__m128d)a, (__m128d)b); }
INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_min_ps((__m128)a, (__m128)b); }
INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_min_pd((__m128d)a, (__m128d)b); }
#else
template <class V>
INLINE V max(V a, V b) { return a > b ? a : b; }
template <class V>
INLINE V min(V a, V b) { return a < b ? a : b; }
#endif
#if defined(__aarch64__)
INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
INLINE V fma(V a, V b, V c) { return a * b + c; }
#endif
#endif

// x where it is infinite, elsewhere the other.
#if defined(ATTN_EXT_AVX512)
INLINE Vec<float> keep_infinities(Vec<float> x, Vec<float> other) {
  return (Vec<float>)_mm512_mask_mov_ps((__m512)other, _mm512_fpclass_ps_mask((__m512)x, 0x18), (__m512)x);
}
INLINE Vec<double> keep_infinities(Vec<double> x, Vec<double> other) {
  return (Vec<double>)_mm512_mask_mov_pd((__m512d)other, _mm512_fpclass_pd_mask((__m512d)x, 0x18), (__m512d)x);
}
#else
template <class V>
INLINE V keep_infinities(V x, V other) {
  return max(x, -x) == std::numeric_limits<std::decay_t<decltype(x[0])>>::infinity() ? x : other;
}
#endif

// 2^(x - Shift): x is split into an integer n and a fraction f in [-1/2, 1/2] by adding 1.5 * 2^(mantissa bits), which leaves
// n + bias in the low bits, in place to become the exponent of 2^n by one shift.  Below 2^-80 (float64: 2^-900) the result
// is exactly 0: masked scores (-inf) get no weight, and neither the weights nor their products with numbers of ordinary
// size are subnormal, which would take a hundred times as long.  NaN stays NaN.  The polynomials are minimax on the
// fraction: relative error 7.5e-8 (degree 5; 3 ulp with all roundings), 7.5e-5 (degree 3, where the weight is then rounded
// to bf16: 2e-3).  float64 takes Taylor to 1e-17.
template <int Degree, int Shift = 0>
INLINE Vec<float> exp2(Vec<float> x) {
  static constexpr float c5[] = {1.000000072f,    6.931469671e-1f, 2.402211972e-1f,
                                 5.550713277e-2f, 9.675541571e-3f, 1.327647141e-3f};
  static constexpr float c3[] = {9.999280727e-1f, 6.932609877e-1f, 2.426111369e-1f, 5.517166392e-2f};
  static_assert(Degree == 5 || Degree == 3);
  constexpr const float* c = Degree == 5 ? c5 : c3;
  const Vec<float> magic = splat(12582912.f + (127 - Shift));
  const Vec<float> t = x + magic, f = x - (t - magic);
  Vec<float> p = splat(c[Degree]);
  UNROLL for (int i = Degree - 1; i >= 0; i--) p = fma(p, f, splat(c[i]));
  return x < -80.f ? Vec<float>{} : p * (Vec<float>)((IntVec<float>)t << 23);
}
template <int Degree, int Shift = 0>
INLINE Vec<double> exp2(Vec<double> x) {
  const Vec<double> magic = splat(6755399441055744. + (1023 - Shift));
  const Vec<double> t = x + magic, f = (x - (t - magic)) * kLn2;
  Vec<double> p = splat(1. / 6227020800.);  // 1 / 13!
  double factorial = 1. / 6227020800.;
  UNROLL for (int i = 13; i > 0; i--) {
    factorial *= i;
    p = fma(p, f, splat(factorial));
  }
  return x < -900. ? Vec<double>{} : p * (Vec<double>)((IntVec<double>)t << 52);
}

// log2(x) of positive normal x, NaN of NaN: x = 2^e * y with y in [sqrt(1/2), sqrt(2)), log(y) = 2 atanh((y - 1) / (y + 1)).
template <class E>
INLINE Vec<E> log2(Vec<E> x) {
  constexpr int mantissa = sizeof(E) == 4 ? 23 : 52, terms = sizeof(E) == 4 ? 5 : 11;
  using I = IntVec<E>;
  using U = typename IntOf<E>::type;
  const U half_sqrt = sizeof(E) == 4 ? U(0x3f3504f3) : U(0x3fe6a09e667f3bcd);
  const I e = ((I)x - half_sqrt) >> mantissa;
  const Vec<E> y = (Vec<E>)((I)x - (e << mantissa));
  const Vec<E> s = (y - E(1)) / (y + E(1)), s2 = s * s;
  Vec<E> p = splat(E(1) / (2 * terms - 1));
  UNROLL for (int k = terms - 2; k >= 0; k--) p = fma(p, s2, splat(E(1) / (2 * k + 1)));
  return fma(p * s, splat(E(2 * kLog2E)), __builtin_convertvector(e, Vec<E>)) + (x - x);
}

// tanh(x), to a few units in the last place of the result, however small it is.  Near 0 Lambert's continued fraction
// x / (1 + x^2 / (3 + x^2 / (5 + ...))), by the recurrence of its convergents; elsewhere (e^2x - 1) / (e^2x + 1).
template <class E>
INLINE Vec<E> tanh(Vec<E> x) {
  using V = Vec<E>;
  constexpr int terms = sizeof(E) == 4 ? 5 : 9;
  const V x2 = x * x;
  V a0{}, a1 = x, b0 = splat(E(1)), b1 = b0;
  UNROLL for (int k = 2; k <= terms; k++) {
    const V a2 = fma(x2, a0, a1 * E(2 * k - 1)), b2 = fma(x2, b0, b1 * E(2 * k - 1));
    a0 = a1, a1 = a2, b0 = b1, b1 = b2;
  }
  const V limit = splat(E(30));  // beyond it e^2x is all there is; NaN stays NaN
  const V t = exp2<5>(max(-limit, min(limit, x)) * E(2 * kLog2E));
  const auto small = max(x, -x) <= E(0.5);
  return (small ? a1 : t - E(1)) / (small ? b1 : t + E(1));
}

// Philox (core/dropout.h) with a word in the low half of each 64-bit lane; what the high half holds does not matter.
struct VectorPhilox {
  using Word = Vec<uint64_t>;
  static INLINE Word splat(uint32_t x) { return cpu::splat(static_cast<uint64_t>(x)); }
  static INLINE Word product(Word a, uint32_t b) {
#if defined(ATTN_EXT_AVX512)
    return (Word)_mm512_mul_epu32((__m512i)a, (__m512i)splat(b));
#elif defined(ATTN_EXT_AVX2)
    return (Word)_mm256_mul_epu32((__m256i)a, (__m256i)splat(b));
#elif defined(__SSE2__)
    return (Word)_mm_mul_epu32((__m128i)a, (__m128i)splat(b));
#else
    return (a & 0xffffffff) * static_cast<uint64_t>(b);
#endif
  }
  static INLINE Word high(Word p) { return p >> 32; }
  static INLINE Word low(Word p) { return p; }
};

// Transposes a square of kLanes x kLanes elements held in registers: log2(kLanes) rounds of interleaving rows
// i and i + kLanes / 2.
template <class E, int... I>
INLINE Vec<E> interleave_low(Vec<E> a, Vec<E> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? kLanes<E> + I / 2 : I / 2)...);
}
template <class E, int... I>
INLINE Vec<E> interleave_high(Vec<E> a, Vec<E> b, std::integer_sequence<int, I...>) {
  constexpr int half = kLanes<E> / 2;
  return __builtin_shufflevector(a, b, (I % 2 ? kLanes<E> + half + I / 2 : half + I / 2)...);
}
template <class E>
INLINE void transpose(Vec<E> (&a)[kLanes<E>]) {
  constexpr int n = kLanes<E>;
  using Sequence = std::make_integer_sequence<int, n>;
  UNROLL for (int width = 1; width < n; width *= 2) {
    Vec<E> b[n];
    UNROLL for (int i = 0; i < n / 2; i++) {
      b[2 * i] = interleave_low<E>(a[i], a[i + n / 2], Sequence{});
      b[2 * i + 1] = interleave_high<E>(a[i], a[i + n / 2], Sequence{});
    }
    UNROLL for (int i = 0; i < n; i++) a[i] = b[i];
  }
}

#if defined(ATTN_EXT_AVX512)
// The same, by shuffles within quarters and of whole quarters, which overwrite no operand and need no index.
template <>
INLINE void transpose<float>(Vec<float> (&a)[16]) {
  __m512 r[16];  // quarter b of r[4 g + c] is column 4 b + c of rows 4 g .. 4 g + 3
  UNROLL for (int g = 0; g < 16; g += 4) {
    const __m512 x = (__m512)a[g], y = (__m512)a[g + 1], z = (__m512)a[g + 2], w = (__m512)a[g + 3];
    const __m512d xy_low = (__m512d)_mm512_unpacklo_ps(x, y), xy_high = (__m512d)_mm512_unpackhi_ps(x, y);
    const __m512d zw_low = (__m512d)_mm512_unpacklo_ps(z, w), zw_high = (__m512d)_mm512_unpackhi_ps(z, w);
    r[g] = (__m512)_mm512_unpacklo_pd(xy_low, zw_low);
    r[g + 1] = (__m512)_mm512_unpackhi_pd(xy_low, zw_low);
    r[g + 2] = (__m512)_mm512_unpacklo_pd(xy_high, zw_high);
    r[g + 3] = (__m512)_mm512_unpackhi_pd(xy_high, zw_high);
  }
  UNROLL for (int c = 0; c < 4; c++) {
    const __m512 low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44), high = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xee);
    const __m512 low2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44), high2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xee);
    a[c] = (Vec<float>)_mm512_shuffle_f32x4(low, low2, 0x88);
    a[4 + c] = (Vec<float>)_mm512_shuffle_f32x4(low, low2, 0xdd);
    a[8 + c] = (Vec<float>)_mm512_shuffle_f32x4(high, high2, 0x88);
    a[12 + c] = (Vec<float>)_mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}
#endif

// Lane i is lane i + Apart of a, or lane i - Apart of b where i has the bit Apart.
template <class E, int Apart, int... I>
INLINE Vec<E> lanes_across(Vec<E> a, Vec<E> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & Apart ? kLanes<E> + I - Apart : I + Apart)...);
}
template <class E, int Apart, int... I>
INLINE Vec<E> sums_of_pairs(Vec<E> a, Vec<E> b, std::integer_sequence<int, I...> lanes) {
  return __builtin_shufflevector(a, b, (I & Apart ? kLanes<E> + I : I)...) + lanes_across<E, Apart>(a, b, lanes);
}
// Lane i of the result is the sum of the lanes of a[i].  Two vectors become one by a blend, a shuffle and a sum: only one
// port of x86 shuffles wide vectors, two blend and add.
template <class E, int Apart = kLanes<E> / 2>
INLINE Vec<E> sums_of_lanes(const Vec<E>* a) {
  if constexpr (Apart == 0) {
    return a[0];
  } else {
    Vec<E> sums[Apart];
    UNROLL for (int i = 0; i < Apart; i++) {
      sums[i] = sums_of_pairs<E, Apart>(a[i], a[i + Apart], std::make_integer_sequence<int, kLanes<E>>{});
    }
    return sums_of_lanes<E, Apart / 2>(sums);
  }
}
// The largest lane, in every lane.
template <class E, int Apart = kLanes<E> / 2>
INLINE Vec<E> max_of_lanes(Vec<E> a) {
  if constexpr (Apart == 0) return a;
  else return max_of_lanes<E, Apart / 2>(max(a, lanes_across<E, Apart>(a, a, std::make_integer_sequence<int, kLanes<E>>{})));
}

// kLanes bytes as integers.
#if defined(ATTN_EXT_AVX512)
INLINE IntVec<float> widen_bytes(const uint8_t* p, float) {
  return (IntVec<float>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
INLINE IntVec<double> widen_bytes(const uint8_t* p, double) {
  return (IntVec<double>)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
}
#elif defined(ATTN_EXT_AVX2)
INLINE IntVec<float> widen_bytes(const uint8_t* p, float) {
  return (IntVec<float>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
INLINE IntVec<double> widen_bytes(const uint8_t* p, double) {
  return (IntVec<double>)_mm256_cvtepu8_epi64(_mm_loadu_si32(p));
}
#else
template <class E>
INLINE IntVec<E> widen_bytes(const uint8_t* p, E) {
  IntVec<E> v;
  UNROLL for (int i = 0; i < kLanes<E>; i++) v[i] = p[i];
  return v;
}
#endif

// kLanes elements of a storage type <-> a vector of the type computed in.
INLINE Vec<float> widen(const float* p) { return load(p); }
INLINE Vec<double> widen(const double* p) { return load(p); }
INLINE void narrow(float* p, Vec<float> v) { store(p, v); }
INLINE void narrow(double* p, Vec<double> v) { store(p, v); }
INLINE Vec<uint32_t> bfloat16_bits(Vec<float> v) {  // in the low halves
  const Vec<uint32_t> u = (Vec<uint32_t>)v;
  const Vec<uint32_t> rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return (u & 0x7fffffff) > 0x7f800000 ? (u >> 16 | 0x40) : rounded;
}
#if defined(ATTN_EXT_AVX512)
INLINE Vec<float> widen(const BFloat16* p) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE Vec<float> widen(const Float16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLINE Vec<float> widen(const int8_t* p) {
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// As fp16 whose exponent is 8 too small: the conversion knows subnormal numbers, at full speed.
INLINE Vec<float> widen(const Float8E4M3* p) {
  const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(~0x4000));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(bits, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x3f80));
  const __m256i with_nan = _mm256_mask_mov_epi16(bits, nan, _mm256_set1_epi16(0x7e00));
  return (Vec<float>)_mm512_mul_ps(_mm512_cvtph_ps(with_nan), _mm512_set1_ps(256));
}
INLINE void narrow(BFloat16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v)));
}
INLINE void narrow(Float16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(ATTN_EXT_AVX2)
INLINE Vec<float> widen(const BFloat16* p) {
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE Vec<float> widen(const Float16* p) { return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE Vec<float> widen(const int8_t* p) {
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// As fp16 whose exponent is 8 too small: the conversion knows subnormal numbers, at full speed.
INLINE Vec<float> widen(const Float8E4M3* p) {
  const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  const __m128i bits = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(~0x4000));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
  const __m128i with_nan = _mm_blendv_epi8(bits, _mm_set1_epi16(0x7e00), nan);
  return (Vec<float>)_mm256_mul_ps(_mm256_cvtph_ps(with_nan), _mm256_set1_ps(256));
}
INLINE void narrow(BFloat16* p, Vec<float> v) {
  const __m256i u = (__m256i)bfloat16_bits(v);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)));
}
INLINE void narrow(Float16* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class T>
INLINE Vec<float> widen(const T* p) {
  Vec<float> v;
  UNROLL for (int i = 0; i < kLanes<float>; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
INLINE void narrow(T* p, Vec<float> v) {
  UNROLL for (int i = 0; i < kLanes<float>; i++) p[i] = from_float<T>(static_cast<float>(v[i]));
}
#endif

}  // namespace
}  // namespace attn_ext::cpu
