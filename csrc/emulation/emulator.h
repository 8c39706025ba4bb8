// CUDA C++ as host code: what the source of a kernel sees when it is compiled with -DATTN_EXT_EMULATE.
//
// A CUDA thread is a fiber, and the blocks of a grid run one after another on the thread that launches.  Kernels are
// compiled with -fsanitize=thread but not linked to its library: the calls that it puts before every load and store
// come to hooks.cpp, which checks them.  What is checked, each rule where its code is: global_memory.h,
// shared_memory.h, scheduler.h, collective.h, async_copy.cpp.  What is counted: statistics.h.
//
// A kernel's source keeps two conventions: it launches with CUDA_LAUNCH and names dynamic shared memory with DYN_SMEM.
// A copy by a call of memcpy or memset, so of many bytes, is not seen.
#pragma once
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // one block at a time runs on a host thread
#define DYN_SMEM(name) unsigned char* name = attn_ext::emulation::dyn_smem()
#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) \
  attn_ext::emulation::launch(#kernel, dim3(grid), dim3(block), size_t(smem), [=]() { kernel(__VA_ARGS__); })

namespace attn_ext::emulation {

// The body's copies of the arguments are parameter space: the only memory of the host that a kernel may read.
int launch(const char* name, dim3 grid, dim3 block, size_t smem, void (*run)(const void*), const void* body,
           size_t bytes);
template <class Body>
int launch(const char* name, dim3 grid, dim3 block, size_t smem, const Body& body) {
  const auto run = [](const void* p) { (*static_cast<const Body*>(p))(); };
  return launch(name, grid, block, smem, run, &body, sizeof body);
}

// Constant within a kernel, so that the compiler asks once.
#define ATTN_EXT_BUILTIN __attribute__((const))
ATTN_EXT_BUILTIN uint3 thread_index();
ATTN_EXT_BUILTIN uint3 block_index();
ATTN_EXT_BUILTIN dim3 block_dim();
ATTN_EXT_BUILTIN dim3 grid_dim();
ATTN_EXT_BUILTIN unsigned char* dyn_smem();
ATTN_EXT_BUILTIN uint32_t cvta_shared(const void* p);  // generic pointer -> address in shared memory
#undef ATTN_EXT_BUILTIN

struct BarrierVotes {
  int threads, agreeing;
};
BarrierVotes syncthreads(int id = 0, int count = 0, bool predicate = false);  // count 0: all threads of the block
void syncwarp(uint32_t mask);
void threadfence();

enum class Shfl { idx, up, down, bfly };
uint32_t shfl(Shfl kind, uint32_t mask, uint32_t value, int arg, int width);
enum class Vote { ballot, any, all };
uint32_t vote(Vote kind, uint32_t mask, bool predicate);
enum class Reduce { add, min_signed, max_signed, min_unsigned, max_unsigned };
uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value);

enum class El { f16, bf16, tf32 };
void ldmatrix(int matrices, bool transposed, uint32_t address, uint32_t* out);
void mma_m16n8k16(El ab, float* d, const uint32_t* a, const uint32_t* b, const float* c);  // f16, bf16
void mma_m16n8k8(El ab, float* d, const uint32_t* a, const uint32_t* b, const float* c);   // f16, bf16, tf32

void cp_async(uint32_t to, const void* from, int bytes, int source_bytes);  // zeros after the first source_bytes
void cp_async_commit();
void cp_async_wait(int keep);  // until all but the `keep` latest groups have arrived; keep < 0: cp.async.wait_all

// *p = combine(*p, operand), of 4 or 8 bytes; the old value.
uint64_t atomic(void* p, int bytes, uint64_t (*combine)(uint64_t old, uint64_t operand), uint64_t operand);
uint64_t atomic_cas(void* p, int bytes, uint64_t expected, uint64_t desired);

void count_sfu();  // an instruction of the special function unit

// Makes host memory legal for kernels until forget_memory().  undefined: a kernel writes a byte before any reads it.
enum class Access : int { read_only, read_write, undefined };
void register_memory(const void* pointer, size_t bytes, Access access);
void forget_memory();

template <class To, class From>
__forceinline__ To widen(From from) {
  To to{};
  static_assert(sizeof to >= sizeof from);
  std::memcpy(&to, &from, sizeof from);
  return to;
}
template <class To, class From>
__forceinline__ To narrow(From from) {
  To to;
  static_assert(sizeof to <= sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
__forceinline__ T shuffle(Shfl kind, uint32_t mask, T value, int arg, int width) {
  static_assert(sizeof(T) <= 8);
  if constexpr (sizeof(T) <= 4) {
    return narrow<T>(shfl(kind, mask, widen<uint32_t>(value), arg, width));
  } else {
    const uint64_t bits = widen<uint64_t>(value);
    const uint64_t low = shfl(kind, mask, static_cast<uint32_t>(bits), arg, width);
    return narrow<T>(low | static_cast<uint64_t>(shfl(kind, mask, static_cast<uint32_t>(bits >> 32), arg, width))
                               << 32);
  }
}
template <class T, class Combine>
__forceinline__ T atomic_update(T* p, T operand, Combine) {
  const auto combine = [](uint64_t old, uint64_t x) {
    return widen<uint64_t>(Combine()(narrow<T>(old), narrow<T>(x)));
  };
  return narrow<T>(atomic(p, sizeof(T), combine, widen<uint64_t>(operand)));
}

}  // namespace attn_ext::emulation

#define threadIdx (attn_ext::emulation::thread_index())
#define blockIdx (attn_ext::emulation::block_index())
#define blockDim (attn_ext::emulation::block_dim())
#define gridDim (attn_ext::emulation::grid_dim())
constexpr int warpSize = 32;

// Always inlined: a fault is reported at the line of the kernel, which the return address tells.
__forceinline__ void __syncthreads() { attn_ext::emulation::syncthreads(); }
__forceinline__ int __syncthreads_count(int p) { return attn_ext::emulation::syncthreads(0, 0, p).agreeing; }
__forceinline__ int __syncthreads_or(int p) { return attn_ext::emulation::syncthreads(0, 0, p).agreeing != 0; }
__forceinline__ int __syncthreads_and(int p) {
  const attn_ext::emulation::BarrierVotes votes = attn_ext::emulation::syncthreads(0, 0, p);
  return votes.agreeing == votes.threads;
}
__forceinline__ void __syncwarp(uint32_t mask = ~0u) { attn_ext::emulation::syncwarp(mask); }
__forceinline__ void __threadfence() { attn_ext::emulation::threadfence(); }
__forceinline__ void __threadfence_block() {}
__forceinline__ size_t __cvta_generic_to_shared(const void* p) { return attn_ext::emulation::cvta_shared(p); }

#define ATTN_EXT_SHUFFLE(name, kind)                                                               \
  template <class T>                                                                               \
  __forceinline__ T name(uint32_t mask, T value, int arg, int width = 32) {                        \
    return attn_ext::emulation::shuffle(attn_ext::emulation::Shfl::kind, mask, value, arg, width); \
  }
ATTN_EXT_SHUFFLE(__shfl_sync, idx)
ATTN_EXT_SHUFFLE(__shfl_up_sync, up)
ATTN_EXT_SHUFFLE(__shfl_down_sync, down)
ATTN_EXT_SHUFFLE(__shfl_xor_sync, bfly)
#undef ATTN_EXT_SHUFFLE

#define ATTN_EXT_WARP_VALUE(name, type, function, kind, argument)                                    \
  __forceinline__ type name(uint32_t mask, argument value) {                                         \
    return static_cast<type>(attn_ext::emulation::function(attn_ext::emulation::kind, mask, value)); \
  }
ATTN_EXT_WARP_VALUE(__ballot_sync, uint32_t, vote, Vote::ballot, bool)
ATTN_EXT_WARP_VALUE(__any_sync, int, vote, Vote::any, bool)
ATTN_EXT_WARP_VALUE(__all_sync, int, vote, Vote::all, bool)
ATTN_EXT_WARP_VALUE(__reduce_add_sync, int, reduce, Reduce::add, int)
ATTN_EXT_WARP_VALUE(__reduce_add_sync, unsigned, reduce, Reduce::add, unsigned)
ATTN_EXT_WARP_VALUE(__reduce_min_sync, int, reduce, Reduce::min_signed, int)
ATTN_EXT_WARP_VALUE(__reduce_min_sync, unsigned, reduce, Reduce::min_unsigned, unsigned)
ATTN_EXT_WARP_VALUE(__reduce_max_sync, int, reduce, Reduce::max_signed, int)
ATTN_EXT_WARP_VALUE(__reduce_max_sync, unsigned, reduce, Reduce::max_unsigned, unsigned)
#undef ATTN_EXT_WARP_VALUE

#define ATTN_EXT_ATOMIC(name, result)                                     \
  template <class T>                                                      \
  __forceinline__ T name(T* p, std::type_identity_t<T> operand) {         \
    const auto combine = [](T a, T b) { return static_cast<T>(result); }; \
    return attn_ext::emulation::atomic_update(p, operand, combine);       \
  }
ATTN_EXT_ATOMIC(atomicAdd, a + b)
ATTN_EXT_ATOMIC(atomicMin, b < a ? b : a)
ATTN_EXT_ATOMIC(atomicMax, a < b ? b : a)
ATTN_EXT_ATOMIC(atomicExch, (static_cast<void>(a), b))
#undef ATTN_EXT_ATOMIC
template <class T>
__forceinline__ T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  using namespace attn_ext::emulation;
  return narrow<T>(atomic_cas(p, sizeof(T), widen<uint64_t>(expected), widen<uint64_t>(desired)));
}

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
__forceinline__ float __expf(float x) { return attn_ext::emulation::count_sfu(), expf(x); }
__forceinline__ float __logf(float x) { return attn_ext::emulation::count_sfu(), logf(x); }
__forceinline__ float __fdividef(float a, float b) { return attn_ext::emulation::count_sfu(), a / b; }
__forceinline__ float rsqrtf(float x) { return attn_ext::emulation::count_sfu(), 1.0f / sqrtf(x); }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float __int_as_float(int x) { return attn_ext::emulation::narrow<float>(x); }
__forceinline__ int __float_as_int(float x) { return attn_ext::emulation::narrow<int>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return attn_ext::emulation::narrow<float>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return attn_ext::emulation::narrow<unsigned>(x); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
__forceinline__ long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
template <class A, class B>
__forceinline__ std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
__forceinline__ std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
