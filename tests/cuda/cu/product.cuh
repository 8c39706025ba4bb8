// C = A B^T of bf16 matrices, 64 x 64 a block: two stages of tiles by cp.async, ldmatrix, mma.  And what goes wrong in
// such kernels.
#pragma once
#include "ptx.cuh"

enum class Slip { none, no_barrier, no_wait, late_wait, past_end, swapped, no_clear, shifted, never_waits };

constexpr int kTile = 64, kDepth = 32, kThreads = 128;
using Tile = uint16_t[kTile][kDepth];

// 16-byte chunk of a tile, permuted so that eight rows lie in all banks.
DEVICE void* chunk(Tile& tile, int row, int c) { return &tile[row][(c ^ (row >> 1 & 3)) * 8]; }

template <Slip slip>
DEVICE void copy(Tile& tile, const uint16_t* from, int row0, int rows, int k0, int k) {
  for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kThreads) {
    const int row = i / 4, c = i % 4;
    const bool exists = slip == Slip::past_end || row0 + row < rows;
    cp_async<16>(chunk(tile, row, c), exists ? from + (row0 + row) * k + k0 + c * 8 : from, exists ? 16 : 0);
  }
}

template <Slip slip>
__global__ void __launch_bounds__(kThreads)
    product_tiles(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  __shared__ __align__(128) Tile a_tiles[2], b_tiles[2];
  const int m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float d[8][4];
  if (slip != Slip::no_clear)
    for (int j = 0; j < 8; ++j) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.f;
  copy<slip>(a_tiles[0], a, m0, m, 0, k), copy<slip>(b_tiles[0], b, n0, n, 0, k);
  cp_async_commit();
  for (int step = 0; step < k / kDepth; ++step) {
    const int stage = step & 1;
    if (slip == Slip::late_wait) cp_async_wait<1>();
    else if (slip != Slip::no_wait && slip != Slip::never_waits) cp_async_wait<0>();
    if (slip != Slip::no_barrier) __syncthreads();  // this stage is there, the other is read
    if (step + 1 < k / kDepth) {
      copy<slip>(a_tiles[stage ^ 1], a, m0, m, (step + 1) * kDepth, k);
      copy<slip>(b_tiles[stage ^ 1], b, n0, n, (step + 1) * kDepth, k);
    }
    cp_async_commit();
    for (int half = 0; slip != Slip::never_waits && half < 2; ++half) {
      uint32_t fa[4];
      ldmatrix(fa, chunk(a_tiles[stage], warp * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t fb[2];
        ldmatrix(fb, chunk(b_tiles[stage], j * 8 + lane % 8, half * 2 + lane / 8 % 2));
        if (slip == Slip::swapped) {
          const uint32_t first = fb[0];
          fb[0] = fb[1], fb[1] = first;
        }
        mma_bf16(d[j], fa, fb);
      }
    }
  }
  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) {
      const int row = m0 + warp * 16 + lane / 4 + (e >> 1) * 8;
      const int column = n0 + j * 8 + lane % 4 * 2 + (e & 1) + (slip == Slip::shifted ? 1 : 0);
      if (row < m && column < n) c[row * n + column] = d[j][e];
    }
}

#define INSTANCE_OF(slip) \
  template __global__ void product_tiles<Slip::slip>(const uint16_t*, const uint16_t*, float*, int, int, int);
INSTANCE_OF(none)
INSTANCE_OF(no_barrier)
INSTANCE_OF(no_wait)
INSTANCE_OF(late_wait)
INSTANCE_OF(past_end)
INSTANCE_OF(swapped)
INSTANCE_OF(no_clear)
INSTANCE_OF(shifted)
INSTANCE_OF(never_waits)

// Copies of each size, of which `count` bytes are read and the others are zeros.
extern "C" __global__ void copies(const unsigned char* from, unsigned char* to, const int* count) {
  __shared__ __align__(16) unsigned char staging[3][32 * 16];
  const int i = threadIdx.x;
  cp_async<4>(staging[0] + 4 * i, from + 4 * i, min(count[i], 4));
  cp_async<8>(staging[1] + 8 * i, from + 8 * i, min(count[i], 8));
  cp_async_commit();
  cp_async<16>(staging[2] + 16 * i, from + 16 * i, count[i]);
  cp_async_wait<0>();  // the last copy is in no group yet
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int b = 0; b < 4; ++b) to[4 * i + b] = staging[0][4 * i + b];
  for (int b = 0; b < 8; ++b) to[512 + 8 * i + b] = staging[1][8 * i + b];
  for (int b = 0; b < 16; ++b) to[1024 + 16 * i + b] = staging[2][16 * i + b];
}

// The second copy goes where the first is still on its way.
extern "C" __global__ void copies_overlap(const unsigned char* from, unsigned char* to) {
  __shared__ __align__(16) unsigned char staging[32 * 16];
  cp_async<16>(staging + 16 * threadIdx.x, from, 16);
  cp_async<16>(staging + 16 * threadIdx.x, from + 16, 16);
  asm volatile("cp.async.wait_all;" ::: "memory");
  to[threadIdx.x] = staging[16 * threadIdx.x];
}
