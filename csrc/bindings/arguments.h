// The arguments of a boxed operator: taking, checking, and handing results back.
#pragma once
#include <optional>

#include "bindings/tensor.h"

namespace attn_ext::bindings {

constexpr int64_t kMaxHeadDim = 1024;

// The arguments of a boxed call, in schema order.  Each is taken, and so owned, before anything can throw.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(take<AtenTensorHandle>()); }
  Tensor optional_tensor() { return Tensor(take<std::optional<AtenTensorHandle>>().value_or(nullptr)); }
  double number() { return take<double>(); }
  int64_t integer() { return take<int64_t>(); }
  bool flag() { return take<bool>(); }
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

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.device() == cpu(), name, " must be a CPU tensor, as query is");
}

inline void check_device(const Tensor& tensor, const char* name, Device device) {
  STD_TORCH_CHECK(tensor.device() == device, name, " must be on the device of query");
}

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ", shape_string(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, DType dtype, const char* expected) {
  STD_TORCH_CHECK(tensor.is(dtype), name, " must have ", expected);
}

template <int N>
void check_shape(const Tensor& tensor, const char* name, const int64_t (&sizes)[N]) {
  check_dim(tensor, name, N);
  STD_TORCH_CHECK(std::equal(sizes, sizes + N, tensor.sizes()), name, " must have shape ", shape_string(sizes, N),
                  ", got ", shape_string(tensor));
}

inline DType compute_dtype(const Tensor& query) {
  for (int i = 0; i < kComputeDTypes; ++i)
    if (query.is(static_cast<DType>(i))) return static_cast<DType>(i);
  STD_TORCH_CHECK(false, "query must be float32, float64, float16 or bfloat16");
}

inline DType statistics_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// (batch or 1, length)
inline void check_rows(const Tensor& tensor, const char* name, Device device, int64_t batch, int64_t length) {
  check_device(tensor, name, device);
  check_dim(tensor, name, 2);
  STD_TORCH_CHECK((tensor.size(0) == 1 || tensor.size(0) == batch) && tensor.size(1) == length, name, " must be (",
                  batch, " or 1, ", length, "), got ", shape_string(tensor));
}

// In double, which `sinks` owns from then on.
inline const double* checked_sinks(Tensor& sinks, const AttentionShape& shape, Device device) {
  check_device(sinks, "sinks", device);
  check_shape(sinks, "sinks", {shape.heads});
  sinks = contiguous(converted(std::move(sinks), DType::float64));
  return static_cast<const double*>(sinks.data());
}

inline double checked_softcap(double softcap) {
  STD_TORCH_CHECK(0 <= softcap && softcap <= std::numeric_limits<double>::max(),
                  "softcap must be finite and not negative, got ", softcap);
  // As good as none, or all there is; and finite in every precision, as is its inverse.
  return softcap > 0 ? std::min(std::max(softcap, 0x1p-100), 0x1p100) : 0;
}

}  // namespace attn_ext::bindings
