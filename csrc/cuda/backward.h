// What the backward kernels hand to one another, in memory that the caller lends for the call.
#pragma once
#include "core/host_device.h"
#include "core/params.h"
#include "cuda/score_factors.h"

namespace attn_ext::cuda {

// Rows are counted up to whole blocks of kRowBlock for each head: tiles of queries never reach beyond.
constexpr int kRowBlock = 128;

// A row of scores leaves with the weight P = 2^(s - normalizer), and D_i = rowsum(dO * O) - dlse.
//
// Four rows are 12 floats: their normalizers, lse in units of log2, inf (which makes P 0) for rows that see nothing or do not
// exist; then -D_i of two rows as accumulators of KeyRows have them, a, b, a, b; and of the other two.
struct RowTerms {
  static constexpr int kFloats = 3;  // a row

  // Where the terms of a row are, in floats from those of row 0.
  ATTN_HD static constexpr int64_t normalizer(int64_t row) { return row / 4 * (4 * kFloats) + row % 4; }
  ATTN_HD static constexpr int64_t minus_delta(int64_t row) { return row / 4 * (4 * kFloats) + 4 + row % 4 / 2 * 4 + row % 2; }

  float* terms;          // [batch][heads][padded rows]
  int32_t* precise;      // [batch][heads][padded / kRowBlock]: does rounding a normalizer show in a weight?
  float* sink;           // [batch][heads][query_len]: what each row adds to the gradient of its sink; null: not wanted
  int64_t padded;
};

// Which tiles of keys meet a tile of queries, as KeyVisitor knows it, written down; or which tiles of queries a tile of keys.
enum Meeting : uint8_t { kApart, kWhole, kPartial };
struct Meetings {
  uint8_t* data;       // [batch or 1][heads or 1][rows][columns]
  int batch, heads;
  int rows, columns;   // tiles of keys and of queries, or of queries and of keys

  ATTN_HD int64_t per_head() const { return static_cast<int64_t>(rows) * columns; }
};

// The gradient of a bias is summed by `splits` blocks for each of its tiles, and then over the splits.
struct BiasSums {
  float* partials;  // [splits][elements], or the gradient itself if there is one
  int splits;
};

// Along a dimension of the scores: tiles of the bias, and how many tiles of scores each of them is for.
struct BiasSpan {
  int owned, shared;

  ATTN_HD static BiasSpan of(int64_t stride, int64_t tiles) {
    const int count = static_cast<int>(tiles);
    return stride == 0 ? BiasSpan{1, count} : BiasSpan{count, 1};
  }
};
// Of tiles of `queries` and `keys`.
struct BiasSpans {
  BiasSpan batch, head, query, key;

  ATTN_HD BiasSpans(const BackwardParams& p, int queries, int keys)
      : batch(BiasSpan::of(p.grad_bias.stride_batch, p.shape.batch)),
        head(BiasSpan::of(p.grad_bias.stride_head, p.shape.heads)),
        query(BiasSpan::of(p.grad_bias.stride_row, (p.shape.query_len + queries - 1) / queries)),
        key(BiasSpan::of(p.grad_bias.stride_column, (p.shape.kv_len + keys - 1) / keys)) {}
  ATTN_HD int64_t owned() const { return static_cast<int64_t>(batch.owned) * head.owned * query.owned * key.owned; }
  ATTN_HD int64_t shared() const { return static_cast<int64_t>(batch.shared) * head.shared * query.shared * key.shared; }
};

// What a kernel of key gradients computes: where the accumulators of both do not fit the registers, one after the other.
enum class KeyOutputs { both, key, value };

struct BackwardArguments {
  BackwardParams params;
  RowTerms rows;
  ScoreFactors factors;
  float scale, inverse_keep;  // what gradients of products, and of weights that dropout keeps, are multiplied by
  Meetings of_keys, of_queries;  // for the kernels of these gradients, whose tiles they are
  BiasSums bias;
};

}  // namespace attn_ext::cuda
