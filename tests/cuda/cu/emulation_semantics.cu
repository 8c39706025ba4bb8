// What the emulated operations compute, and access patterns whose transactions are known.
#include "emulation/emulator.h"

namespace emulation = attn_ext::emulation;

namespace {

constexpr uint32_t kAll = 0xffffffffu;

__device__ uint32_t address_of(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// out: [4 kinds, 32 lanes]
template <class T>
__global__ void shuffles(const T* in, T* out, int arg, int width) {
  const T x = in[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(kAll, x, arg, width);
  out[32 + threadIdx.x] = __shfl_up_sync(kAll, x, arg, width);
  out[64 + threadIdx.x] = __shfl_down_sync(kAll, x, arg, width);
  out[96 + threadIdx.x] = __shfl_xor_sync(kAll, x, arg, width);
}

// out: [8, threads]; the last warp may be a part of one.
__global__ void votes(const int* in, int* out) {
  const int x = in[threadIdx.x], n = static_cast<int>(blockDim.x);
  int* mine = out + threadIdx.x;
  mine[0] = static_cast<int>(__ballot_sync(kAll, x > 0));
  mine[n] = __any_sync(kAll, x > 100);
  mine[2 * n] = __all_sync(kAll, x > -100);
  mine[3 * n] = __syncthreads_count(x > 0);
  mine[4 * n] = __syncthreads_or(x > 100);
  mine[5 * n] = __syncthreads_and(x > -100);
  // Two halves of a warp at the same operation.
  const uint32_t half = threadIdx.x & 16 ? 0xffff0000u : 0xffffu;
  mine[6 * n] = static_cast<int>(__ballot_sync(half, x > 0));
  mine[7 * n] = __reduce_add_sync(half, x);
}

// out: [4, 32]
__global__ void reductions(const int* in, int* out) {
  const int x = in[threadIdx.x];
  out[threadIdx.x] = __reduce_min_sync(kAll, x);
  out[32 + threadIdx.x] = __reduce_max_sync(kAll, x);
  out[64 + threadIdx.x] = static_cast<int>(__reduce_min_sync(kAll, static_cast<unsigned>(x)));
  out[96 + threadIdx.x] = static_cast<int>(__reduce_max_sync(kAll, static_cast<unsigned>(x)));
}

// in: 8 * matrices rows of 8; out: [32 lanes, matrices]
__global__ void load_matrices(const uint4* in, uint32_t* out, int matrices, int transposed) {
  __shared__ uint4 rows[32];
  rows[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t x[4];
  emulation::ldmatrix(matrices, transposed != 0, address_of(rows + threadIdx.x), x);
  for (int m = 0; m < matrices; m++) out[threadIdx.x * matrices + m] = x[m];
}

// a: [32 lanes, 4], b: [32, 2], c and d: [32, 4], as registers
__global__ void multiply(const uint32_t* a, const uint32_t* b, const float* c, float* d, int type, int k) {
  uint32_t ar[4], br[2];
  float cr[4], dr[4];
  for (int i = 0; i < 4; i++) ar[i] = a[threadIdx.x * 4 + i], cr[i] = c[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; i++) br[i] = b[threadIdx.x * 2 + i];
  const auto element = static_cast<emulation::El>(type);
  k == 16 ? emulation::mma_m16n8k16(element, dr, ar, br, cr) : emulation::mma_m16n8k8(element, dr, ar, br, cr);
  for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + i] = dr[i];
}

// Each thread copies 16 bytes in pieces, of each the first source_bytes; one group a piece.
__global__ void copies(const char* in, char* out, int piece, int source_bytes) {
  __shared__ __attribute__((aligned(16))) char s[32 * 16];
  char* mine = s + threadIdx.x * 16;
  for (int i = 0; i < 16; i += piece) {
    emulation::cp_async(address_of(mine + i), in + threadIdx.x * 16 + i, piece, source_bytes);
    emulation::cp_async_commit();
  }
  for (int i = 0, pending = 16 / piece; i < 16; i += piece) {
    emulation::cp_async_wait(--pending);
    for (int j = i; j < i + piece; j++) out[threadIdx.x * 16 + j] = mine[j];
  }
}

__global__ void atomics(const int* in, int* out, float* sum, unsigned long long* wide) {
  __shared__ int histogram[8];
  if (threadIdx.x < 8) histogram[threadIdx.x] = 0;
  __syncthreads();
  const int x = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&histogram[x & 7], 1);
  atomicAdd(sum, static_cast<float>(x));
  atomicAdd(wide, static_cast<unsigned long long>(x) << 32);
  atomicMin(out + 8, x);
  atomicMax(out + 9, x);
  atomicCAS(out + 10, 0, 7);
  atomicExch(out + 11, 5);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(out + threadIdx.x, histogram[threadIdx.x]);
}

// out: [blocks, threads, 4]: where a thread finds itself
__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* mine = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 4;
  mine[0] = static_cast<int>(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z);
  mine[1] = static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z);
  mine[2] = static_cast<int>(gridDim.x + 10 * gridDim.y + 100 * gridDim.z);
  mine[3] = static_cast<int>(blockDim.x + 10 * blockDim.y + 100 * blockDim.z);
}

// out: the blocks, then the warps of the first one, in the order in which they come.
__global__ void arrivals(int* tickets, int* out) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (threadIdx.x == 0) out[atomicAdd(tickets, 1)] = static_cast<int>(blockIdx.x);
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x % 32 == 0) {
    out[gridDim.x + static_cast<unsigned>(atomicAdd(tickets + 1, 1))] = warp;
  }
}

// A warp's time goes far; a block finds in shared memory nothing of the block before, whose writes skip may hide.
__global__ void long_time(int* out, int synchronisations, int skip) {
  DYN_SMEM(raw);
  int* s = reinterpret_cast<int*>(raw);
  if (!skip || blockIdx.x == 0) s[threadIdx.x] = 1;
  for (int i = 0; i < synchronisations; i++) __syncwarp();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void arithmetic(long long* out) {
  out[0] = __umulhi(0x80000001u, 6u);
  out[1] = __mul64hi(-5, 1ll << 62);
  out[2] = __popc(0xf0f0u) + 100 * __ffs(8) + 10000 * __clz(1);
  out[3] = static_cast<long long>(__fdividef(7.f, 2.f) * 100.f + __frcp_rn(4.f));
  out[4] = __float_as_int(__int_as_float(0x3f800001)) + min(1, 2) + max(10, 20);
  out[5] = static_cast<long long>(1000 * (tanhf(0.5f) + exp2f(3.f) + log2f(8.f) + __expf(0.f) + rsqrtf(4.f)));
  out[6] = __ldg(out);
}

// Elements `stride` apart in shared memory are written; the first is read by all.
template <class T>
__global__ void strided(T* out, int stride) {
  DYN_SMEM(raw);
  T* s = reinterpret_cast<T*>(raw);
  s[threadIdx.x * stride] = T{};  // shared write
  __syncwarp();
  const T first = s[0];      // shared read
  out[threadIdx.x] = first;  // global write
}
// Global elements `stride` apart, from `first` on, by the first `lanes` lanes.
template <class T>
__global__ void gather(const T* in, int stride, int first, int lanes) {
  DYN_SMEM(raw);
  if (static_cast<int>(threadIdx.x) < lanes) {
    reinterpret_cast<T*>(raw)[threadIdx.x] = in[first + threadIdx.x * stride];  // global read
  }
}

}  // namespace

extern "C" {

void run_shuffles(const float* in, float* out, int arg, int width) {
  CUDA_LAUNCH(shuffles<float>, 1, 32, 0, 0, in, out, arg, width);
}
void run_shuffles_double(const double* in, double* out, int arg, int width) {
  CUDA_LAUNCH(shuffles<double>, 1, 32, 0, 0, in, out, arg, width);
}
void run_votes(const int* in, int* out, int threads) { CUDA_LAUNCH(votes, 1, threads, 0, 0, in, out); }
void run_reductions(const int* in, int* out) { CUDA_LAUNCH(reductions, 1, 32, 0, 0, in, out); }
void run_load_matrices(const uint4* in, uint32_t* out, int matrices, int transposed) {
  CUDA_LAUNCH(load_matrices, 1, 32, 0, 0, in, out, matrices, transposed);
}
void run_multiply(const uint32_t* a, const uint32_t* b, const float* c, float* d, int type, int k) {
  CUDA_LAUNCH(multiply, 1, 32, 0, 0, a, b, c, d, type, k);
}
void run_copies(const char* in, char* out, int piece, int source_bytes) {
  CUDA_LAUNCH(copies, 1, 32, 0, 0, in, out, piece, source_bytes);
}
void run_atomics(const int* in, int* out, float* sum, unsigned long long* wide, int blocks) {
  CUDA_LAUNCH(atomics, blocks, 64, 0, 0, in, out, sum, wide);
}
void run_indices(int* out) { CUDA_LAUNCH(indices, dim3(2, 3, 4), dim3(4, 3, 2), 0, 0, out); }
void run_arrivals(int* tickets, int* out, int blocks, int warps) {
  CUDA_LAUNCH(arrivals, blocks, warps * 32, 0, 0, tickets, out);
}
void run_long_time(int* out, int synchronisations, int skip) {
  CUDA_LAUNCH(long_time, 3, 2, 8, 0, out, synchronisations, skip);
}
void run_arithmetic(long long* out) { CUDA_LAUNCH(arithmetic, 1, 1, 0, 0, out); }
void run_strided(void* out, int bytes, int stride) {
  const auto run = [=](auto* typed) { CUDA_LAUNCH(strided, 1, 32, 32 * stride * bytes + bytes, 0, typed, stride); };
  bytes == 4   ? run(static_cast<float*>(out))
  : bytes == 8 ? run(static_cast<float2*>(out))
               : run(static_cast<float4*>(out));
}
void run_gather(const void* in, int bytes, int stride, int first, int lanes) {
  const auto run = [=](auto* typed) { CUDA_LAUNCH(gather, 1, 32, 32 * bytes, 0, typed, stride, first, lanes); };
  bytes == 2   ? run(static_cast<const uint16_t*>(in))
  : bytes == 4 ? run(static_cast<const float*>(in))
               : run(static_cast<const float4*>(in));
}
}
