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

struct DecodeVariant {
  const char* name;
  DType dtype;
  int columns, shared_bytes;
  bool quantised;
  void (*launch)(const DeviceDecodeParams&, const Stream&, const DecodeVariant&);
};

std::span<const DecodeVariant* const> decode_variants();

// What goes before and after them.
void append(const DeviceDecodeParams& params, const Stream& stream);
void merge_ranges(const DeviceDecodeParams& params, const Stream& stream);

}  // namespace attn_ext::cuda
