// Narrow storage and its scalar conversions (round to nearest even; NaN stays NaN where there is one).
#pragma once
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace attn_ext {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// OCP 8-bit floating point (2023), e4m3: 4 bits of exponent, 3 of mantissa, no infinity, all ones is NaN.
struct Float8E4M3 {
  uint8_t bits;
};

template <class To, class From>
ATTN_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

ATTN_HD float to_float(float x) { return x; }
ATTN_HD double to_float(double x) { return x; }
ATTN_HD float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
ATTN_HD float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product corrects it, and makes subnormals right too.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}
ATTN_HD float to_float(int8_t x) { return x; }
ATTN_HD float to_float(Float8E4M3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24, magnitude = x.bits & 0x7f;
  if (magnitude == 0x7f) return bit_cast<float>(sign | 0x7fc00000);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 20) * 0x1p120f));
}

template <class T>
struct FromFloat {
  template <class F>
  ATTN_HD static T convert(F x) { return static_cast<T>(x); }
};
template <>
struct FromFloat<BFloat16> {
  ATTN_HD static BFloat16 convert(float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(u >> 16 | 0x40)};
    return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
  }
};
template <>
struct FromFloat<Float16> {
  ATTN_HD static Float16 convert(float x) {
    const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 2^16 or more
    if (magnitude < 0x38800000) {  // subnormal: let the addition of 2^-1 round at 2^-24
      const float rounded = bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000))};
    }
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
  }
};
// Out of range is the largest code, as in quantisation it must be.
template <>
struct FromFloat<int8_t> {
  ATTN_HD static int8_t convert(float x) {
    const float clamped = x > 127 ? 127 : x >= -127 ? x : x < -127 ? -127.f : 0.f;  // NaN is 0
    const float magic = 12582912.f;                                             // 1.5 * 2^23: its sums are integers
    return static_cast<int8_t>(static_cast<int32_t>((clamped + magic) - magic));
  }
};
template <>
struct FromFloat<Float8E4M3> {
  ATTN_HD static Float8E4M3 convert(float x) {
    const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 24 & 0x80, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint8_t>(sign | 0x7f)};
    if (magnitude >= 0x43e00000) return {static_cast<uint8_t>(sign | 0x7e)};  // 448
    if (magnitude < 0x3c800000) {  // below 2^-6, subnormal: let the addition of 2^14 round at 2^-9
      const float rounded = bit_cast<float>(magnitude) + 16384.f;
      return {static_cast<uint8_t>(sign | (bit_cast<uint32_t>(rounded) - 0x46800000))};
    }
    return {static_cast<uint8_t>(sign | ((magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20))};
  }
};
template <class T, class F>
ATTN_HD T from_float(F x) { return FromFloat<T>::convert(x); }

}  // namespace attn_ext
