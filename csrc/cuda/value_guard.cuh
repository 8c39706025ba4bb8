// Keeps NaN and infinity in a row of a tile from sums in which the row has weight 0, where 0 * NaN would be NaN: in a value, say,
// from queries that do not see it.
#pragma once
#include "cuda/accumulators.cuh"

namespace attn_ext::cuda {

// Which of a word's elements, one of 32 or two of 16 bits, are not finite: their sign bits.  An exponent of ones carries into
// them.
template <class T>
DEVICE uint32_t not_finite(uint32_t word) {
  constexpr uint32_t exponent = sizeof(T) == 4 ? 0x7f800000 : std::is_same_v<T, Float16> ? 0x7c007c00 : 0x7f807f80;
  constexpr uint32_t lowest = sizeof(T) == 4 ? 0x00800000 : std::is_same_v<T, Float16> ? 0x04000400 : 0x00800080;
  return ((word & exponent) + lowest) & (sizeof(T) == 4 ? 0x80000000 : 0x80008000);
}
template <class T>
DEVICE uint32_t finite_or_zero(uint32_t word) {
  const uint32_t signs = not_finite<T>(word);
  return word & ~(sizeof(T) == 4 ? (signs ? ~0u : 0u) : (signs >> 15) * 0xffff);
}

// Of a tile of values.
template <class Values, class Products, class Copy, int MI>
class ValueGuard {
  using T = typename Values::Element;
  const Copy& copy_;
  unsigned char* tile_;
  uint32_t seen_[MI][2];  // of a row, bit 2 j + e: the key is not hidden

 public:
  DEVICE ValueGuard(const Copy& copy, unsigned char* tile) : copy_(copy), tile_(tile) {}

  // Whether what this thread copied is finite.
  DEVICE bool finite() const {
    uint32_t found = 0;
    copy_.for_own_chunks(tile_, [&](const uint4* chunk) {
      const uint4 v = *chunk;
      found |= not_finite<T>(v.x) | not_finite<T>(v.y) | not_finite<T>(v.z) | not_finite<T>(v.w);
    });
    return !found;
  }

  // Hidden keys have the score -inf, or the weight 0.
  template <int NJ>
  DEVICE void see(const Accumulators<MI, NJ>& x, float hidden = -INFINITY) {
    static_assert(NJ <= 16);
    UNROLL for (int mi = 0; mi < MI; ++mi) seen_[mi][0] = seen_[mi][1] = 0;
    for_elements<MI, NJ>([&](int mi, int h, int j, int e) {
      if (x[mi][j][2 * h + e] != hidden) seen_[mi][h] |= 1u << (2 * j + e);
    });
  }
  // Adds what is not finite to the rows that see it.
  template <int DJ>
  DEVICE void add(Accumulators<MI, DJ>& o) const {
    const int quad = lane_index() & ~3;
#pragma unroll 1
    for (int k = 0; k < Values::kRows; ++k) {
      bool sees[MI][2];
      UNROLL for (int mi = 0; mi < MI; ++mi)
        UNROLL for (int h = 0; h < 2; ++h)
          sees[mi][h] = __shfl_sync(kAllLanes, seen_[mi][h], quad + k % 8 / 2) >> (k / 8 * 2 + k % 2) & 1;
      UNROLL for (int j = 0; j < DJ; ++j)
        UNROLL for (int e = 0; e < 2; ++e) {
          const float value = to_float(*reinterpret_cast<const T*>(tile_ + Values::element(k, Products::column(j, e))));
          if (value - value == 0.f) continue;
          UNROLL for (int mi = 0; mi < MI; ++mi)
            UNROLL for (int h = 0; h < 2; ++h)
              if (sees[mi][h]) o[mi][j][2 * h + e] += value;
        }
    }
  }
  // Zeros in place of what is not finite in what this thread copied.
  DEVICE void clean() const {
    copy_.for_own_chunks(tile_, [&](uint4* chunk) {
      const uint4 v = *chunk;
      *chunk = make_uint4(finite_or_zero<T>(v.x), finite_or_zero<T>(v.y), finite_or_zero<T>(v.z), finite_or_zero<T>(v.w));
    });
  }
};

}  // namespace attn_ext::cuda
