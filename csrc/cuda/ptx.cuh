// The instructions the kernels are written in: inline PTX on a device, calls of the emulator on the host.  No asm elsewhere.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/platform.h"

namespace attn_ext::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

DEVICE int lane_index() { return threadIdx.x & 31; }
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, past L1.  Arrives at the latest when cp_async_wait says so; before sm_80 at once.
DEVICE void cp_async16(uint32_t to, const void* from) {
#ifdef ATTN_EXT_EMULATE
  emulation::cp_async(to, from, 16, 16);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
#elif defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(from);
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
// The same, or 16 bytes of zeros, for which `from` is not read.
DEVICE void cp_async16_or_zeros(uint32_t to, const void* from, bool exists) {
#ifdef ATTN_EXT_EMULATE
  emulation::cp_async(to, from, 16, exists ? 16 : 0);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(exists ? 16 : 0)
               : "memory");
#elif defined(__CUDA_ARCH__)
  const uint4 v = exists ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
DEVICE void cp_async_commit() {
#ifdef ATTN_EXT_EMULATE
  emulation::cp_async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Until all but the `Pending` latest groups have arrived.
template <int Pending>
DEVICE void cp_async_wait() {
#ifdef ATTN_EXT_EMULATE
  emulation::cp_async_wait(Pending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l points to row l % 8 of matrix l / 8.  (PTX ISA, "ldmatrix")
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef ATTN_EXT_EMULATE
  emulation::ldmatrix(4, false, address, r);
#elif defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}
DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
#ifdef ATTN_EXT_EMULATE
  emulation::ldmatrix(4, true, address, r);
#elif defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// d += a (16x16, by rows) * b (16x8, by columns), accumulated in fp32.  (PTX ISA, "Matrix Fragments for mma.m16n8k16")
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef ATTN_EXT_EMULATE
  const uint32_t b[2] = {b0, b1};
  emulation::mma_m16n8k16(emulation::El::bf16, d, a, b, d);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
template <>
DEVICE void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef ATTN_EXT_EMULATE
  const uint32_t b[2] = {b0, b1};
  emulation::mma_m16n8k16(emulation::El::f16, d, a, b, d);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
  // sm_75 has half of it: the registers of the two halves of k are those of two m16n8k8.
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// 2^x to 2^-22, 0 at -inf; results below the smallest normal number are 0.
DEVICE float ex2_approx(float x) {
#ifdef ATTN_EXT_EMULATE
  emulation::count_sfu();
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

// a * b + c, rounded once (by the emulator to double first).  Everything else is compiled without contraction, as on the CPU.
DEVICE float fused(float a, float b, float c) {
#ifdef ATTN_EXT_EMULATE
  return static_cast<float>(static_cast<double>(a) * b + c);
#else
  return __fmaf_rn(a, b, c);
#endif
}

// x, as a value that ptxas cannot compute again: else it rebuilds addresses from threadIdx in every turn of a loop (22
// instructions of 491 in the forward kernel).  All lanes of the warp must come.
DEVICE uint32_t pin(uint32_t x) {
#ifndef ATTN_EXT_EMULATE
  asm volatile("shfl.sync.idx.b32 %0, %0, %1, 0x1f, 0xffffffff;\n" : "+r"(x) : "r"(threadIdx.x & 31));
#endif
  return x;
}
DEVICE const char* pin(const char* p) {
  const uint64_t x = reinterpret_cast<uint64_t>(p);
  return reinterpret_cast<const char*>(static_cast<uint64_t>(pin(static_cast<uint32_t>(x >> 32))) << 32 |
                                       pin(static_cast<uint32_t>(x)));
}

// x, as a value that is not known to be the same in every turn of a loop: what follows from it is computed anew and takes no
// register in between.
DEVICE int anew(int x) {
#ifndef ATTN_EXT_EMULATE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

DEVICE int thread_anew() {
#ifdef ATTN_EXT_EMULATE
  return threadIdx.x;
#else
  int x;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(x));
  return x;
#endif
}

// Two numbers in the halves of a register, the first in the lower.
template <class T>
DEVICE uint32_t pack(float lo, float hi) {
#ifdef ATTN_EXT_EMULATE
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
#else
  if constexpr (std::is_same_v<T, Float16>) {
    return bit_cast<uint32_t>(__floats2half2_rn(lo, hi));
  } else {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(lo, hi));
  }
#endif
}

}  // namespace attn_ext::cuda
