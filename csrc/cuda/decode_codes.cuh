// Tiles of 8-bit codes: widened, exactly, to what the products take; their scales multiply scores and weights.
#pragma once
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

template <class T>
DEVICE void store_four(unsigned char* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4) *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  else *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
}

// Code k of four.  Conversions of integers are slow: as the last bits of 2^23 + 128 + x, x costs a subtraction.
template <class Code>
DEVICE float code(uint32_t four, int k) {
  if constexpr (std::is_same_v<Code, int8_t>) {
    return bit_cast<float>(0x4b000000 | ((four ^ 0x80808080) >> 8 * k & 0xff)) - (0x1p23f + 128.f);
  } else {
    return to_float(bit_cast<Code>(static_cast<uint8_t>(four >> 8 * k)));
  }
}

// Four codes a lane at a time: neighbours write next to each other.
template <class Code, class Codes, class Operand>
DEVICE void widen_codes(const unsigned char* codes, unsigned char* operand) {
  constexpr int kWords = Codes::kColumns / 4;  // of a row
  for (int i = lane_index(); i < Codes::kRows * kWords; i += 32) {
    const int row = i / kWords, column = i % kWords * 4;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + Codes::element(row, column));
    float x[4];
    UNROLL for (int k = 0; k < 4; ++k) x[k] = code<Code>(word, k);
    store_four<typename Operand::Element>(operand + Operand::element(row, column), x);
  }
}
template <class Codes, class Operand>
DEVICE void widen(CacheFormat format, const unsigned char* codes, unsigned char* operand) {
  if (format == CacheFormat::int8) widen_codes<int8_t, Codes, Operand>(codes, operand);
  else widen_codes<Float8E4M3, Codes, Operand>(codes, operand);
}

// Columns of scores or weights times what lane n % 16 has for key n.
template <int NJ>
DEVICE void scale_columns(Accumulators<1, NJ>& s, float of_lane) {
  UNROLL for (int j = 0; j < NJ; ++j)
    UNROLL for (int e = 0; e < 2; ++e) {
      const float factor = __shfl_sync(kAllLanes, of_lane, 8 * j + lane_index() % 4 * 2 + e);
      UNROLL for (int h = 0; h < 2; ++h) s[0][j][2 * h + e] *= factor;
    }
}

// The scales of values, relative to the largest so far, as a power of two: weights of 16 bits then keep their range.
class ValueScales {
  float largest_ = 0x1p-126f;

  DEVICE static float power_of_two_from(float x) {
    const uint32_t bits = (bit_cast<uint32_t>(x) + 0x7fffff) & 0x7f800000;
    return bit_cast<float>(bits < 0x7f000000 ? bits : 0x7f000000);
  }

 public:
  template <int NJ, int DJ>
  DEVICE void weigh(Accumulators<1, NJ>& weights, Accumulators<1, DJ>& o, float of_lane) {
    float top = fabsf(of_lane);
    UNROLL for (int apart = 8; apart > 0; apart /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, apart));
    if (top > largest_) {
      const float moved = power_of_two_from(top), factor = largest_ / moved;
      for_elements<1, DJ>([&](int mi, int h, int j, int e) { o[mi][j][2 * h + e] *= factor; });
      largest_ = moved;
    }
    scale_columns(weights, of_lane / largest_);
  }
  template <int DJ>
  DEVICE void finish(Accumulators<1, DJ>& o) const {
    for_elements<1, DJ>([&](int mi, int h, int j, int e) { o[mi][j][2 * h + e] *= largest_; });
  }
};

}  // namespace attn_ext::cuda
