// How the kernels of cuda/ are called: they copy rows in pieces of 16 bytes, so that is how rows have to lie.
#pragma once
#include "bindings/forward.h"
#include "cuda/kernels.h"

namespace attn_ext::bindings {

// Whether rows start at multiples of 16 bytes and end there: of `unit` elements; and are less than 16 MiB apart.
inline bool has_aligned_rows(const Tensor& tensor, int64_t unit) {
  for (int d = 0; d < 3; ++d)
    if (tensor.size(d) != 1 && tensor.stride(d) % unit != 0) return false;
  if (tensor.stride(2) >= unit << 20 && tensor.size(2) > 1) return false;
  return tensor.size(3) % unit == 0 && tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data()) % 16 == 0;
}

// Enqueues the kernel by `launch(params, results)`.  Tensors that lie otherwise are copied, with columns of zeros if there
// are too few; the result is then copied out of a wider one, since it has to be dense.
template <class Launch>
void run_aligned(Inputs& inputs, ForwardParams& params, ForwardResults& results, const cuda::Device& device, Launch&& launch) {
  const int64_t unit = 16 / static_cast<int64_t>(aoti_torch_dtype_element_size(inputs.query.dtype_code()));
  AttentionShape& shape = params.shape;
  for (auto [tensor, view] : {std::pair{&inputs.query, &params.query}, std::pair{&inputs.key, &params.key},
                              std::pair{&inputs.value, &params.value}}) {
    if (!has_aligned_rows(*tensor, unit)) *tensor = copied_rows(*tensor, unit);
    *view = broadcast_view(*tensor);
  }
  shape.head_dim = inputs.query.size(3);
  shape.value_dim = inputs.value.size(3);

  Tensor dense = std::move(results.out);
  const bool is_padded = dense.size(3) != shape.value_dim;
  results.out = is_padded ? empty({shape.batch, shape.heads, shape.query_len, shape.value_dim}, {0, 1, 2, 3},
                                  dense.dtype_code(), inputs.device)
                          : std::move(dense);
  params.out = view(results.out);
  const char* reason = cuda::unsupported(params, device);
  STD_TORCH_CHECK(reason == nullptr, "attention on CUDA: ", reason);
  launch(params, results);
  if (!is_padded) return;
  const int64_t sizes[4] = {dense.size(0), dense.size(1), dense.size(2), dense.size(3)};
  const int64_t strides[4] = {results.out.stride(0), results.out.stride(1), results.out.stride(2), 1};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(dense.get(), reinterpreted(results.out, sizes, strides).get(), 0));
  results.out = std::move(dense);
}

}  // namespace attn_ext::bindings
