// What the selector knows of a compiled kernel.
#pragma once
#include "cuda/kernels.h"

namespace attn_ext::cuda {

struct ForwardVariant {
  const char* name;
  DType dtype;
  int key_columns, value_columns, queries, keys, threads, shared_bytes;
  bool modified;  // does it take modified scores and dropout?
  void (*launch)(const ForwardParams&, const Stream&, const ForwardVariant&);
};

// The kernel for a supported call.
const ForwardVariant& forward_variant(const ForwardParams& params, const Device& device);

}  // namespace attn_ext::cuda
