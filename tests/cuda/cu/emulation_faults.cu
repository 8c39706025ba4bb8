// For every fault that the emulator reports a kernel that has it, in the line marked `fault: name`, and its twin that
// is right.
#include "emulation/emulator.h"

namespace emulation = attn_ext::emulation;

namespace {

constexpr uint32_t kAll = 0xffffffffu;

// n threads in two blocks; in: n floats, read-only; out: n floats, undefined; counter: 0.
struct Arguments {
  const float* in;
  float* out;
  int* counter;
  int n;
};

__device__ int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <bool Right>
__global__ void global_read_bounds(Arguments a) {
  const int i = thread_of_grid();
  a.out[i] = Right && i + 1 == a.n ? 0.f : a.in[i + 1];  // fault: global_read_bounds
}
template <bool Right>
__global__ void global_write_bounds(Arguments a) {
  const int i = thread_of_grid();
  a.out[Right ? i : i - 1] = a.in[i];  // fault: global_write_bounds
}
template <bool Right>
__global__ void read_only(Arguments a) {
  const int i = thread_of_grid();
  (Right ? a.out : const_cast<float*>(a.in))[i] = 1.f;  // fault: read_only
}
template <bool Right>
__global__ void host_memory(Arguments a, const Arguments* host) {
  const int i = thread_of_grid();
  a.out[i] = static_cast<float>(Right ? a.n : host->n);  // fault: host_memory
}
template <bool Right>
__global__ void global_alignment(Arguments a) {
  const int i = thread_of_grid();
  const float4 x = *reinterpret_cast<const float4*>(a.in + (Right ? 4 : 2));  // fault: global_alignment
  a.out[i] = x.x + x.y;
}
template <bool Right>
__global__ void global_uninitialised(Arguments a) {
  const int i = thread_of_grid();
  if constexpr (Right) a.out[i] = 0.f;
  a.out[i] += a.in[i];  // fault: global_uninitialised
}
template <bool Right>
__global__ void race_of_threads(Arguments a) {
  const int i = thread_of_grid();
  if constexpr (!Right) a.out[i / 2] = a.in[i];  // fault: race_of_threads
}
template <bool Right>
__global__ void race_of_blocks(Arguments a) {
  const int i = thread_of_grid();
  a.out[Right ? i : static_cast<int>(threadIdx.x)] = a.in[i];  // fault: race_of_blocks
}
// The last block to come adds up what all have written.
template <bool Right>
__global__ void last_block(Arguments a) {
  if (threadIdx.x > 0) return;
  a.out[blockIdx.x] = a.in[blockIdx.x];
  if constexpr (Right) __threadfence();
  if (atomicAdd(a.counter, 1) == 1) {
    a.out[2] = a.out[0] + a.out[1];  // fault: last_block
  }
}

template <bool Right>
__global__ void shared_bounds(Arguments a) {
  DYN_SMEM(raw);
  float* s = reinterpret_cast<float*>(raw);
  s[Right ? threadIdx.x : threadIdx.x + 1] = a.in[threadIdx.x];  // fault: shared_bounds
}
template <bool Right>
__global__ void shared_bounds_below(Arguments a) {
  DYN_SMEM(raw);
  float* s = reinterpret_cast<float*>(raw);
  s[static_cast<int>(threadIdx.x) - !Right] = a.in[threadIdx.x];  // fault: shared_bounds_below
}
template <bool Right>
__global__ void shared_alignment(Arguments a) {
  DYN_SMEM(raw);
  if (threadIdx.x == 0)
    *reinterpret_cast<float2*>(raw + (Right ? 8 : 4)) = make_float2(a.in[0], 0.f);  // fault: shared_alignment
}
template <bool Right>
__global__ void shared_uninitialised(Arguments a) {
  __shared__ float s[64];
  if (Right || threadIdx.x != 5) s[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[thread_of_grid()] = s[threadIdx.x];  // fault: shared_uninitialised
}
template <bool Right>
__global__ void read_after_write(Arguments a) {
  __shared__ float s[64];
  s[threadIdx.x] = a.in[threadIdx.x];
  if constexpr (Right) __syncthreads();
  a.out[thread_of_grid()] = s[63 - threadIdx.x];  // fault: read_after_write
}
template <bool Right>
__global__ void write_after_read(Arguments a) {
  __shared__ float s[64];
  s[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  const float x = s[63 - threadIdx.x];
  if constexpr (Right) __syncthreads();
  s[threadIdx.x] = x;  // fault: write_after_read
}
template <bool Right>
__global__ void write_after_write(Arguments a) {
  DYN_SMEM(raw);
  float* s = reinterpret_cast<float*>(raw);
  s[threadIdx.x] = a.in[threadIdx.x];
  if constexpr (Right) __syncthreads();
  s[63 - threadIdx.x] = 0.f;  // fault: write_after_write
}
// Within a warp it takes a __syncwarp.
template <bool Right>
__global__ void warp_exchange(Arguments a) {
  __shared__ float s[64];
  s[threadIdx.x] = a.in[threadIdx.x];
  if constexpr (Right) __syncwarp();
  a.out[thread_of_grid()] = s[threadIdx.x ^ 1];  // fault: warp_exchange
}
// A shuffle does not order memory.
template <bool Right>
__global__ void shuffle_is_no_fence(Arguments a) {
  __shared__ float s[64];
  s[threadIdx.x] = a.in[threadIdx.x];
  const float x = __shfl_xor_sync(kAll, a.in[threadIdx.x], 1);
  if constexpr (Right) __syncwarp();
  a.out[thread_of_grid()] = s[threadIdx.x ^ 1] + x;  // fault: shuffle_is_no_fence
}
template <bool Right>
__global__ void bytes_of_a_word(Arguments a) {
  DYN_SMEM(s);
  s[threadIdx.x] = 1;
  s[Right ? threadIdx.x : threadIdx.x ^ 1] = static_cast<unsigned char>(a.n);  // fault: bytes_of_a_word
}
template <bool Right>
__global__ void not_shared(Arguments a) {
  __shared__ float s[64];
  const void* p = Right ? static_cast<const void*>(s) : a.in;
  a.out[thread_of_grid()] = static_cast<float>(__cvta_generic_to_shared(p));  // fault: not_shared
}

__device__ uint32_t row_of(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

template <bool Right>
__global__ void copy_read_early(Arguments a) {
  __shared__ __attribute__((aligned(16))) float s[64 * 4];
  emulation::cp_async(row_of(s + threadIdx.x * 4), a.in, 16, 16);
  emulation::cp_async_commit();
  emulation::cp_async_wait(Right ? 0 : 1);
  a.out[thread_of_grid()] = s[threadIdx.x * 4];  // fault: copy_read_early
}
template <bool Right>
__global__ void copy_read_by_others(Arguments a) {
  __shared__ __attribute__((aligned(16))) float s[64 * 4];
  emulation::cp_async(row_of(s + threadIdx.x * 4), a.in, 16, 16);
  emulation::cp_async_wait(-1);
  if constexpr (Right) __syncthreads();
  a.out[thread_of_grid()] = s[(63 - threadIdx.x) * 4];  // fault: copy_read_by_others
}
template <bool Right>
__global__ void copy_overwritten(Arguments a) {
  __shared__ __attribute__((aligned(16))) float s[64 * 4];
  emulation::cp_async(row_of(s + threadIdx.x * 4), a.in, 16, 16);
  if constexpr (Right) emulation::cp_async_wait(-1);
  s[threadIdx.x * 4] = 0.f;  // fault: copy_overwritten
  emulation::cp_async_wait(-1);
}
template <bool Right>
__global__ void copy_never_awaited(Arguments a) {
  __shared__ __attribute__((aligned(16))) float s[64 * 4];
  emulation::cp_async(row_of(s + threadIdx.x * 4), a.in, 16, 16);  // fault: copy_never_awaited
  if constexpr (Right) emulation::cp_async_wait(-1);
}
template <bool Right>
__global__ void copy_alignment(Arguments a) {
  __shared__ __attribute__((aligned(16))) float s[64 * 4];
  emulation::cp_async(row_of(s + threadIdx.x * 4), a.in + (Right ? 4 : 2), 16, 16);  // fault: copy_alignment
  emulation::cp_async_wait(-1);
}
template <bool Right>
__global__ void copy_bounds(Arguments a) {
  __shared__ __attribute__((aligned(16))) float s[64 * 4];
  const int i = thread_of_grid(), bytes = Right && i == a.n - 1 ? 0 : 4;
  emulation::cp_async(row_of(s + threadIdx.x * 4), a.in + i + 1, 4, bytes);  // fault: copy_bounds
  emulation::cp_async_wait(-1);
}

template <bool Right>
__global__ void matrix_of_own_warp(Arguments a) {
  __shared__ __attribute__((aligned(16))) uint4 s[64];
  s[threadIdx.x] = make_uint4(threadIdx.x, 0, 0, 0);
  if constexpr (Right) __syncwarp();
  uint32_t x[4];
  emulation::ldmatrix(4, false, row_of(s + threadIdx.x), x);  // fault: matrix_of_own_warp
  a.out[thread_of_grid()] = static_cast<float>(x[0]);
}
template <bool Right>
__global__ void matrix_alignment(Arguments a) {
  __shared__ __attribute__((aligned(16))) uint4 s[65];
  s[threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) s[64] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  uint32_t x[4];
  emulation::ldmatrix(4, false, row_of(s + threadIdx.x) + (Right ? 0 : 8), x);  // fault: matrix_alignment
  a.out[thread_of_grid()] = static_cast<float>(x[0]);
}
template <bool Right>
__global__ void product_of_part_of_a_warp(Arguments a) {
  float d[4] = {};
  const uint32_t x[4] = {};
  if (Right || threadIdx.x < 48)
    emulation::mma_m16n8k16(emulation::El::f16, d, x, x, d);  // fault: product_of_part_of_a_warp
  a.out[thread_of_grid()] = d[0];
}

template <bool Right>
__global__ void barrier_missed(Arguments a) {
  float x = a.in[threadIdx.x];
  if (threadIdx.x & 1) {
    if constexpr (!Right) __syncthreads();  // fault: barrier_missed
  } else if constexpr (!Right) {
    x = __shfl_xor_sync(kAll, x, 1);
  }
  a.out[thread_of_grid()] = x;
}
template <bool Right>
__global__ void barriers_of_two_lines(Arguments a) {
  if (Right || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // fault: barriers_of_two_lines
  }
  a.out[thread_of_grid()] = 0.f;
}
template <bool Right>
__global__ void operations_of_two_kinds(Arguments a) {
  const float x = a.in[threadIdx.x];
  float y = 0.f;
  if (Right || threadIdx.x & 1) {
    y = __shfl_xor_sync(kAll, x, 1);
  } else {
    y = static_cast<float>(__ballot_sync(kAll, x > 0));  // fault: operations_of_two_kinds
  }
  a.out[thread_of_grid()] = y;
}
template <bool Right>
__global__ void lane_not_in_mask(Arguments a) {
  a.out[thread_of_grid()] = __shfl_xor_sync(Right ? kAll : 0xffffu, a.in[threadIdx.x], 1);  // fault: lane_not_in_mask
}
template <bool Right>
__global__ void inactive_lane(Arguments a) {
  const int lane = threadIdx.x & 31;
  float x = a.in[threadIdx.x];
  if (lane < 16) x = __shfl_xor_sync(0xffffu, x, Right ? 8 : 16);  // fault: inactive_lane
  a.out[thread_of_grid()] = x;
}
template <bool Right>
__global__ void endless(Arguments a) {
  volatile float* out = a.out;
  out[thread_of_grid()] = 0.f;
  do {
    out[thread_of_grid()] = 1.f;  // fault: endless
  } while (!Right);
}

}  // namespace

#define ENTRY(kernel, smem)                                                         \
  extern "C" int kernel##_right(const float* in, float* out, int* counter, int n) { \
    const Arguments a{in, out, counter, n};                                         \
    return CUDA_LAUNCH(kernel<true>, 2, n / 2, smem, 0, a);                         \
  }                                                                                 \
  extern "C" int kernel##_wrong(const float* in, float* out, int* counter, int n) { \
    const Arguments a{in, out, counter, n};                                         \
    return CUDA_LAUNCH(kernel<false>, 2, n / 2, smem, 0, a);                        \
  }

ENTRY(global_read_bounds, 0)
ENTRY(global_write_bounds, 0)
ENTRY(read_only, 0)
ENTRY(global_alignment, 0)
ENTRY(global_uninitialised, 0)
ENTRY(race_of_threads, 0)
ENTRY(race_of_blocks, 0)
ENTRY(last_block, 0)
ENTRY(shared_bounds, 64 * 4)
ENTRY(shared_bounds_below, 64 * 4)
ENTRY(shared_alignment, 64 * 4)
ENTRY(shared_uninitialised, 0)
ENTRY(read_after_write, 0)
ENTRY(write_after_read, 0)
ENTRY(write_after_write, 64 * 4)
ENTRY(warp_exchange, 0)
ENTRY(shuffle_is_no_fence, 0)
ENTRY(bytes_of_a_word, 64)
ENTRY(not_shared, 0)
ENTRY(copy_read_early, 0)
ENTRY(copy_read_by_others, 0)
ENTRY(copy_overwritten, 0)
ENTRY(copy_never_awaited, 0)
ENTRY(copy_alignment, 0)
ENTRY(copy_bounds, 0)
ENTRY(matrix_of_own_warp, 0)
ENTRY(matrix_alignment, 0)
ENTRY(product_of_part_of_a_warp, 0)
ENTRY(barrier_missed, 0)
ENTRY(barriers_of_two_lines, 0)
ENTRY(operations_of_two_kinds, 0)
ENTRY(lane_not_in_mask, 0)
ENTRY(inactive_lane, 0)
ENTRY(endless, 0)

template <bool Right>
int launch_with_host_pointer(const float* in, float* out, int* counter, int n) {
  const Arguments a{in, out, counter, n};
  const Arguments* host = &a;
  return CUDA_LAUNCH(host_memory<Right>, 2, n / 2, 0, 0, a, host);
}
extern "C" int host_memory_right(const float* in, float* out, int* counter, int n) {
  return launch_with_host_pointer<true>(in, out, counter, n);
}
extern "C" int host_memory_wrong(const float* in, float* out, int* counter, int n) {
  return launch_with_host_pointer<false>(in, out, counter, n);
}

extern "C" int launch_shared(const float* in, float* out, int* counter, int n, int smem) {
  const Arguments a{in, out, counter, n};
  return CUDA_LAUNCH(read_only<true>, 2, n / 2, smem, 0, a);
}
