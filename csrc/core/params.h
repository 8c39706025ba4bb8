// The plain data that crosses every boundary of the library: bindings fill it, kernels read it.
// No torch, no CUDA runtime, no ownership.  Strides are in elements, scale is a plain factor.
#pragma once
#include <cstdint>
#include <limits>

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

  int64_t group() const { return kv_heads > 0 ? heads / kv_heads : 0; }
};

// Which keys a query may attend to.  Query i sees key j when
//   band_lower <= j - i <= band_upper   and   j < key_lengths[batch]   and   the dense mask allows (i, j).
// Causal top-left is band_upper = 0, causal bottom-right is band_upper = kv_len - query_len.
struct MaskParams {
  static constexpr int64_t no_lower = std::numeric_limits<int64_t>::min();
  static constexpr int64_t no_upper = std::numeric_limits<int64_t>::max();
  int64_t band_lower = no_lower, band_upper = no_upper;
  const int64_t* key_lengths = nullptr;  // [batch], or null: every key counts

  // Added to the scaled scores (float dtypes), or true = may attend (boolean).  data == nullptr: none.
  // View of (batch, heads, query_len, kv_len).
  ConstTensorView bias;
  DType bias_dtype = DType::float32;
};

// Per-row softmax statistics are contiguous (batch, heads, query_len), float64 for float64 inputs and float32
// for all others.  lse = log(sum_j exp(s_ij)), -inf for a row with nothing to attend to.
// lse_residual is what rounding lse lost (see core/online_softmax.h): the backward pass subtracts both.
struct ForwardParams {
  AttentionShape shape;
  DType dtype = DType::float32;
  double scale = 1;
  MaskParams mask;
  ConstTensorView query, key, value;  // stride_column is 1
  TensorView out;                     // stride_column is 1
  void* lse = nullptr;                // or null: neither is wanted
  void* lse_residual = nullptr;
};

struct BackwardParams {
  AttentionShape shape;
  DType dtype = DType::float32;
  double scale = 1;
  MaskParams mask;
  ConstTensorView query, key, value, out, grad_out;  // stride_column is 1
  const void* lse = nullptr;
  const void* lse_residual = nullptr;
  const void* grad_lse = nullptr;               // like lse, or null: zero
  TensorView grad_query, grad_key, grad_value;  // stride_column is 1
};

}  // namespace attn_ext
