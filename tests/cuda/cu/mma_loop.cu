// A loop of `steps` turns with eight products each, and one of sums; exponentials after both.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(32) mma_loop(const uint4* a, const uint2* b, float* out, int steps) {
  float d[8][4] = {}, sum = 0.f;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const uint4 va = a[step * 32 + threadIdx.x];
    const uint32_t fa[4] = {va.x, va.y, va.z, va.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint2 vb = b[(step * 8 + j) * 32 + threadIdx.x];
      const uint32_t fb[2] = {vb.x, vb.y};
      mma_bf16(d[j], fa, fb);
    }
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) sum += out[step];
  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) out[(j * 4 + e) * 32 + threadIdx.x] = exp2f(d[j][e]) + sum;
}
