// Whether tensors share memory: what is written must not be what is read as something else.
#pragma once
#include <vector>

#include "bindings/tensor.h"

namespace attn_ext::bindings {

// The offsets that numbers have in memory: sums of x * stride, first <= x <= last, over dimensions whose strides fall.
struct Dimension {
  int64_t stride, first, last;
};
using Lattice = std::vector<Dimension>;

inline Lattice lattice(const Tensor& tensor) {
  Lattice result;
  for (int d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) result.push_back({tensor.stride(d), 0, tensor.size(d) - 1});
  std::sort(result.begin(), result.end(), [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
  return result;
}

inline bool is_empty(const Tensor& tensor) {
  for (int d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) == 0) return true;
  return false;
}

// Whether steps along a dimension pass all that the smaller ones reach, as in every view of a plain tensor.
inline bool is_nested(const Lattice& dimensions) {
  int64_t reach = 0;
  for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
    if (d->stride <= reach) return false;
    reach += d->last * d->stride;
  }
  return true;
}

// Whether the dimensions from `at` on make `offset`.
inline bool has_offset(const Lattice& dimensions, size_t at, int64_t offset) {
  if (at == dimensions.size()) return offset == 0;
  int64_t lowest = 0, highest = 0;  // of what the smaller ones make
  for (size_t i = at + 1; i < dimensions.size(); ++i) {
    lowest += dimensions[i].first * dimensions[i].stride;
    highest += dimensions[i].last * dimensions[i].stride;
  }
  const auto& [stride, first, last] = dimensions[at];
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  const int64_t end = std::min(last, floor_div(offset - lowest, stride));
  for (int64_t x = std::max(first, -floor_div(highest - offset, stride)); x <= end; ++x)
    if (has_offset(dimensions, at + 1, offset - x * stride)) return true;
  return false;
}

// Of nested ones of a dtype: few x are left to try in each dimension.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (!a.has_memory() || !b.has_memory()) return false;
  Lattice difference = lattice(a);
  for (Dimension& d : difference) {
    d.first = -d.last;
    d.last = 0;
  }
  for (const Dimension& d : lattice(b)) {
    const auto is_reached = [&](const Dimension& other) { return other.stride <= d.stride; };
    const auto at = std::find_if(difference.begin(), difference.end(), is_reached);
    if (at != difference.end() && at->stride == d.stride) at->last = d.last;
    else difference.insert(at, d);
  }
  const auto item_size = static_cast<int64_t>(aoti_torch_dtype_element_size(a.dtype_code()));
  return has_offset(difference, 0, (static_cast<char*>(a.data()) - static_cast<char*>(b.data())) / item_size);
}

}  // namespace attn_ext::bindings
