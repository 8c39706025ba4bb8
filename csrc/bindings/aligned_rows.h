// The kernels of cuda/ copy rows in pieces of 16 bytes, so that is how rows have to lie.
#pragma once
#include "bindings/inputs.h"
#include "bindings/unsupported.h"

namespace attn_ext::bindings {

// Elements of 16 bytes.
inline int64_t row_unit(const Tensor& tensor) {
  return 16 / static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype_code()));
}

// Whether rows start at multiples of 16 bytes and end there, and are less than 16 MiB apart.
inline bool has_aligned_rows(const Tensor& tensor) {
  const int64_t unit = row_unit(tensor);
  for (int d = 0; d < 3; ++d)
    if (tensor.size(d) != 1 && tensor.stride(d) % unit != 0) return false;
  if (tensor.stride(2) >= unit << 20 && tensor.size(2) > 1) return false;
  return tensor.size(3) % unit == 0 && tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data()) % 16 == 0;
}

// A tensor that lies otherwise is copied, with columns of zeros if there are too few.
inline ConstTensorView aligned_view(Tensor& tensor) {
  if (!has_aligned_rows(tensor)) tensor = copied_rows(tensor, row_unit(tensor));
  return broadcast_view(tensor);
}
// The shape counts the columns of zeros from then on.
inline void align_inputs(Inputs& inputs, AttentionParams& params) {
  params.query = aligned_view(inputs.query);
  params.key = aligned_view(inputs.key);
  params.value = aligned_view(inputs.value);
  params.shape.head_dim = inputs.query.size(3);
  params.shape.value_dim = inputs.value.size(3);
}

// A result that has to be dense, where the kernel writes more columns than it has: into another tensor, whose columns are then
// copied out.
class AlignedResult {
  Tensor dense_;

 public:
  // A wider tensor takes the place of `result` if need be.
  AlignedResult(Tensor& result, int64_t columns) {
    if (result.size(3) == columns) return;
    dense_ = std::move(result);
    result = empty({dense_.size(0), dense_.size(1), dense_.size(2), columns}, {0, 1, 2, 3}, dense_.dtype_code(), dense_.device());
  }
  Tensor dense(Tensor result) {
    if (!dense_) return result;
    const int64_t sizes[4] = {dense_.size(0), dense_.size(1), dense_.size(2), dense_.size(3)};
    const int64_t strides[4] = {result.stride(0), result.stride(1), result.stride(2), 1};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(dense_.get(), reinterpreted(result, sizes, strides).get(), 0));
    return std::move(dense_);
  }
};

}  // namespace attn_ext::bindings
