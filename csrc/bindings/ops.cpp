// torch.ops.attn_ext.*: schemas, checks, allocation, and the call into the kernels.
//
// Callers explain a bad argument better than a C++ exception can; the checks here are the last line, so that no
// argument whatever reaches a kernel that would read or write outside a tensor.
#include <optional>

#include "bindings/tensor.h"
#include "bindings/torch_executor.h"
#include "cpu/kernel_table.h"

namespace attn_ext::bindings {
namespace {

constexpr int64_t kMaxHeadDim = 1024;

// The arguments of a boxed call, in schema order.  Each is taken, and so owned, before anything can throw.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(take<AtenTensorHandle>()); }
  Tensor optional_tensor() { return Tensor(take<std::optional<AtenTensorHandle>>().value_or(nullptr)); }
  double number() { return take<double>(); }
  std::optional<int64_t> optional_int() { return take<std::optional<int64_t>>(); }

 private:
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  StableIValue* next_;
};

// Hands the results over to the caller of a boxed call.
template <class... Tensors>
void give(StableIValue* stack, Tensors&... results) {
  ((*stack++ = torch::stable::detail::from(results.release())), ...);
}

void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.on_cpu(), name, " must be a CPU tensor, as query is");
}

void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ", shape_string(tensor));
}

void check_dtype(const Tensor& tensor, const char* name, DType dtype, const char* expected) {
  STD_TORCH_CHECK(tensor.is(dtype), name, " must have ", expected);
}

template <int N>
void check_shape(const Tensor& tensor, const char* name, const int64_t (&sizes)[N]) {
  check_dim(tensor, name, N);
  STD_TORCH_CHECK(std::equal(sizes, sizes + N, tensor.sizes()), name, " must have shape ", shape_string(sizes, N),
                  ", got ", shape_string(tensor));
}

DType compute_dtype(const Tensor& query) {
  for (int i = 0; i < kComputeDTypes; ++i)
    if (query.is(static_cast<DType>(i))) return static_cast<DType>(i);
  STD_TORCH_CHECK(false, "query must be float32, float64, float16 or bfloat16");
}

DType statistics_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

AttentionShape checked_shape(const Tensor& query, const Tensor& key, const Tensor& value, DType dtype) {
  check_cpu(query, "query");
  check_cpu(key, "key");
  check_cpu(value, "value");
  check_dtype(key, "key", dtype, "the dtype of query");
  check_dtype(value, "value", dtype, "the dtype of query");
  check_dim(query, "query", 4);
  check_dim(key, "key", 4);
  check_dim(value, "value", 4);
  const AttentionShape shape{.batch = query.size(0),
                             .heads = query.size(1),
                             .kv_heads = key.size(1),
                             .query_len = query.size(2),
                             .kv_len = key.size(2),
                             .head_dim = query.size(3),
                             .value_dim = value.size(3)};
  check_shape(key, "key", {shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim});
  check_shape(value, "value", {shape.batch, shape.kv_heads, shape.kv_len, shape.value_dim});
  STD_TORCH_CHECK(shape.kv_heads > 0 ? shape.heads % shape.kv_heads == 0 : shape.heads == 0,
                  "the heads of query must be a multiple of those of key, got ", shape.heads, " and ", shape.kv_heads);
  STD_TORCH_CHECK(1 <= shape.head_dim && shape.head_dim <= kMaxHeadDim, "query and key must have 1 to ", kMaxHeadDim,
                  " columns, got ", shape.head_dim);
  STD_TORCH_CHECK(1 <= shape.value_dim && shape.value_dim <= kMaxHeadDim, "value must have 1 to ", kMaxHeadDim,
                  " columns, got ", shape.value_dim);
  return shape;
}

void set_bias(MaskParams& mask, const Tensor& bias, const AttentionShape& shape) {
  check_cpu(bias, "bias");
  check_dim(bias, "bias", 4);
  const int64_t full[4] = {shape.batch, shape.heads, shape.query_len, shape.kv_len};
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(bias.size(d) == 1 || bias.size(d) == full[d], "bias must broadcast to ",
                    shape_string(full, 4), ", got ", shape_string(bias));
  int dtype = 0;
  while (dtype < kDTypes && !bias.is(static_cast<DType>(dtype))) ++dtype;
  STD_TORCH_CHECK(dtype < kDTypes, "bias must be bool, float32, float64, float16 or bfloat16");
  mask.bias = broadcast_view(bias);
  mask.bias_dtype = static_cast<DType>(dtype);
}

void set_key_lengths(MaskParams& mask, Tensor& key_lengths, const AttentionShape& shape) {
  check_cpu(key_lengths, "key_lengths");
  STD_TORCH_CHECK(key_lengths.dtype_code() == aoti_torch_dtype_int64(), "key_lengths must be int64");
  check_shape(key_lengths, "key_lengths", {shape.batch});
  key_lengths = contiguous(std::move(key_lengths));
  const auto* lengths = static_cast<const int64_t*>(key_lengths.data());
  for (int64_t b = 0; b < shape.batch; ++b)
    STD_TORCH_CHECK(0 <= lengths[b] && lengths[b] <= shape.kv_len, "key_lengths[", b, "] must be 0 to ", shape.kv_len,
                    ", got ", lengths[b]);
  mask.key_lengths = lengths;
}

MaskParams checked_mask(const Tensor& bias, Tensor& key_lengths, std::optional<int64_t> band_lower,
                        std::optional<int64_t> band_upper, const AttentionShape& shape) {
  MaskParams mask;
  if (bias) set_bias(mask, bias, shape);
  if (key_lengths) set_key_lengths(mask, key_lengths, shape);
  mask.band_lower = band_lower.value_or(MaskParams::no_lower);
  mask.band_upper = band_upper.value_or(MaskParams::no_upper);
  return mask;
}

// The arguments that attention_forward and attention_output share, checked.
struct ForwardCall {
  Tensor query, key, value, bias, key_lengths;
  ForwardParams params;

  explicit ForwardCall(StableIValue* stack) {
    Arguments arguments(stack);
    query = arguments.tensor(), key = arguments.tensor(), value = arguments.tensor();
    bias = arguments.optional_tensor(), key_lengths = arguments.optional_tensor();
    params.scale = arguments.number();
    const auto band_lower = arguments.optional_int(), band_upper = arguments.optional_int();
    params.dtype = compute_dtype(query);
    params.shape = checked_shape(query, key, value, params.dtype);
    params.mask = checked_mask(bias, key_lengths, band_lower, band_upper, params.shape);
  }
  // Fills and returns out.
  Tensor run() {
    const AttentionShape& shape = params.shape;
    Tensor out = empty_in_order_of(query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
    for (auto [tensor, view] : {std::pair{&query, &params.query}, std::pair{&key, &params.key}, std::pair{&value, &params.value}}) {
      *tensor = with_adjacent_columns(std::move(*tensor));
      *view = const_view(*tensor);
    }
    params.out = view(out);
    cpu::kernel_table().forward[static_cast<int>(params.dtype)](params, torch_executor());
    return out;
  }
};

// attention_forward(query, key, value, bias?, key_lengths?, scale, band_lower?, band_upper?) -> (out, lse, lse_residual)
void attention_forward(StableIValue* stack, uint64_t, uint64_t) {
  ForwardCall call(stack);
  const AttentionShape& shape = call.params.shape;
  const int64_t rows[3] = {shape.batch, shape.heads, shape.query_len};
  const int32_t statistics = torch_dtype(statistics_dtype(call.params.dtype));
  Tensor lse = empty(rows, {0, 1, 2}, statistics), lse_residual = empty(rows, {0, 1, 2}, statistics);
  call.params.lse = lse.data();
  call.params.lse_residual = lse_residual.data();
  Tensor out = call.run();
  give(stack, out, lse, lse_residual);
}

// attention_output(query, key, value, bias?, key_lengths?, scale, band_lower?, band_upper?) -> out
void attention_output(StableIValue* stack, uint64_t, uint64_t) {
  Tensor out = ForwardCall(stack).run();
  give(stack, out);
}

// attention_backward(grad_out, grad_lse?, query, key, value, out, lse, lse_residual, bias?, key_lengths?, scale,
//                    band_lower?, band_upper?) -> (grad_query, grad_key, grad_value)
void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor grad_out = arguments.tensor(), grad_lse = arguments.optional_tensor();
  Tensor query = arguments.tensor(), key = arguments.tensor(), value = arguments.tensor(), out = arguments.tensor();
  Tensor lse = arguments.tensor(), lse_residual = arguments.tensor();
  const Tensor bias = arguments.optional_tensor();
  Tensor key_lengths = arguments.optional_tensor();
  const double scale = arguments.number();
  const auto band_lower = arguments.optional_int(), band_upper = arguments.optional_int();

  const DType dtype = compute_dtype(query);
  const AttentionShape shape = checked_shape(query, key, value, dtype);
  const MaskParams mask = checked_mask(bias, key_lengths, band_lower, band_upper, shape);
  const auto check_like_out = [&](const Tensor& tensor, const char* name) {
    check_cpu(tensor, name);
    check_dtype(tensor, name, dtype, "the dtype of query");
    check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  };
  check_like_out(out, "out");
  check_like_out(grad_out, "grad_out");
  const auto checked_statistics = [&](Tensor& tensor, const char* name) {
    check_cpu(tensor, name);
    check_dtype(tensor, name, statistics_dtype(dtype), "dtype float64 for float64 inputs and float32 for all others");
    check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len});
    tensor = contiguous(std::move(tensor));
    return static_cast<const void*>(tensor.data());
  };
  BackwardParams params;
  params.shape = shape;
  params.dtype = dtype;
  params.scale = scale;
  params.mask = mask;
  params.lse = checked_statistics(lse, "lse");
  params.lse_residual = checked_statistics(lse_residual, "lse_residual");
  if (grad_lse) params.grad_lse = checked_statistics(grad_lse, "grad_lse");

  Tensor grad_query = empty_in_order_of(query, {shape.batch, shape.heads, shape.query_len, shape.head_dim});
  Tensor grad_key = empty_in_order_of(key, {shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim});
  Tensor grad_value = empty_in_order_of(value, {shape.batch, shape.kv_heads, shape.kv_len, shape.value_dim});
  params.grad_query = view(grad_query);
  params.grad_key = view(grad_key);
  params.grad_value = view(grad_value);

  for (auto [tensor, input] : {std::pair{&query, &params.query}, std::pair{&key, &params.key},
                               std::pair{&value, &params.value}, std::pair{&out, &params.out},
                               std::pair{&grad_out, &params.grad_out}}) {
    *tensor = with_adjacent_columns(std::move(*tensor));
    *input = const_view(*tensor);
  }
  cpu::kernel_table().backward[static_cast<int>(dtype)](params, torch_executor());
  give(stack, grad_query, grad_key, grad_value);
}

}  // namespace
}  // namespace attn_ext::bindings

STABLE_TORCH_LIBRARY(attn_ext, library) {
  library.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_lengths, float scale, "
      "SymInt? band_lower, SymInt? band_upper) -> (Tensor out, Tensor lse, Tensor lse_residual)");
  library.def(
      "attention_output(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_lengths, float scale, "
      "SymInt? band_lower, SymInt? band_upper) -> Tensor");
  library.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor lse_residual, Tensor? bias, Tensor? key_lengths, float scale, SymInt? band_lower, "
      "SymInt? band_upper) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, library) {
  library.impl("attention_forward", attn_ext::bindings::attention_forward);
  library.impl("attention_output", attn_ext::bindings::attention_output);
  library.impl("attention_backward", attn_ext::bindings::attention_backward);
}
