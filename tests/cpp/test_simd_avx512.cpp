#include "check.h"
#include "cpu/isa/headers.h"

#define ATTN_EXT_VECTOR_BYTES 64
#define ATTN_EXT_AVX512
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "core/dropout.h"
#include "core/online_softmax.h"
#include "cpu/simd.h"
#include "simd_checks.inl"
namespace attn_ext::cpu {
int run_checks();
int run_checks() { return check_all(); }
}  // namespace attn_ext::cpu
#pragma GCC pop_options

int main() {
  using namespace attn_ext::cpu;
  if (!isa_supported(Isa::avx512)) return std::printf("this processor has no AVX512\n") < 0;
  return run_checks();
}
#else
int main() { return 0; }
#endif
