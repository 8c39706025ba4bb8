// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include "cpu/isa/headers.h"

#define ATTN_EXT_VECTOR_BYTES 16
#include "cpu/kernels.inl"

namespace attn_ext::cpu {
extern const KernelTable baseline_kernels;
const KernelTable baseline_kernels = {ATTN_EXT_KERNELS(flash_forward), ATTN_EXT_KERNELS(flash_backward),
                                      {decode<float>, decode<double>, decode<Float16>, decode<BFloat16>}};
}  // namespace attn_ext::cpu
