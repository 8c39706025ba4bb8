// Arithmetic on integers and floats, the same source for the GPU and for the host, which says what is right.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif

constexpr int kScalarResults = 90;

HOST_DEVICE int64_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

#ifdef __CUDA_ARCH__
HOST_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {  // __byte_perm knows no signs
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
HOST_DEVICE uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) { return __funnelshift_l(low, high, n); }
HOST_DEVICE uint32_t high32(uint32_t a, uint32_t b) { return __umulhi(a, b); }
HOST_DEVICE int32_t high32s(int32_t a, int32_t b) { return __mulhi(a, b); }
HOST_DEVICE uint64_t high64(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
HOST_DEVICE int64_t high64s(int64_t a, int64_t b) { return __mul64hi(a, b); }
HOST_DEVICE int first_one(uint32_t a) { return __ffs(a); }
HOST_DEVICE int first_one64(uint64_t a) { return __ffsll(a); }
HOST_DEVICE int ones(uint32_t a) { return __popc(a); }
HOST_DEVICE int leading_zeros(uint32_t a) { return __clz(a); }
HOST_DEVICE int leading_zeros64(uint64_t a) { return __clzll(a); }
HOST_DEVICE uint32_t reversed(uint32_t a) { return __brev(a); }
HOST_DEVICE int32_t field(int32_t a) {
  int32_t r;
  asm("bfe.s32 %0, %1, 5, 9;" : "=r"(r) : "r"(a));
  return r;
}
HOST_DEVICE uint32_t with_field(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("bfi.b32 %0, %1, %2, 11, 7;" : "=r"(r) : "r"(b), "r"(a));
  return r;
}
#else
HOST_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t pool = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = pool >> (8 * (selector >> (4 * i) & 7)) & 255;
    result |= (selector >> (4 * i) & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
  }
  return result;
}
HOST_DEVICE uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (n & 31)) >> 32);
}
HOST_DEVICE uint32_t high32(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
HOST_DEVICE int32_t high32s(int32_t a, int32_t b) { return static_cast<int64_t>(a) * b >> 32; }
HOST_DEVICE uint64_t high64(uint64_t a, uint64_t b) { return static_cast<unsigned __int128>(a) * b >> 64; }
HOST_DEVICE int64_t high64s(int64_t a, int64_t b) { return static_cast<__int128>(a) * b >> 64; }
HOST_DEVICE int first_one(uint32_t a) { return __builtin_ffs(a); }
HOST_DEVICE int first_one64(uint64_t a) { return __builtin_ffsll(a); }
HOST_DEVICE int ones(uint32_t a) { return __builtin_popcount(a); }
HOST_DEVICE int leading_zeros(uint32_t a) { return a ? __builtin_clz(a) : 32; }
HOST_DEVICE int leading_zeros64(uint64_t a) { return a ? __builtin_clzll(a) : 64; }
HOST_DEVICE uint32_t reversed(uint32_t a) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}
HOST_DEVICE int32_t field(int32_t a) { return a << 18 >> 23; }
HOST_DEVICE uint32_t with_field(uint32_t a, uint32_t b) { return (a & ~(127u << 11)) | (b & 127) << 11; }
#endif

HOST_DEVICE void scalar_ops(int x, int y, float f, float g, int64_t* out) {
  const uint32_t ux = x, uy = y;
  const int64_t lx = (static_cast<int64_t>(x) << 21) ^ y, ly = (static_cast<int64_t>(y) << 13) + x;
  const uint64_t ulx = lx, uly = ly;
  const bool divides = y != 0 && y != -1, divides64 = ly != 0 && ly != -1;
  int k = 0;
  auto put = [&](int64_t value) { out[k++] = value; };

  put(static_cast<int>(ux + uy)), put(static_cast<int>(ux * uy)), put(static_cast<int64_t>(x) * y);
  put(static_cast<uint64_t>(ux) * uy), put(ulx + uly), put(ulx - uly), put(ulx * uly), put(-lx);
  put(divides ? x / y : 0), put(divides ? x % y : 0), put(uy ? ux / uy : 0), put(uy ? ux % uy : 0);
  put(x / 7), put(ux / 10u), put(x % 12), put(ux % 1000u), put(lx / 1000003), put(ulx % 1000003);
  put(divides64 ? lx / ly : 0), put(divides64 ? lx % ly : 0), put(uly ? ulx / uly : 0), put(uly ? ulx % uly : 0);
  put(high32(ux, uy)), put(high32s(x, y)), put(high64(ulx, uly)), put(high64s(lx, ly));
  const __int128 sum128 = static_cast<__int128>(lx) * ly + ulx;
  const __int128 difference128 = sum128 - (static_cast<__int128>(ly) << 40);
  put(static_cast<int64_t>(sum128 >> 64)), put(static_cast<int64_t>(difference128 >> 64));

  put(x >> (y & 31)), put(ux >> (uy & 31)), put(ux << (uy & 31)), put(lx >> (y & 63));
  put(ulx >> (uy & 63)), put(ulx << (uy & 63)), put(funnel_left(ux, uy, ux >> 24));
  put(~x & y), put(x ^ y), put((ux & uy) | (ux & ~uy >> 3) | 5), put(ux >> 5 & 0x3ff), put(ux << 7 | ux >> 25);
  put(permute_bytes(ux, uy, 0x5410)), put(permute_bytes(ux, uy, uy)), put(field(x)), put(with_field(ux, uy));
  put(ones(ux)), put(leading_zeros(ux)), put(leading_zeros64(ulx)), put(reversed(ux));
  put(first_one(ux)), put(first_one64(ulx));

  put(static_cast<int8_t>(x)), put(static_cast<uint8_t>(x)), put(static_cast<int16_t>(x));
  put(static_cast<uint16_t>(y));
  put(x < y), put(ux < uy), put(lx <= ly), put(ulx > uly), put(x < y ? x : y), put(ux > uy ? ux : uy);

  put(bits_of(static_cast<float>(x))), put(bits_of(static_cast<float>(ux))), put(bits_of(static_cast<float>(lx)));
  put(bits_of(static_cast<float>(static_cast<double>(lx)))), put(bits_of(static_cast<float>(f * 1.1)));
  put(bits_of(f + g)), put(bits_of(f * g)), put(bits_of(f - g)), put(bits_of(f / g)), put(bits_of(sqrtf(fabsf(f))));
  put(bits_of(fmaxf(f, g))), put(bits_of(fminf(f, g))), put(bits_of(rintf(f))), put(bits_of(floorf(f)));
  put(bits_of(ceilf(f))), put(bits_of(truncf(f))), put(bits_of(copysignf(f, g)));
  put(f > -1e9f && f < 1e9f ? static_cast<int>(f) : 0), put(f > 0 && f < 4e9f ? static_cast<unsigned>(f) : 0);
  put(f < g), put(f != g), put(f < INFINITY ? bits_of(fmaf(f, 2.f, 1.f)) : 0);
  int sum = 0;
  for (int i = 0; i < (x & 15); ++i) sum += i * (y >> 8) >> 3;
  put(sum);
}
