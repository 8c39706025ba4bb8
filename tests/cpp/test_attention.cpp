// The kernels, forward and backward, of every instruction set of this machine, against explicit sums in double.
// Inputs and outputs are allocated to the byte: with -DATTN_EXT_SANITIZE=address a step outside of them is an error.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "core/dropout.h"
#include "core/dtype.h"
#include "cpu/kernel_table.h"
#include "cpu/openmp_executor.h"

using namespace attn_ext;

namespace {

struct Problem {
  AttentionShape shape;
  int64_t band_upper = MaskParams::no_upper;
  bool has_ranges = false, has_bias = false;
  bool has_modifiers = false;  // segments, softcap, ALiBi, sinks and dropout
  int query_block = 0, kv_block = 0;  // of block lists, of each head its own; 0: none
};

// Random lists of blocks, and whether they let query i of a head see key j.
struct RandomBlocks {
  int64_t query_block, kv_block, rows, columns;
  std::vector<int64_t> offsets;
  std::vector<int32_t> indices, tiles;
  std::vector<uint8_t> bits;

  RandomBlocks(const Problem& problem, std::mt19937& random)
      : query_block(problem.query_block), kv_block(problem.kv_block),
        rows((problem.shape.query_len + query_block - 1) / query_block),
        columns((problem.shape.kv_len + kv_block - 1) / kv_block), bits(2 * kv_block * query_block / 8) {
    for (uint8_t& byte : bits) byte = static_cast<uint8_t>(random());
    for (int64_t head = 0; head < problem.shape.heads; head++) {
      for (int64_t row = 0; row < rows; row++) {
        offsets.push_back(static_cast<int64_t>(indices.size()));
        for (int64_t column = 0; column < columns; column++) {
          if (random() % 2) continue;
          indices.push_back(static_cast<int32_t>(column));
          tiles.push_back(static_cast<int32_t>(random() % 3) - 1);
        }
      }
      offsets.push_back(static_cast<int64_t>(indices.size()));
    }
  }
  bool sees(int64_t head, int64_t i, int64_t j) const {
    const int64_t* row = &offsets[head * (rows + 1) + i / query_block];
    for (int64_t s = row[0]; s < row[1]; s++) {
      if (indices[s] != j / kv_block) continue;
      if (tiles[s] < 0) return true;
      const int64_t byte = (tiles[s] * kv_block + j % kv_block) * (query_block / 8) + i % query_block / 8;
      return bits[byte] >> i % 8 & 1;
    }
    return false;
  }
};

template <class T>
std::vector<T> random_tensor(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<T> x(count);
  for (T& e : x) e = from_float<T>(normal(random));
  return x;
}

template <class View, class T>
View dense(T* data, int64_t heads, int64_t rows, int64_t columns) {
  return {data, heads * rows * columns, rows * columns, columns, 1};
}

template <class T>
double relative_error(const std::vector<T>& actual, const std::vector<double>& expected) {
  double difference = 0, norm = 1e-30;
  for (size_t i = 0; i < expected.size(); i++) {
    difference += std::pow(to_float(actual[i]) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

template <class T, class Statistic>
void compare(const char* isa, const Problem& problem, DType dtype, double tolerance) {
  const AttentionShape& s = problem.shape;
  std::mt19937 random(1);
  const size_t rows = s.batch * s.heads * s.query_len, keys = s.batch * s.kv_heads * s.kv_len;
  const auto q = random_tensor<T>(rows * s.head_dim, random), k = random_tensor<T>(keys * s.head_dim, random);
  const auto v = random_tensor<T>(keys * s.value_dim, random), grad = random_tensor<T>(rows * s.value_dim, random);
  const auto bias = random_tensor<float>(s.query_len * s.kv_len, random);
  std::vector<int64_t> ranges(s.batch * s.query_len * 4);  // two of each row
  for (int64_t& n : ranges) n = random() % (s.kv_len + 1);
  std::vector<int32_t> query_ids(s.query_len), key_ids(s.kv_len);
  for (int32_t& id : query_ids) id = random() % 3;
  for (int32_t& id : key_ids) id = random() % 3;
  std::vector<double> slopes(s.heads), sinks(s.heads), grad_sinks(s.heads), expected_grad_sinks(s.heads);
  for (double& x : slopes) x = 0.1 * (random() % 7);
  for (double& x : sinks) x = 0.5 * (random() % 5) - 1;
  std::vector<Statistic> grad_bias(bias.size());
  std::vector<double> expected_grad_bias(bias.size());
  std::vector<T> out(rows * s.value_dim), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<Statistic> lse(rows), residual(rows);

  ForwardParams forward;
  forward.shape = s;
  forward.dtype = dtype;
  forward.score.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  forward.mask.band_upper = problem.band_upper;
  if (problem.has_ranges) forward.mask.key_ranges = {ranges.data(), s.query_len * 4, 4, 2};
  std::optional<RandomBlocks> blocks;
  if (problem.query_block) {
    blocks.emplace(problem, random);
    forward.mask.blocks = {.offsets = blocks->offsets.data(), .stride_head = blocks->rows + 1,
                           .indices = blocks->indices.data(), .tiles = blocks->tiles.data(), .bits = blocks->bits.data(),
                           .query_block = problem.query_block, .kv_block = problem.kv_block};
  }
  if (problem.has_bias) forward.score.bias = {bias.data(), 0, 0, s.kv_len, 1};
  if (problem.has_modifiers) {
    forward.mask.query_segments.data = query_ids.data();
    forward.mask.kv_segments.data = key_ids.data();
    forward.score.softcap = 1.5;
    forward.score.alibi_slopes = slopes.data();
    forward.score.sinks = sinks.data();
    forward.dropout = DropoutParams::of(0.25, 0x123456789abcdef);
  }
  forward.query = dense<ConstTensorView>(q.data(), s.heads, s.query_len, s.head_dim);
  forward.key = dense<ConstTensorView>(k.data(), s.kv_heads, s.kv_len, s.head_dim);
  forward.value = dense<ConstTensorView>(v.data(), s.kv_heads, s.kv_len, s.value_dim);
  forward.out = dense<TensorView>(out.data(), s.heads, s.query_len, s.value_dim);
  forward.lse = lse.data();
  forward.lse_residual = residual.data();
  const cpu::Executor executor = cpu::openmp_executor();
  cpu::kernel_table().forward[static_cast<int>(dtype)](forward, executor);

  BackwardParams backward;
  static_cast<AttentionParams&>(backward) = forward;
  backward.out = dense<ConstTensorView>(out.data(), s.heads, s.query_len, s.value_dim);
  backward.grad_out = dense<ConstTensorView>(grad.data(), s.heads, s.query_len, s.value_dim);
  backward.lse = lse.data();
  backward.lse_residual = residual.data();
  backward.grad_query = dense<TensorView>(dq.data(), s.heads, s.query_len, s.head_dim);
  backward.grad_key = dense<TensorView>(dk.data(), s.kv_heads, s.kv_len, s.head_dim);
  backward.grad_value = dense<TensorView>(dv.data(), s.kv_heads, s.kv_len, s.value_dim);
  if (problem.has_bias) {
    backward.grad_bias = {grad_bias.data(), 0, 0, s.kv_len, 1};
    backward.grad_bias_elements = s.query_len * s.kv_len;
  }
  if (problem.has_modifiers) backward.grad_sinks = grad_sinks.data();
  cpu::kernel_table().backward[static_cast<int>(dtype)](backward, executor);

  std::vector<double> expected(out.size()), expected_dq(q.size()), expected_dk(k.size()), expected_dv(v.size());
  std::vector<double> w(s.kv_len);
  const auto dot = [](const T* a, const T* b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += static_cast<double>(to_float(a[i])) * to_float(b[i]);
    return sum;
  };
  for (size_t row = 0; row < rows; row++) {
    const int64_t i = row % s.query_len, head = row / s.query_len, b = head / s.heads;
    const int64_t first_key = (b * s.kv_heads + head % s.heads / s.group()) * s.kv_len;
    const int64_t h = head % s.heads;
    double top = problem.has_modifiers ? sinks[h] : -INFINITY, sum = 0, delta = 0;
    std::vector<double> slope(s.kv_len, 1), factor(s.kv_len, 1);  // of the softcap, of dropout
    for (int64_t j = 0; j < s.kv_len; j++) {
      const int64_t* r = &ranges[(b * s.query_len + i) * 4];
      bool visible = j - i <= problem.band_upper;
      if (problem.has_ranges) visible = visible && ((r[0] <= j && j < r[1]) || (r[2] <= j && j < r[3]));
      if (blocks) visible = visible && blocks->sees(h, i, j);
      double score = forward.score.scale * dot(&q[row * s.head_dim], &k[(first_key + j) * s.head_dim], s.head_dim);
      if (problem.has_modifiers) {
        const double t = std::tanh(score / 1.5);
        slope[j] = 1 - t * t;
        score = 1.5 * t - slopes[h] * std::fabs(static_cast<double>(i + s.kv_len - s.query_len - j));
        factor[j] = keeps_weight(forward.dropout, b, h, i, j) ? forward.dropout.inverse_keep : 0;
        visible = visible && query_ids[i] == key_ids[j];
      }
      w[j] = visible ? score + (problem.has_bias ? bias[i * s.kv_len + j] : 0) : -INFINITY;
      top = std::max(top, w[j]);
    }
    if (top == -INFINITY) {
      CHECK(lse[row] == -INFINITY, "%s: lse of a row without keys", isa);
      continue;
    }
    for (double& x : w) sum += x = std::exp(x - top);
    const double sink = problem.has_modifiers ? std::exp(sinks[h] - top) : 0;
    sum += sink;
    CHECK(std::fabs(lse[row] - (top + std::log(sum))) < 2e-3, "%s: lse %g and %g", isa, double(lse[row]), top + std::log(sum));
    for (int64_t d = 0; d < s.value_dim; d++) {
      double& o = expected[row * s.value_dim + d];
      for (int64_t j = 0; j < s.kv_len; j++) o += factor[j] * w[j] / sum * to_float(v[(first_key + j) * s.value_dim + d]);
      delta += o * to_float(grad[row * s.value_dim + d]);
    }
    expected_grad_sinks[h] -= sink / sum * delta;
    for (int64_t j = 0; j < s.kv_len; j++) {
      const double weight = w[j] / sum, dp = dot(&grad[row * s.value_dim], &v[(first_key + j) * s.value_dim], s.value_dim);
      for (int64_t d = 0; d < s.value_dim; d++) {
        expected_dv[(first_key + j) * s.value_dim + d] += factor[j] * weight * to_float(grad[row * s.value_dim + d]);
      }
      const double score_gradient = weight * (factor[j] * dp - delta);
      expected_grad_bias[i * s.kv_len + j] += score_gradient;
      for (int64_t d = 0; d < s.head_dim; d++) {
        const double ds = forward.score.scale * slope[j] * score_gradient;
        expected_dq[row * s.head_dim + d] += ds * to_float(k[(first_key + j) * s.head_dim + d]);
        expected_dk[(first_key + j) * s.head_dim + d] += ds * to_float(q[row * s.head_dim + d]);
      }
    }
  }
  const double errors[] = {relative_error(out, expected), relative_error(dq, expected_dq), relative_error(dk, expected_dk),
                           relative_error(dv, expected_dv),
                           problem.has_bias ? relative_error(grad_bias, expected_grad_bias) : 0,
                           problem.has_modifiers ? relative_error(grad_sinks, expected_grad_sinks) : 0};
  for (int i = 0; i < 6; i++) {
    CHECK(errors[i] < tolerance, "%s dtype %d, %ld x %ld, head_dim %ld: error %d is %g", isa, static_cast<int>(dtype),
          s.query_len, s.kv_len, s.head_dim, i, errors[i]);
  }
}

}  // namespace

// With an argument n: every n-th problem only, for emulators.
int main(int argc, char** argv) {
  const size_t step = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::vector<Problem> problems;
  const int64_t sizes[][7] = {  // batch, heads, kv_heads, query_len, kv_len, head_dim, value_dim
      {1, 1, 1, 1, 1, 1, 1},      {2, 2, 1, 7, 9, 5, 3},     {1, 4, 2, 33, 65, 64, 64}, {1, 2, 1, 130, 200, 32, 80},
      {2, 3, 3, 70, 13, 17, 16},  {1, 8, 2, 1, 213, 64, 64}, {1, 1, 1, 1, 70, 32, 32},  {1, 1, 1, 40, 1200, 8, 24},
  };
  for (const auto& n : sizes) {
    Problem problem;
    problem.shape = {n[0], n[1], n[2], n[3], n[4], n[5], n[6]};
    problems.push_back(problem);
    problem.band_upper = n[4] - n[3];
    problems.push_back(problem);
    problem.has_ranges = true;
    problems.push_back(problem);
    problem.band_upper = MaskParams::no_upper;
    problem.has_bias = true;
    problems.push_back(problem);
    problem.has_modifiers = true;
    problems.push_back(problem);
    for (const auto& [query_block, kv_block] : {std::pair{16, 16}, std::pair{64, 48}, std::pair{32, 208}}) {
      problem = {.shape = problem.shape, .query_block = query_block, .kv_block = kv_block};
      problems.push_back(problem);
      problem.has_ranges = problem.has_bias = problem.has_modifiers = true;
      problems.push_back(problem);
    }
  }
  for (int i = 0; i < cpu::kIsaCount; i++) {
    const cpu::Isa isa = static_cast<cpu::Isa>(i);
    if (!cpu::isa_select(isa)) continue;
    for (size_t n = 0; n < problems.size(); n += step) {
      const Problem& problem = problems[n];
      compare<float, float>(cpu::isa_name(isa), problem, DType::float32, 5e-6);
      compare<double, double>(cpu::isa_name(isa), problem, DType::float64, 1e-14);
      compare<Float16, float>(cpu::isa_name(isa), problem, DType::float16, 3e-3);
      compare<BFloat16, float>(cpu::isa_name(isa), problem, DType::bfloat16, 2e-2);
    }
  }
  return check::result();
}
