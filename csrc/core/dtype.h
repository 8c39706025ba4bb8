// 16-bit floating-point storage and its scalar conversions (round to nearest even, NaN stays NaN).
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
template <class T, class F>
ATTN_HD T from_float(F x) { return FromFloat<T>::convert(x); }

}  // namespace attn_ext
