// The vector vocabulary of one instruction set against the scalar standard library.
namespace attn_ext::cpu {
namespace {

template <class E>
uint64_t ulps(E a, E b) {
  using I = std::conditional_t<sizeof(E) == 4, int32_t, int64_t>;
  const I x = bit_cast<I>(a), y = bit_cast<I>(b);
  return x > y ? x - y : y - x;
}

template <class E, int Degree>
double worst_exp2(E from, E to, int steps) {
  double worst = 0;
  for (int i = 0; i <= steps; i += kLanes<E>) {
    E x[kLanes<E>], y[kLanes<E>];
    for (int lane = 0; lane < kLanes<E>; lane++) x[lane] = from + (to - from) * (i + lane) / steps;
    store(y, exp2<Degree>(load(x)));
    for (int lane = 0; lane < kLanes<E>; lane++) {
      const double exact = std::exp2(static_cast<double>(x[lane]));
      worst = std::fmax(worst, std::fabs(y[lane] / exact - 1));
    }
  }
  return worst;
}

template <class E>
void check_exp2_limits() {
  const E infinity = std::numeric_limits<E>::infinity(), lowest = std::numeric_limits<E>::lowest();
  for (E x : {-infinity, lowest, E(-1e6), E(-2000)}) {
    const E y = exp2<5>(splat(x))[0];
    CHECK(y == 0 && !std::signbit(y), "exp2(%g) = %g", double(x), double(y));
  }
  CHECK(exp2<5>(splat(E(0)))[0] - 1 <= std::numeric_limits<E>::epsilon());
  CHECK(std::isnan(exp2<5>(splat(std::numeric_limits<E>::quiet_NaN()))[0]));
}

template <class E>
void check_log2() {
  double worst = 0;
  for (double x = 1; x < 1e6; x *= 1.00037) {
    const E y = log2<E>(splat(static_cast<E>(x)))[0];
    worst = std::fmax(worst, std::fabs(y - std::log2(static_cast<double>(static_cast<E>(x)))) / std::fmax(1, std::log2(x)));
  }
  CHECK(worst <= 2 * std::numeric_limits<E>::epsilon(), "log2: %g", worst);
  CHECK(std::isnan(log2<E>(splat(std::numeric_limits<E>::quiet_NaN()))[0]));
}

template <class E>
void check_tanh() {
  double worst = 0;
  for (double x = 1e-30; x < 100; x *= 1.0007) {
    for (double sign : {1., -1.}) {
      const E at = static_cast<E>(sign * x), y = tanh<E>(splat(at))[0];
      worst = std::fmax(worst, std::fabs(y / std::tanh(static_cast<double>(at)) - 1));
    }
  }
  CHECK(worst <= 6 * std::numeric_limits<E>::epsilon(), "tanh: %g", worst);  // exp2, the sums and the quotient
  const E infinity = std::numeric_limits<E>::infinity();
  CHECK(tanh<E>(splat(E(0)))[0] == 0 && tanh<E>(splat(infinity))[0] == 1 && tanh<E>(splat(-infinity))[0] == -1);
  CHECK(std::isnan(tanh<E>(splat(std::numeric_limits<E>::quiet_NaN()))[0]));
}

// The known answers of Random123, and the vector generator against the scalar one.
void check_philox() {
  const struct {
    uint32_t counter[4];
    uint64_t key;
    uint32_t words[4];
  } answers[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& answer : answers) {
    uint32_t words[4];
    Vec<uint64_t> lanes[4];
    for (int i = 0; i < 4; i++) words[i] = answer.counter[i], lanes[i] = VectorPhilox::splat(answer.counter[i]);
    Philox<ScalarPhilox>::generate(words, answer.key);
    Philox<VectorPhilox>::generate(lanes, answer.key);
    for (int i = 0; i < 4; i++) {
      CHECK(words[i] == answer.words[i], "word %d", i);
      for (int lane = 0; lane < kLanes<uint64_t>; lane++) CHECK(static_cast<uint32_t>(lanes[i][lane]) == answer.words[i]);
    }
  }
}

template <class E>
void check_transpose() {
  constexpr int n = kLanes<E>;
  Vec<E> a[n];
  for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) a[i][j] = static_cast<E>(i * n + j);
  transpose<E>(a);
  for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) CHECK(a[i][j] == static_cast<E>(j * n + i), "row %d column %d", i, j);
}

template <class E>
void check_max() {
  const E nan = std::numeric_limits<E>::quiet_NaN();
  CHECK(max(splat(E(1)), splat(E(2)))[0] == 2 && max(splat(E(2)), splat(E(1)))[0] == 2);
  CHECK(max(splat(nan), splat(E(2)))[0] == 2, "a NaN score must not become the maximum");
  CHECK(std::isnan(max(splat(E(2)), splat(nan))[0]), "a NaN exponent must survive the clamp");
  CHECK(min(splat(E(1)), splat(E(2)))[0] == 1 && min(splat(E(2)), splat(E(1)))[0] == 1);
  CHECK(std::isnan(min(splat(E(2)), splat(nan))[0]));
}

// The vector conversions agree with the scalar ones, which test_dtype.cpp checks value by value.
template <class T>
void check_conversions(const char* name) {
  constexpr int n = kLanes<float>;
  for (uint32_t bits = 0; bits < 0x10000; bits += n) {
    T in[n], out[n];
    float wide[n];
    for (int i = 0; i < n; i++) in[i].bits = static_cast<uint16_t>(bits + i);
    store(wide, widen(in));
    narrow(out, load(wide));
    for (int i = 0; i < n; i++) {
      const bool nan = std::isnan(to_float(in[i]));
      CHECK(nan ? std::isnan(wide[i]) && std::isnan(to_float(out[i])) : wide[i] == to_float(in[i]) && out[i].bits == in[i].bits,
            "%s %04x", name, bits + i);
    }
  }
  for (uint32_t bits = 0; bits < 0xff000000; bits += 7919 * n) {
    float wide[n];
    T out[n];
    for (int i = 0; i < n; i++) wide[i] = bit_cast<float>(bits + 7919 * i);
    narrow(out, load(wide));
    for (int i = 0; i < n; i++) {
      const T expected = from_float<T>(wide[i]);
      CHECK(std::isnan(wide[i]) ? std::isnan(to_float(out[i])) : out[i].bits == expected.bits, "%s of %g", name, double(wide[i]));
    }
  }
}

int check_all() {
  const double degree5 = worst_exp2<float, 5>(-80, 1, 1 << 20), degree3 = worst_exp2<float, 3>(-80, 1, 1 << 20);
  const double float64 = worst_exp2<double, 5>(-900, 1, 1 << 18);
  std::printf("exp2 relative error: degree 5 %.2e, degree 3 %.2e, float64 %.2e\n", degree5, degree3, float64);
  // The polynomial's own error (7.5e-8, 7.5e-5) and three roundings, two for float64.
  CHECK(degree5 <= 7.5e-8 + 3 * 0x1p-24);
  CHECK(degree3 <= 7.5e-5 + 3 * 0x1p-24);
  CHECK(float64 <= 4 * 0x1p-53);
  uint64_t worst = 0;
  for (float x = -20; x <= 0; x += 0x1p-12f) {
    const uint64_t distance = ulps(exp2<5>(splat(x))[0], std::exp2(x));
    worst = distance > worst ? distance : worst;
  }
  CHECK(worst <= 3, "exp2: %d ulp", static_cast<int>(worst));
  for (float x = -100; x < 0; x += 0.37f) {  // the shift is exact
    CHECK((exp2<5, kHeadroom>(splat(x))[0] == exp2<5>(splat(x))[0] / kHeadroomFactor), "exp2(%g)", double(x));
  }
  check_exp2_limits<float>();
  check_exp2_limits<double>();
  check_log2<float>();
  check_log2<double>();
  check_tanh<float>();
  check_tanh<double>();
  check_philox();
  check_transpose<float>();
  check_transpose<double>();
  check_max<float>();
  check_max<double>();
  check_conversions<BFloat16>("bf16");
  check_conversions<Float16>("fp16");
  return check::result();
}

}  // namespace
}  // namespace attn_ext::cpu
