// The plain data that crosses every boundary of the library: bindings fill it, kernels read it.
// No torch, no CUDA runtime, no ownership.  Strides are in elements, scale is a plain factor.
#pragma once
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace attn_ext {

enum class DType : int32_t { float32, float64, float16, bfloat16, boolean };
constexpr int kComputeDTypes = 4;  // float32, float64, float16, bfloat16: the dtypes attention is computed in

// A 4-D tensor (batch, head, row, column).  A stride of 0 broadcasts that dimension.
template <class Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0, stride_column = 0;
};
using ConstTensorView = BasicTensorView<const void*>;
using TensorView = BasicTensorView<void*>;

struct AttentionShape {
  int64_t batch = 0;
  int64_t heads = 0, kv_heads = 0;  // heads is a multiple of kv_heads; query head h reads kv head h / group()
  int64_t query_len = 0, kv_len = 0;
  int64_t head_dim = 0, value_dim = 0;  // columns of query and key; columns of value and out

  ATTN_HD int64_t group() const { return kv_heads > 0 ? heads / kv_heads : 0; }
};

constexpr int kMaxKeyRanges = 4;

// Which keys a query may attend to.  Query i of batch element b sees key j when
//   band_lower <= j - i <= band_upper
//   and  one of the ranges of (b, i) holds j
//   and  query_segments[b][i] == kv_segments[b][j]
//   and  a block that the lists of (b, h) name holds (i, j), and is full or has its bit set
//   and  the dense mask is true at (b, h, i, j).
// Causal top-left is band_upper = 0, causal bottom-right is band_upper = kv_len - query_len.
struct MaskParams {
  static constexpr int64_t no_lower = std::numeric_limits<int64_t>::min();
  static constexpr int64_t no_upper = std::numeric_limits<int64_t>::max();
  int64_t band_lower = no_lower, band_upper = no_upper;

  // (batch, query_len, ranges, 2), first and one past the last key of each range; null: every key counts.
  struct KeyRanges {
    const int64_t* data = nullptr;
    int64_t stride_batch = 0, stride_row = 0;  // ranges of a row are contiguous
    int count = 1;                             // to kMaxKeyRanges
  } key_ranges;

  // (batch, query_len) and (batch, kv_len), contiguous along the length; null: one segment.
  struct SegmentIds {
    const int32_t* data = nullptr;
    int64_t stride_batch = 0;
  } query_segments, kv_segments;

  // The blocks of the score matrix that exist, in compressed rows.  Query block r of (b, h) sees the blocks of keys
  // indices[s], offsets[b][h][r] <= s < offsets[b][h][r + 1], in rising order.
  struct BlockLists {
    const int64_t* offsets = nullptr;  // (batch, heads, query blocks + 1), null: every block exists, and is full
    int64_t stride_batch = 0, stride_head = 0;
    const int32_t* indices = nullptr;
    const int32_t* tiles = nullptr;  // of each block in the lists: -1: it is full; else which of `bits` it has
    const uint8_t* bits = nullptr;   // (tiles, kv_block, query_block / 8): bit q % 8 of byte q / 8 is query q
    int64_t entries = 0, bit_tiles = 0;   // how many of `indices` and of tiles in `bits` there are
    int query_block = 16, kv_block = 16;  // multiples of 16

    ATTN_HD const int64_t* row(int64_t batch, int64_t head, int64_t query) const {
      return offsets + batch * stride_batch + head * stride_head + query / query_block;
    }
  } blocks;

  ConstTensorView dense;  // boolean, of (batch, heads, query_len, kv_len); any byte but 0 is true; null: none
};

// How the product of a query and a key becomes a score, in the order of application:
//   s = scale * q.k;   s = softcap * tanh(s / softcap);   s += bias;   s -= slope * |position - j|
struct ScoreParams {
  double scale = 1;
  double softcap = 0;                    // 0: none; else 2^-100 to 2^100 (Gemma 2, 2024)
  ConstTensorView bias;                  // of (batch, heads, query_len, kv_len), -inf hides a key; null: none
  DType bias_dtype = DType::float32;     // not boolean
  // ALiBi (Press et al. 2022).
  const double* alibi_slopes = nullptr;  // [batch or 1][heads][query_len or 1], or null
  int64_t alibi_stride_batch = 0, alibi_stride_head = 1, alibi_stride_row = 0;
  const int64_t* alibi_positions = nullptr;  // [query_len]: of each query among the keys; null: i + kv_len - query_len
  const double* sinks = nullptr;         // [heads], or null: one more score per row, whose value is 0 (gpt-oss, 2025)
};

// See core/dropout.h.
struct DropoutParams {
  static constexpr int32_t kOne = 1 << 16;
  uint64_t seed = 0;
  const int64_t* seed_data = nullptr;  // where the seed is, if that is not `seed`: in memory the host cannot read
  int32_t threshold = kOne;            // a weight stays if its 16 random bits are below; kOne: no dropout
  double inverse_keep = 1;             // what the weights that stay are multiplied by: kOne / threshold, 0 if none stays

  // p is rounded to a multiple of 2^-16.
  ATTN_HD static DropoutParams of(double p, uint64_t seed) {
    DropoutParams params;
    params.seed = seed;
    params.threshold = static_cast<int32_t>((1 - p) * kOne + 0.5);
    params.inverse_keep = params.threshold ? static_cast<double>(kOne) / params.threshold : 0;
    return params;
  }
  ATTN_HD bool enabled() const { return threshold < kOne; }
  ATTN_HD uint64_t key() const { return seed_data ? static_cast<uint64_t>(*seed_data) : seed; }
};

// Which weights dropout keeps: (batch, heads, query_end - query_begin, kv_len), contiguous, 1: kept.
struct DropoutMaskParams {
  DropoutParams dropout;
  int64_t batch = 0, heads = 0, query_begin = 0, query_end = 0, kv_len = 0;
  uint8_t* mask = nullptr;

  ATTN_HD int64_t elements() const { return batch * heads * (query_end - query_begin) * kv_len; }
};

struct AttentionParams {
  AttentionShape shape;
  DType dtype = DType::float32;
  MaskParams mask;
  ScoreParams score;
  DropoutParams dropout;
  ConstTensorView query, key, value;  // stride_column is 1
};

// Per-row softmax statistics are contiguous (batch, heads, query_len), float64 for float64 inputs and float32
// for all others.  lse = log(sum_j exp(s_ij)), sinks included; -inf for a row with nothing to attend to.
// lse_residual is what rounding lse lost (see core/online_softmax.h): the backward pass subtracts both.
struct ForwardParams : AttentionParams {
  TensorView out;       // stride_column is 1
  void* lse = nullptr;  // or null: neither is wanted
  void* lse_residual = nullptr;
};

struct BackwardParams : AttentionParams {
  ConstTensorView out, grad_out;  // stride_column is 1
  const void* lse = nullptr;
  const void* lse_residual = nullptr;
  const void* grad_lse = nullptr;               // like lse, or null: zero
  TensorView grad_query, grad_key, grad_value;  // stride_column is 1

  // What is not wanted is null.
  TensorView grad_bias;            // of the dtype of lse; a stride is 0 where the bias broadcasts
  int64_t grad_bias_elements = 0;  // contiguous
  double* grad_sinks = nullptr;    // [heads]
};

// What the numbers of a cache are: those of the query's dtype, or 8-bit codes, each page and head with a scale of its own.
enum class CacheFormat : int32_t { plain, int8, float8_e4m3 };

// Keys or values of all sequences: (pages, kv_heads, page_size, columns), stride_column 1.
struct CacheView : TensorView {
  const float* scale = nullptr;  // [pages][kv_heads], what the codes are multiplied by; null for plain caches
};

// A few queries of each sequence over its cache, to which new keys and values are appended first.
// shape.kv_len is the number of rows to append.  With total = lengths[b] + kv_len, query i is token total - query_len + i
// of its sequence; it sees the keys at its own position, the `window_left` before it and none after.
struct DecodeParams {
  AttentionShape shape;
  DType dtype = DType::float32;  // of query, out, new_key and new_value
  CacheFormat format = CacheFormat::plain;
  ScoreParams score;  // no bias

  CacheView key_cache, value_cache;
  int64_t page_size = 0;
  const int64_t* lengths = nullptr;  // [batch]: tokens in the cache before the append
  const int64_t* pages = nullptr;    // [batch][pages_per_sequence], read where first_key() to total are
  int64_t pages_per_sequence = 0;
  int64_t window_left = std::numeric_limits<int64_t>::max();
  int64_t splits = 0;  // ranges of keys of a sequence, at most; 0: the kernel decides, from each length alone

  ConstTensorView query, new_key, new_value;  // stride_column is 1
  TensorView out;                             // stride_column is 1
  void* lse = nullptr;                        // (batch, heads, query_len), contiguous; see ForwardParams

  // Rotary embedding (Su et al. 2021, "RoFormer") of the first 2 * half columns of query and new_key: pairs of columns
  // (2 c, 2 c + 1) if interleaved, else (c, c + half), are turned by the angle of row `position` of cos and sin.
  struct Rotary {
    ConstTensorView cos, sin;  // of (1, 1, positions, half), stride_column 1; null: none
    DType dtype = DType::float32;
    int64_t half = 0;
    bool interleaved = false;
  } rotary;

  ATTN_HD int64_t total(int64_t b) const { return lengths[b] + shape.kv_len; }
  ATTN_HD int64_t position(int64_t b, int64_t query) const { return total(b) - shape.query_len + query; }
  // The first key that any query of the sequence sees.
  ATTN_HD int64_t first_key(int64_t b) const { return first_key(b, 0); }
  ATTN_HD int64_t first_key(int64_t b, int64_t query) const {
    const int64_t at = position(b, query);
    return at > window_left ? at - window_left : 0;
  }
};

// Numbers of a tensor of int32 or int64.
struct IntegerView {
  const void* data = nullptr;
  int64_t stride_row = 0, stride_column = 0;
  bool wide = true;  // int64

  ATTN_HD int64_t at(int64_t row, int64_t column = 0) const {
    const int64_t offset = row * stride_row + column * stride_column;
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

// Where the host does not read lengths and pages, the kernels do, in place of `lengths` and `pages`; whatever is there.
struct DeviceDecodeParams : DecodeParams {
  IntegerView given_lengths;  // (batch): brought to 0 .. room
  int64_t room = 0;           // what fits the cache and the rows of rotary.cos, less what is appended; >= 0
  IntegerView table;          // (batch, pages_per_sequence): pages that are not there hold nothing; null: sequence b is page b
  int64_t page_count = 0;     // of which pages from 2^31 on cannot be named

  // Set by plan() of cuda/decode_plan.h.
  float score_factor = 1, score_cap = 0;  // scores, in units of log2, are factor * q.k or cap * tanh(factor * q.k)
  // What the ranges of keys leave: of each row and range the output, and m and l of its softmax.
  int64_t ranges = 0;             // of a row there is room for
  int64_t blocks = 0;             // that share the ranges of a row
  float* partial_out = nullptr;   // [batch][heads][query_len][ranges][partial_columns]
  int64_t partial_columns = 0;    // value_dim, rounded up to 4
  float* partial_state = nullptr;  // [batch][heads][query_len][ranges][2]
};

}  // namespace attn_ext
