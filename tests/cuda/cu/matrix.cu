// Matrices through ldmatrix and mma: C = A B^T of a 16 x k and an 8 x k matrix.
//
// ldmatrix puts 16 bytes of a row where mma wants them, whatever the type: k is 16 or 32 bytes wide.
#include "ptx.cuh"

template <int Bytes, void (*Multiply)(float (&)[4], const uint32_t (&)[Bytes / 8], const uint32_t (&)[Bytes / 16])>
DEVICE void product(const uint4* a, const uint4* b, float* c) {
  constexpr int kChunks = Bytes / 16;
  __shared__ uint4 a_rows[16 * kChunks], b_rows[8 * kChunks];
  const int lane = threadIdx.x;
  if (lane < 16 * kChunks) a_rows[lane] = a[lane];
  if (lane < 8 * kChunks) b_rows[lane] = b[lane];
  __syncwarp();
  uint32_t fa[Bytes / 8], fb[Bytes / 16];
  ldmatrix(fa, &a_rows[lane % 16 * kChunks + lane / 16 % kChunks]);
  ldmatrix(fb, &b_rows[lane % 8 * kChunks + lane / 8 % kChunks]);
  const int at = lane / 4 * 8 + lane % 4 * 2;
  float d[4] = {c[at], c[at + 1], c[at + 64], c[at + 65]};
  Multiply(d, fa, fb);
  c[at] = d[0], c[at + 1] = d[1], c[at + 64] = d[2], c[at + 65] = d[3];
}

extern "C" __global__ void product_f16_k8(const uint4* a, const uint4* b, float* c) {
  product<16, mma_f16_k8>(a, b, c);
}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
extern "C" __global__ void product_bf16_k8(const uint4* a, const uint4* b, float* c) {
  product<16, mma_bf16_k8>(a, b, c);
}
extern "C" __global__ void product_f16(const uint4* a, const uint4* b, float* c) { product<32, mma_f16>(a, b, c); }
extern "C" __global__ void product_bf16(const uint4* a, const uint4* b, float* c) { product<32, mma_bf16>(a, b, c); }
extern "C" __global__ void product_tf32(const uint4* a, const uint4* b, float* c) { product<32, mma_tf32>(a, b, c); }

// C = A B of 16 x 16 and 16 x 8, B by rows.
extern "C" __global__ void product_transposed(const uint4* a, const uint4* b, float* c) {
  __shared__ uint4 a_rows[32], b_rows[16];
  const int lane = threadIdx.x;
  a_rows[lane] = a[lane];
  if (lane < 16) b_rows[lane] = b[lane];
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix(fa, &a_rows[lane % 16 * 2 + lane / 16]);
  ldmatrix_transposed(fb, &b_rows[lane % 16]);
  float d[4] = {};
  mma_f16(d, fa, fb);
  const int at = lane / 4 * 8 + lane % 4 * 2;
  c[at] = d[0], c[at + 1] = d[1], c[at + 64] = d[2], c[at + 65] = d[3];
}
#endif

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// Four 8 x 8 matrices to registers and back, the second time transposed.
extern "C" __global__ void store_matrices(const uint4* in, uint4* out, uint4* transposed) {
  __shared__ uint4 rows[32];
  const int lane = threadIdx.x;
  rows[lane] = in[lane];
  __syncwarp();
  uint32_t r[4];
  ldmatrix(r, &rows[lane]);
  __syncwarp();
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(&rows[lane])),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
  __syncwarp();
  out[lane] = rows[lane];
  __syncwarp();
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(&rows[lane])),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
  __syncwarp();
  transposed[lane] = rows[lane];
}
#endif
