// 16-bit conversions: every bf16 and fp16 value survives a round trip, and rounding is to nearest even.
#include "core/dtype.h"

#include <cmath>
#include <limits>

#include "check.h"

using namespace attn_ext;

namespace {

template <class T>
void every_value_survives(const char* name) {
  for (uint32_t bits = 0; bits < 0x10000; bits++) {
    const T value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    const T back = from_float<T>(wide);
    if (std::isnan(wide)) {
      CHECK(std::isnan(to_float(back)), "%s %04x", name, bits);
    } else {
      CHECK(back.bits == value.bits, "%s %04x became %04x", name, bits, back.bits);
    }
  }
}

// Between neighbours the nearer one wins, and on a tie the even one.
template <class T>
void rounds_to_nearest_even(const char* name, uint32_t infinity) {
  for (uint32_t bits = 0; bits + 1 < infinity; bits++) {
    const T low{static_cast<uint16_t>(bits)}, high{static_cast<uint16_t>(bits + 1)};
    const float a = to_float(low), b = to_float(high), middle = a + (b - a) / 2;
    const T even = bits % 2 == 0 ? low : high;
    CHECK(from_float<T>(middle).bits == even.bits, "%s tie above %04x", name, bits);
    CHECK(from_float<T>(std::nextafter(middle, 0.f)).bits == low.bits, "%s below the tie above %04x", name, bits);
    CHECK(from_float<T>(std::nextafter(middle, std::numeric_limits<float>::infinity())).bits == high.bits, "%s beyond the tie above %04x", name, bits);
  }
}

}  // namespace

int main() {
  every_value_survives<BFloat16>("bf16");
  every_value_survives<Float16>("fp16");
  rounds_to_nearest_even<BFloat16>("bf16", 0x7f80);
  rounds_to_nearest_even<Float16>("fp16", 0x7c00);
  CHECK(to_float(from_float<Float16>(65520.f)) == std::numeric_limits<float>::infinity());
  CHECK(to_float(from_float<Float16>(-1e30f)) == -std::numeric_limits<float>::infinity());
  CHECK(to_float(from_float<BFloat16>(3.4e38f)) == std::numeric_limits<float>::infinity());
  return check::result();
}
