// What the threads of a warp or of a block do together.
#pragma once
#include <cuda_runtime.h>

constexpr unsigned kAllLanes = 0xffffffffu;

// out: 9 x 64
extern "C" __global__ void exchanges(const int* in, int* out) {
  const int i = threadIdx.x, x = in[i];
  out[i] = __shfl_sync(kAllLanes, x, i * 5 + 3);
  out[64 + i] = __shfl_up_sync(kAllLanes, x, 3);
  out[128 + i] = __shfl_down_sync(kAllLanes, x, 2, 8);
  out[192 + i] = __shfl_xor_sync(kAllLanes, x, 6, 16);
  out[256 + i] = (__any_sync(kAllLanes, x > 90) ? 1 : 0) + (__all_sync(kAllLanes, x > -90) ? 2 : 0);
  out[320 + i] = __ballot_sync(kAllLanes, x > 0);
  out[384 + i] = 0, out[448 + i] = 0;
  if (i & 1) {
    out[384 + i] = __shfl_xor_sync(0xaaaaaaaau, x, 2);
    out[448 + i] = __activemask();
  }
  int kept = i;  // by the lanes that do not take part
  asm volatile("{.reg .pred odd; setp.ne.u32 odd, %2, 0; @odd shfl.sync.bfly.b32 %0, %1, 2, 31, 0xaaaaaaaa;}"
               : "+r"(kept)
               : "r"(x), "r"(i & 1));
  out[512 + i] = kept;
}

extern "C" __global__ void outside_its_mask(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, out[threadIdx.x], 1);
}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
extern "C" __global__ void reductions(const int* in, int* out) {
  const int i = threadIdx.x, x = in[i];
  out[i] = __reduce_max_sync(kAllLanes, x);
  out[64 + i] = __reduce_min_sync(kAllLanes, x);
  out[128 + i] = __reduce_add_sync(kAllLanes, static_cast<unsigned>(x));
}
#endif

extern "C" __global__ void block_votes(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, x = in[i];
  out[3 * i] = __syncthreads_or(x > 90), out[3 * i + 1] = __syncthreads_and(x > -90);
  out[3 * i + 2] = __syncthreads_count(x > 0);
}

extern "C" __global__ void histogram(const int* in, int* out, int n) {
  __shared__ int counts[16];
  if (threadIdx.x < 16) counts[threadIdx.x] = 0;
  __syncthreads();
  const int first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  for (int i = first; i < n; i += threads) atomicAdd(&counts[in[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&out[threadIdx.x], counts[threadIdx.x]);
  atomicMax(&out[16], in[threadIdx.x]);
}

enum class Fault { none, no_barrier, never_written, no_warp_barrier, overwritten, all_write, half_arrive, past_end };

// Sums rows of `in`, a block each.
template <Fault fault>
__global__ void row_sums(const float* in, float* out, int n) {
  __shared__ float parts[32];
  float sum = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[blockIdx.x * n + i];
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
  const int warps = blockDim.x / 32;
  const int part = threadIdx.x / 32 + (fault == Fault::past_end ? 30 : 0);
  if (fault == Fault::all_write || threadIdx.x % 32 == 0) parts[part] = sum;
  if (fault == Fault::half_arrive) {
    if (threadIdx.x & 1) __syncthreads(); else __shfl_xor_sync(kAllLanes, sum, 1);
  } else if (fault != Fault::no_barrier) {
    __syncthreads();
  }
  if (threadIdx.x < 32) {
    sum = threadIdx.x < warps || fault == Fault::never_written ? parts[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
  if (fault == Fault::overwritten && threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = 0.f;
}

// Warps add to what the warp before left in shared memory.
extern "C" __global__ void relay(const float* in, float* out) {
  __shared__ float values[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int turn = 0; turn < blockDim.x / 32; ++turn) {
    if (warp == turn) values[lane] = (turn ? values[lane] : 0.f) + in[threadIdx.x];
    __syncthreads();
  }
  out[threadIdx.x] = values[lane];
}

// The last thread overwrites what all read.
extern "C" __global__ void overwritten_by_a_reader(const float* in, float* out) {
  __shared__ float value;
  if (threadIdx.x == 0) value = in[0];
  __syncthreads();
  out[threadIdx.x] = value;
  __syncwarp();
  if (threadIdx.x == blockDim.x - 1) value = 0.f;
}

// Each warp reverses its row three times over, through shared memory of its own.
template <Fault fault>
__global__ void reversals(const float* in, float* out, int unused) {
  __shared__ float rows[8][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float x = in[threadIdx.x];
  for (int i = 0; i < 3; ++i) {
    rows[warp][lane] = x;
    __syncwarp();
    x = rows[warp][31 - lane];
    if (fault != Fault::no_warp_barrier) __syncwarp();
  }
  out[threadIdx.x] = x;
}

#define INSTANCE(kernel, fault) template __global__ void kernel<Fault::fault>(const float*, float*, int);
INSTANCE(row_sums, none)
INSTANCE(row_sums, no_barrier)
INSTANCE(row_sums, never_written)
INSTANCE(row_sums, overwritten)
INSTANCE(row_sums, all_write)
INSTANCE(row_sums, half_arrive)
INSTANCE(row_sums, past_end)
INSTANCE(reversals, none)
INSTANCE(reversals, no_warp_barrier)

// Half of the warps wait for each other at a barrier of their own.
extern "C" __global__ void named_barrier(const float* in, float* out) {
  __shared__ float values[64];
  if (threadIdx.x < 64) {
    values[threadIdx.x] = in[threadIdx.x];
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = values[63 - threadIdx.x];
  } else {
    out[threadIdx.x] = in[threadIdx.x];
  }
}

extern "C" __global__ void transpose(const float* in, float* out, int pitch) {
  extern __shared__ float tile[];
  const int row = threadIdx.x / 32, column = threadIdx.x % 32;
  tile[row * pitch + column] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[column * pitch + row];
}
