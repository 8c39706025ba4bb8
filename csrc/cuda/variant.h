// What the selector knows of a compiled kernel.
#pragma once
#include <span>

#include "cuda/backward.h"
#include "cuda/kernels.h"

namespace attn_ext::cuda {

struct ForwardVariant {
  const char* name;
  DType dtype;
  int key_columns, value_columns, queries, shared_bytes;
  bool modified;  // does it take modified scores and dropout?
  void (*launch)(const ForwardParams&, const Stream&, const ForwardVariant&);
};

// A kernel of the backward pass.
struct BackwardVariant {
  const char* name;
  DType dtype;
  int key_columns, value_columns, queries, keys, shared_bytes;
  bool modified;        // does it take modified scores and dropout?
  KeyOutputs outputs;   // of those of key gradients
  void (*launch)(const BackwardArguments&, int64_t blocks, const Stream&, const BackwardVariant&);
};
// Tells tiles of queries and keys which of them meet.
struct MeetingsVariant {
  const char* name;
  int queries, keys;
  bool of_keys;  // or of queries
  void (*launch)(const BackwardArguments&, const Stream&, const MeetingsVariant&);
};

// Those of core/variants.def.
std::span<const ForwardVariant* const> forward_variants();
std::span<const BackwardVariant* const> key_gradient_variants();
std::span<const BackwardVariant* const> query_gradient_variants();
std::span<const BackwardVariant* const> bias_gradient_variants();

// The small kernels around them (backward_steps.cu).
const MeetingsVariant* meetings_variant(const BackwardVariant& of, bool of_keys);  // null: there is none for its tiles
void prepare_rows(const BackwardArguments& arguments, const Stream& stream);
void add_sink_gradients(const BackwardArguments& arguments, const Stream& stream);
void add_bias_splits(const BackwardArguments& arguments, const Stream& stream);

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
