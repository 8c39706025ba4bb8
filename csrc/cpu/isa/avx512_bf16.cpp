// AVX-512 with bf16 products: bf16 only, all else is AVX-512.
#include "cpu/isa/headers.h"

#define ATTN_EXT_VECTOR_BYTES 64
#define ATTN_EXT_AVX512
#define ATTN_EXT_AVX512_BF16
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "cpu/kernels.inl"

namespace attn_ext::cpu {
extern const KernelTable avx512_bf16_kernels;
const KernelTable avx512_bf16_kernels = {
    {nullptr, nullptr, nullptr, flash_forward<BFloat16Arithmetic, BFloat16>},
    {nullptr, nullptr, nullptr, flash_backward<BFloat16Arithmetic, BFloat16>},
    {},  // the products of bf16 are slower than unpacking to fp32
};
}  // namespace attn_ext::cpu
#pragma GCC pop_options
