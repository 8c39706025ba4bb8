// Which weights dropout keeps, as a tensor: for derivatives of derivatives, which are computed outside the kernels.
#include "core/dropout.h"
#include "cuda/launch.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) dropout_mask(const __grid_constant__ DropoutMaskParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.elements()) return;
  const int64_t row = i / p.kv_len, rows = p.query_end - p.query_begin, head = row / rows;
  p.mask[i] = keeps_weight(p.dropout, head / p.heads, head % p.heads, p.query_begin + row % rows, i % p.kv_len);
}

}  // namespace

void make_dropout_mask(const DropoutMaskParams& params, const Stream& stream) {
  const int64_t blocks = (params.elements() + kThreads - 1) / kThreads;
  if (blocks > std::numeric_limits<int32_t>::max()) throw std::runtime_error("dropout_mask: too many weights for one CUDA grid");
  if (blocks) launch<dropout_mask>("dropout_mask", blocks, kThreads, 0, stream, params);
}

}  // namespace attn_ext::cuda
