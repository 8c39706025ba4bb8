// AVX2 with FMA and F16C.
#include "cpu/isa/headers.h"

#define ATTN_EXT_VECTOR_BYTES 32
#define ATTN_EXT_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "cpu/kernels.inl"

namespace attn_ext::cpu {
extern const KernelTable avx2_kernels;
const KernelTable avx2_kernels = {ATTN_EXT_KERNELS(flash_forward), ATTN_EXT_KERNELS(flash_backward),
                                  {decode<float>, decode<double>, decode<Float16>, decode<BFloat16>}};
}  // namespace attn_ext::cpu
#pragma GCC pop_options
