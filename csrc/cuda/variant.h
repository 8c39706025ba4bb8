// What the selector knows of a compiled kernel.
#pragma once
#include <span>

#include "cuda/kernels.h"

namespace attn_ext::cuda {

struct ForwardVariant {
  const char* name;
  DType dtype;
  int key_columns, value_columns, queries, shared_bytes;
  bool modified;  // does it take modified scores and dropout?
  void (*launch)(const ForwardParams&, const Stream&, const ForwardVariant&);
};

// Those of core/variants.def.
std::span<const ForwardVariant* const> forward_variants();

}  // namespace attn_ext::cuda
