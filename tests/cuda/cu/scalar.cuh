// What one thread computes: arithmetic, conversions, parameters, loads and stores of all sizes, control flow.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "scalar_ops.h"

extern "C" __global__ void scalar(const int* x, const int* y, const float* f, const float* g, int64_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) scalar_ops(x[i], y[i], f[i], g[i], out + i * kScalarResults);
}

// out: 8 x n
extern "C" __global__ void approximate(const float* x, float* out, int n) {
  const int i = threadIdx.x;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out[i]) : "f"(x[i]));
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out[n + i]) : "f"(x[i]));
  asm("tanh.approx.f32 %0, %1;" : "=f"(out[2 * n + i]) : "f"(x[i]));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out[3 * n + i]) : "f"(x[i]));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out[4 * n + i]) : "f"(x[i]));
  asm("add.ftz.f32 %0, %1, 0f00000000;" : "=f"(out[5 * n + i]) : "f"(x[i]));
}

// out: 3 x n
extern "C" __global__ void saturating(const float* x, int64_t* out, int n) {
  const int i = threadIdx.x;
  out[i] = __float2int_rz(x[i]), out[n + i] = __float2uint_rn(x[i]), out[2 * n + i] = __float2ll_rd(x[i]);
}

// Sum and difference of numbers of three limbs.
extern "C" __global__ void limbs(const uint32_t* a, const uint32_t* b, uint32_t* sum, uint32_t* difference) {
  const int i = 3 * threadIdx.x;
  asm("add.cc.u32 %0, %3, %6;\n addc.cc.u32 %1, %4, %7;\n addc.u32 %2, %5, %8;"
      : "=r"(sum[i]), "=r"(sum[i + 1]), "=r"(sum[i + 2])
      : "r"(a[i]), "r"(a[i + 1]), "r"(a[i + 2]), "r"(b[i]), "r"(b[i + 1]), "r"(b[i + 2]));
  asm("sub.cc.u32 %0, %3, %6;\n subc.cc.u32 %1, %4, %7;\n subc.u32 %2, %5, %8;"
      : "=r"(difference[i]), "=r"(difference[i + 1]), "=r"(difference[i + 2])
      : "r"(a[i]), "r"(a[i + 1]), "r"(a[i + 2]), "r"(b[i]), "r"(b[i + 1]), "r"(b[i + 2]));
}

// halves: 4 x n
extern "C" __global__ void half_precision(const float* x, const float* y, uint16_t* halves, float* back, int n) {
  const int i = threadIdx.x;
  const __nv_bfloat162 b = __floats2bfloat162_rn(x[i], y[i]);
  const __half2 h = __floats2half2_rn(x[i], y[i]);
  const __nv_bfloat162 b_sum = __hadd2(b, b);
  const __half2 h_sum = __hfma2(h, h, h);
  memcpy(halves + 2 * i, &b, 4), memcpy(halves + 2 * n + 2 * i, &h, 4);
  memcpy(halves + 4 * n + 2 * i, &b_sum, 4), memcpy(halves + 6 * n + 2 * i, &h_sum, 4);
  back[2 * i] = __bfloat162float(b.y), back[2 * i + 1] = __half2float(h.y);
}

struct Params {
  struct View {
    const void* data;
    int64_t stride_row, stride_column;
  } bytes, longs, doubles;
  double scale;
  int32_t rows;
  uint8_t tag;
  float table[200];
  const float* bias;  // or null
  float* out;
};
static_assert(sizeof(Params) == 904);

extern "C" __global__ void struct_parameter(const __grid_constant__ Params p) {
  const int row = threadIdx.x;
  if (row >= p.rows) return;
  const auto at = [row](const Params::View& view) { return row * view.stride_row + 2 * view.stride_column; };
  const uint8_t byte = static_cast<const uint8_t*>(p.bytes.data)[at(p.bytes)];
  const int64_t number = static_cast<const int64_t*>(p.longs.data)[at(p.longs)];
  const double real = static_cast<const double*>(p.doubles.data)[at(p.doubles)];
  p.out[row] = static_cast<float>(p.scale) * byte + number + static_cast<float>(real) + p.tag + p.table[byte % 200] +
               (p.bias ? p.bias[row] : 0.f);
}

// One copy of 16 bytes a thread, by elements of each size, and out again through shared memory.
template <class Element>
__device__ void move(const void* from, void* to) {
  __shared__ Element staging[32 * 16 / sizeof(Element)];
  constexpr int kCount = 16 / sizeof(Element);
  const int first = threadIdx.x * kCount;
  for (int i = first; i < first + kCount; ++i) staging[i] = static_cast<const Element*>(from)[i];
  for (int i = first; i < first + kCount; ++i) static_cast<Element*>(to)[i] = staging[i];
}
extern "C" __global__ void moves(const unsigned char* from, unsigned char* to) {
  move<uint8_t>(from, to), move<int16_t>(from, to + 512), move<uint32_t>(from, to + 1024);
  move<int64_t>(from, to + 1536), move<float2>(from, to + 2048), move<float4>(from, to + 2560);
  move<double>(from, to + 3072);
}

// An array in local memory: indices are known at run time only.
extern "C" __global__ void local_array(const int* index, int* out) {
  int table[8];
  for (int i = 0; i < 8; ++i) table[(i * 3 + index[0]) & 7] = i * i;
  out[threadIdx.x] = table[index[threadIdx.x] & 7];
}

// Where pointers point, which the kernel knows at run time only.
extern "C" __global__ void address_spaces(const int* global, int* out) {
  __shared__ int shared;
  int local = threadIdx.x;
  if (threadIdx.x == 0) shared = 100;
  __syncwarp();
  const int* pointer = global[0] ? &shared : global[1] ? &local : global;
  out[2 * threadIdx.x] = *pointer;
  out[2 * threadIdx.x + 1] = __isShared(pointer) + 2 * __isLocal(pointer) + 4 * __isGlobal(pointer);
}

__constant__ int kTable[4] = {7, -5, 3, 1 << 30};
extern "C" __global__ void constants(int* out) { out[threadIdx.x] = kTable[threadIdx.x & 3]; }

extern "C" __global__ void collatz(const int* start, int* steps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int x = start[i], count = 0;
  while (x != 1) {
    if (x & 1) x = 3 * x + 1; else x >>= 1;
    if (++count > 500) break;
  }
  steps[i] = count;
}

extern "C" __global__ void write_past_end(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) out[i] = 1.f;
}
extern "C" __global__ void read_null(const float* in, float* out, int64_t zero) {
  out[threadIdx.x] = *reinterpret_cast<const float*>(zero) + in[threadIdx.x];
}
extern "C" __global__ void read_misaligned(const float* in, float2* out) {
  out[threadIdx.x] = *reinterpret_cast<const float2*>(in + threadIdx.x);
}
extern "C" __global__ void endless(int* out) {
  while (*static_cast<volatile int*>(out) == 0) {
  }
}
extern "C" __global__ void fails(const int* in) {
  if (in[threadIdx.x] > 5) __trap();
}
extern "C" __global__ void calls(int* out) { printf("%d\n", out[0]); }
