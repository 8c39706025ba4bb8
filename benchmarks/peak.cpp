// The arithmetic peak of one core: chains of multiply-adds on registers, with no memory traffic.
// bench_peak_gflops(name) runs the instruction of that name and returns GFLOP/s of thread CPU time; 0 if the
// processor or the compiler's target lacks it.
#include <algorithm>
#include <cstring>
#include <ctime>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int kChains = 12;  // latency 4-6 times 2 issued a cycle, and 12 + 2 fit the 16 registers of AVX2
constexpr long kRepeats = 100'000;
constexpr int kTries = 60;

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// A function per instruction, because each needs its own target.  The asm statement makes every chain opaque:
// the compiler can neither fold iterations nor drop the result.
#define PEAK_FUNCTION(NAME, ATTRIBUTES, REGISTER, VECTOR, BROADCAST, STEP, FLOPS_PER_STEP)                   \
  ATTRIBUTES double NAME() {                                                                                 \
    VECTOR a[kChains];                                                                                       \
    _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) a[i] = BROADCAST(1.0f);                       \
    const VECTOR b = BROADCAST(0.999f);                                                                      \
    const VECTOR c = BROADCAST(1e-3f);                                                                       \
    double best = 1e30;                                                                                      \
    for (int attempt = 0; attempt < kTries; ++attempt) {                                                     \
      const double start = thread_seconds();                                                                 \
      for (long repeat = 0; repeat < kRepeats; ++repeat) {                                                   \
        _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) a[i] = STEP(a[i], b, c);                  \
        asm volatile(""                                                                                      \
                     : "+" REGISTER(a[0]), "+" REGISTER(a[1]), "+" REGISTER(a[2]), "+" REGISTER(a[3]),       \
                       "+" REGISTER(a[4]), "+" REGISTER(a[5]), "+" REGISTER(a[6]), "+" REGISTER(a[7]),       \
                       "+" REGISTER(a[8]), "+" REGISTER(a[9]), "+" REGISTER(a[10]), "+" REGISTER(a[11]));    \
      }                                                                                                      \
      best = std::min(best, thread_seconds() - start);                                                       \
    }                                                                                                        \
    return 1e-9 * FLOPS_PER_STEP * kChains * kRepeats / best;                                                \
  }

#if defined(__x86_64__)
#define MULTIPLY_ADD_SSE(A, B, C) _mm_add_ps(_mm_mul_ps(A, B), C)
#define DOT_BF16(A, B, C) _mm512_dpbf16_ps(A, (__m512bh)(B), (__m512bh)(C))
PEAK_FUNCTION(peak_sse2, , "x", __m128, _mm_set1_ps, MULTIPLY_ADD_SSE, 8.0)
PEAK_FUNCTION(peak_avx2, __attribute__((target("avx2,fma"))), "x", __m256, _mm256_set1_ps, _mm256_fmadd_ps,
              16.0)
PEAK_FUNCTION(peak_avx512, __attribute__((target("avx512f"))), "v", __m512, _mm512_set1_ps, _mm512_fmadd_ps,
              32.0)
PEAK_FUNCTION(peak_avx512_bf16, __attribute__((target("avx512f,avx512bf16"))), "v", __m512, _mm512_set1_ps,
              DOT_BF16, 64.0)
#elif defined(__aarch64__)
#define MULTIPLY_ADD_NEON(A, B, C) vfmaq_f32(C, A, B)
PEAK_FUNCTION(peak_neon, , "w", float32x4_t, vdupq_n_f32, MULTIPLY_ADD_NEON, 8.0)
#endif

}  // namespace

extern "C" double bench_peak_gflops(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(name, "sse2")) return peak_sse2();
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return peak_avx2();
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f")) return peak_avx512();
  if (!std::strcmp(name, "avx512_bf16") && __builtin_cpu_supports("avx512bf16")) return peak_avx512_bf16();
#elif defined(__aarch64__)
  if (!std::strcmp(name, "neon")) return peak_neon();
#endif
  return 0.0;
}
