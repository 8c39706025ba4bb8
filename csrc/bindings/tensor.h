// Torch tensors as the stable ABI hands them over, and what the kernels need of them: views and allocation.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "core/params.h"

namespace attn_ext::bindings {

constexpr int kDTypes = kComputeDTypes + 1;

// Torch's code of a dtype, which may differ between torch versions.
inline int32_t torch_dtype(DType dtype) {
  static const int32_t codes[kDTypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                         aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(),
                                         aoti_torch_dtype_bool()};
  return codes[static_cast<int>(dtype)];
}

struct Device {
  int32_t type, index;

  bool operator==(const Device&) const = default;
};
inline Device cpu() { return {aoti_torch_device_type_cpu(), 0}; }

// Owns one reference to a tensor, or none.  torch::stable::Tensor does so through a shared_ptr, whose control
// block costs an allocation per tensor and call.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    if (handle == nullptr) return;
    aoti_torch_get_dim(handle, &dim_);
    aoti_torch_get_sizes(handle, &sizes_);
    aoti_torch_get_strides(handle, &strides_);
    aoti_torch_get_dtype(handle, &dtype_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_.get(); }
  AtenTensorHandle release() { return handle_.release(); }

  int64_t dim() const { return dim_; }
  int64_t size(int d) const { return sizes_[d]; }
  int64_t stride(int d) const { return strides_[d]; }
  const int64_t* sizes() const { return sizes_; }
  int64_t elements() const {
    int64_t elements = 1;
    for (int d = 0; d < dim_; ++d) elements *= sizes_[d];
    return elements;
  }
  int32_t dtype_code() const { return dtype_; }
  bool is(DType dtype) const { return dtype_ == torch_dtype(dtype); }
  Device device() const {
    Device device{-1, 0};
    aoti_torch_get_device_type(get(), &device.type);
    if (device.type != cpu().type) aoti_torch_get_device_index(get(), &device.index);
    return device;
  }
  bool is_contiguous() const {
    bool contiguous = false;
    aoti_torch_is_contiguous(get(), &contiguous);
    return contiguous;
  }
  void* data() const {
    void* pointer = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(get(), &pointer));
    return pointer || elements() == 0 ? pointer : nowhere();
  }
  // A tensor of the meta device has sizes and no memory: what asks whether there is one, and how it lies, gets an address as
  // aligned as any.
  bool has_memory() const { return data() != nowhere(); }

 private:
  static void* nowhere() { return reinterpret_cast<void*>(uintptr_t{4096}); }

  struct Deleter {
    void operator()(AtenTensorHandle handle) const noexcept { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Deleter> handle_;
  int64_t* sizes_ = nullptr;  // borrowed from the tensor
  int64_t* strides_ = nullptr;
  int64_t dim_ = 0;
  int32_t dtype_ = -1;
};

inline std::string shape_string(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << sizes[d];
  text << ')';
  return text.str();
}

inline std::string shape_string(const Tensor& tensor) { return shape_string(tensor.sizes(), tensor.dim()); }

// An uninitialised tensor whose memory order is `order`, outermost dimension first.
template <int N>
Tensor empty(const int64_t (&sizes)[N], const int (&order)[N], int32_t dtype_code, Device device) {
  int64_t strides[N];
  int64_t elements = 1;
  bool overflow = false;
  for (int k = N - 1; k >= 0; --k) {
    strides[order[k]] = elements;
    overflow |= __builtin_mul_overflow(elements, std::max<int64_t>(sizes[order[k]], 1), &elements);
  }
  AtenTensorHandle handle = nullptr;
  const bool allocated = !overflow && aoti_torch_empty_strided(N, sizes, strides, dtype_code, device.type, device.index,
                                                               &handle) == TORCH_SUCCESS;
  STD_TORCH_CHECK(allocated, "not enough memory for a tensor of shape ", shape_string(sizes, N));
  return Tensor(handle);
}

// An uninitialised (B, H, L, D) tensor in the memory order of `model`: (B, L, H, D) when that is how model's rows
// lie, as in `x.view(B, L, H, D).transpose(1, 2)`, so that transposing the result back is free too.
inline Tensor empty_in_order_of(const Tensor& model, const int64_t (&sizes)[4]) {
  const bool rows_outside_heads = model.size(1) > 1 && model.size(2) > 1 && model.stride(1) < model.stride(2);
  return rows_outside_heads ? empty(sizes, {0, 2, 1, 3}, model.dtype_code(), model.device())
                            : empty(sizes, {0, 1, 2, 3}, model.dtype_code(), model.device());
}

// A contiguous copy; not a clone, which would keep the order of a dense tensor.
inline Tensor copied(const Tensor& tensor, int32_t dtype_code) {
  AtenTensorHandle copy = nullptr;
  int64_t strides[8], elements = 1;
  STD_TORCH_CHECK(tensor.dim() <= 8, "at most 8 dimensions");
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    strides[d] = elements;
    elements *= std::max<int64_t>(tensor.size(static_cast<int>(d)), 1);
  }
  const Device device = tensor.device();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(tensor.dim(), tensor.sizes(), strides, dtype_code, device.type,
                                                         device.index, &copy));
  Tensor result(copy);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), tensor.get(), 0));
  return result;
}
inline Tensor contiguous(Tensor tensor) {
  return tensor.is_contiguous() ? std::move(tensor) : copied(tensor, tensor.dtype_code());
}
inline Tensor converted(Tensor tensor, DType dtype) {
  return tensor.is(dtype) ? std::move(tensor) : copied(tensor, torch_dtype(dtype));
}

// No elements.
inline Tensor nothing(DType dtype, Device device) { return empty({0}, {0}, torch_dtype(dtype), device); }

// Another view of the memory of a tensor.
template <int N>
Tensor reinterpreted(const Tensor& tensor, const int64_t (&sizes)[N], const int64_t (&strides)[N]) {
  AtenTensorHandle handle = nullptr;  // its offset counts from the start of `tensor`, not of the storage
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), N, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// A copy of a 4-D tensor, with adjacent columns; of dimensions that are broadcast (stride 0), once.  The number of columns
// becomes a multiple of `unit`: those that are new are 0.
inline Tensor copied_rows(const Tensor& tensor, int64_t unit = 1) {
  int64_t sizes[4], strides[4];
  for (int d = 0; d < 4; ++d) {
    sizes[d] = d < 3 && tensor.stride(d) == 0 ? std::min<int64_t>(tensor.size(d), 1) : tensor.size(d);
    strides[d] = tensor.stride(d);
  }
  const Tensor source = reinterpreted(tensor, sizes, strides);
  const int64_t columns = (sizes[3] + unit - 1) / unit * unit;
  const Tensor copy = empty({sizes[0], sizes[1], sizes[2], columns}, {0, 1, 2, 3}, tensor.dtype_code(), tensor.device());
  if (columns != sizes[3]) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(copy.get()));
  for (int d = 0; d < 4; ++d) strides[d] = copy.stride(d);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(reinterpreted(copy, sizes, strides).get(), source.get(), 0));

  for (int d = 0; d < 3; ++d) {
    if (sizes[d] != tensor.size(d)) strides[d] = 0;
    sizes[d] = tensor.size(d);
  }
  sizes[3] = columns;
  return reinterpreted(copy, sizes, strides);
}

// Kernels read rows of adjacent columns.
inline Tensor with_adjacent_columns(Tensor tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? std::move(tensor) : copied_rows(tensor);
}

inline TensorView view(const Tensor& tensor) {
  return {tensor.data(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline ConstTensorView const_view(const Tensor& tensor) {
  return {tensor.data(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// A view of a larger shape: dimensions of size 1 repeat.
inline ConstTensorView broadcast_view(const Tensor& tensor) {
  const auto stride = [&](int d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
  return {tensor.data(), stride(0), stride(1), stride(2), stride(3)};
}

}  // namespace attn_ext::bindings
