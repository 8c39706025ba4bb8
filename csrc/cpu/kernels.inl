// Every kernel, once per instruction set: see isa/*.cpp.
#include "core/dropout.h"
#include "core/online_softmax.h"
#include "cpu/simd.h"
#include "cpu/microkernel.h"
#include "cpu/lane_math.inl"
#include "cpu/rows.inl"
#include "cpu/lane_blocks.inl"
#include "cpu/lane_mask.inl"
#include "cpu/score_terms.inl"
#include "cpu/dropout_tile.inl"
#include "cpu/key_tiles.inl"
#include "cpu/flash_forward.inl"
#include "cpu/bias_gradient.inl"
#include "cpu/flash_backward.inl"
#include "cpu/decode.inl"

// One function per dtype, in the order of DType.  fp16, and bf16 where the processor has no bf16 products, are widened
// once and computed in fp32.
#define ATTN_EXT_KERNELS(operation)                                                                       \
  {                                                                                                       \
    operation<PlainArithmetic<float>, float>, operation<PlainArithmetic<double>, double>,                 \
        operation<PlainArithmetic<float>, Float16>, operation<PlainArithmetic<float>, BFloat16>           \
  }
