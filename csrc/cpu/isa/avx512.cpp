// AVX-512 F, BW, DQ and VL.
#include "cpu/isa/headers.h"

#define ATTN_EXT_VECTOR_BYTES 64
#define ATTN_EXT_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "cpu/kernels.inl"

namespace attn_ext::cpu {
extern const KernelTable avx512_kernels;
const KernelTable avx512_kernels = {ATTN_EXT_KERNELS(flash_forward), ATTN_EXT_KERNELS(flash_backward),
                                    {decode<float>, decode<double>, decode<Float16>, decode<BFloat16>}};
}  // namespace attn_ext::cpu
#pragma GCC pop_options
