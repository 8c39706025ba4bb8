// The online softmax as a scalar: any split of the keys, merged in any order, gives the softmax of all of them.
#include "core/online_softmax.h"

#include <cmath>
#include <random>
#include <vector>

#include "check.h"

using namespace attn_ext;

namespace {

struct Math {
  using Value = double;
  static double splat(double x) { return x; }
  static double max(double a, double b) { return a > b ? a : b; }
  static double exp2(double x) { return std::exp2(x); }
  static double weight(double x) { return std::exp2(x - kHeadroom); }
};
using Softmax = OnlineSoftmax<double, Math>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct State {
  Softmax softmax;
  double out = 0;  // the weighted sum of values
};

State attend(const std::vector<double>& scores, const std::vector<double>& values, size_t begin, size_t end) {
  State state;
  double top = std::numeric_limits<double>::lowest();
  for (size_t i = begin; i < end; i++) top = Math::max(scores[i], top);
  state.out *= state.softmax.raise(top);
  for (size_t i = begin; i < end; i++) {
    const double w = state.softmax.weight(scores[i]);
    state.softmax.add(w);
    state.out += w * values[i];
  }
  return state;
}

State merge(State a, const State& b) {
  double factor_b;
  const double factor_a = a.softmax.merge(b.softmax, &factor_b);
  a.out = a.out * factor_a + b.out * factor_b;
  return a;
}

void equal(const State& a, const State& b, const char* what) {
  CHECK(a.softmax.m == b.softmax.m, "%s: m %g and %g", what, a.softmax.m, b.softmax.m);
  CHECK(std::fabs(a.softmax.l - b.softmax.l) <= 1e-14 * b.softmax.l, "%s: l %.17g and %.17g", what, a.softmax.l, b.softmax.l);
  CHECK(std::fabs(a.out - b.out) <= 1e-13 * b.softmax.l, "%s: out %.17g and %.17g", what, a.out, b.out);
}

template <class Scalar>
void statistics(Scalar m, Scalar l) {
  const auto s = RowStatistics<Scalar>::of(m, l, std::log2(l));
  // l without the headroom.  What the backward pass subtracts restores the row's normaliser, m + log2(l), however large m is.
  const Scalar exponent = (m - RowStatistics<Scalar>::to_log2(s.lse)) - s.residual;
  const double expected = -std::log2(static_cast<double>(l));
  CHECK(std::fabs(exponent - expected) <= 4 * std::numeric_limits<Scalar>::epsilon() * std::fmax(1, std::fabs(expected)),
        "m %g l %g: %g and %g", double(m), double(l), double(exponent), expected);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  std::normal_distribution<double> normal(0, 20);
  for (int round = 0; round < 200; round++) {
    std::vector<double> scores(40), values(40);
    for (double& s : scores) s = random() % 5 == 0 ? -kInfinity : normal(random);
    for (double& v : values) v = normal(random);
    const State whole = attend(scores, values, 0, 40);
    const size_t i = random() % 41, j = i + random() % (41 - i);
    const State a = attend(scores, values, 0, i), b = attend(scores, values, i, j), c = attend(scores, values, j, 40);
    equal(merge(merge(a, b), c), whole, "(ab)c");
    equal(merge(a, merge(b, c)), whole, "a(bc)");
    equal(merge(c, merge(b, a)), whole, "c(ba)");
    equal(merge(State{}, whole), whole, "empty first");
    equal(merge(whole, State{}), whole, "empty last");
  }
  const State nothing = attend(std::vector<double>(4, -kInfinity), std::vector<double>(4, 1), 0, 4);
  CHECK(nothing.softmax.l == 0 && nothing.out == 0, "all masked: l %g out %g", nothing.softmax.l, nothing.out);
  const auto dead = RowStatistics<double>::of(nothing.softmax.m, 0., -kInfinity);
  CHECK(dead.lse == -kInfinity && dead.residual == 0);
  const State both_empty = merge(nothing, State{});
  CHECK(both_empty.softmax.l == 0 && both_empty.out == 0, "two empty states");
  for (float l : {1.f, 1.7f, 300.f, 131072.f}) {
    for (float m : {0.f, 3.5f, -1e4f, 1e6f}) {
      statistics<float>(m, l);
      statistics<double>(m, l);
    }
    for (int i = 0; i < 1000; i++) {  // mask values of any size
      const double mask = (i % 2 ? -1 : 1) * std::exp2(random() % 127) * (1 + (random() % 1000) / 1000.);
      statistics<float>(RowStatistics<float>::to_log2(static_cast<float>(std::fmin(mask, RowStatistics<float>::largest()))), l);
      statistics<double>(RowStatistics<double>::to_log2(mask), l);
    }
    statistics<float>(-RowStatistics<float>::to_log2(RowStatistics<float>::largest()), l);
    statistics<double>(-RowStatistics<double>::to_log2(RowStatistics<double>::largest()), l);
  }
  return check::result();
}
