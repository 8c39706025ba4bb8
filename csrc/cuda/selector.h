// What selectors of kernels ask of a call, whichever kernels they choose from.
#pragma once
#include <cstdint>
#include <limits>

#include "core/params.h"
#include "cuda/kernels.h"

namespace attn_ext::cuda {

// Kernels count rows and keys with 32 bits, up to the end of the last tile, and bytes of a tile too.
constexpr int64_t kLongest = std::numeric_limits<int32_t>::max() - 1024;
constexpr int64_t kLargestRow = (int64_t{1} << 24) - 1;  // bytes
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // of a grid

constexpr const char* kUnaligned = "rows on CUDA devices start at and have multiples of 16 bytes";
constexpr const char* kFarApart = "rows on CUDA devices are less than 16 MiB apart";
constexpr const char* kNoVariant = "heads of this size are not supported on this CUDA device";
constexpr const char* kTooManyTiles = "too many tiles for one CUDA grid";

inline int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <class View>
bool aligned(const View& view, const AttentionParams& p) {
  const auto whole = [&](int64_t stride) { return stride * element_bytes(p.dtype) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && whole(view.stride_batch) && whole(view.stride_head) &&
         whole(view.stride_row);
}
template <class View>
bool rows_fit(const View& view, const AttentionParams& p) {
  return 0 <= view.stride_row && view.stride_row * element_bytes(p.dtype) <= kLargestRow;
}

// Whether scores are more than scale * q.k with a scale > 0, which is not so small that a hidden key's -inf times it is lost.
inline bool is_modified(const AttentionParams& p) {
  return p.score.softcap > 0 || p.score.bias.data || p.score.alibi_slopes || p.dropout.enabled() ||
         !(0x1p-100 <= p.score.scale && p.score.scale <= 0x1p100);
}

// Whether the kernel of a variant takes a call.
template <class Variant>
bool runs(const Variant& v, const AttentionParams& p, const Device& device) {
  return v.dtype == p.dtype && v.key_columns >= p.shape.head_dim && v.value_columns >= p.shape.value_dim &&
         v.shared_bytes <= device.shared_memory && (v.modified || !is_modified(p));
}

inline int64_t tiles(int64_t length, int of) { return (length + of - 1) / of; }

// Which of two kernels that both take a call is to: the one with fewer columns, then without a look at modifiers, then with more
// queries, as long as each processor gets two blocks and tiles do not join blocks of a mask, of which one may be listed and its
// neighbour not.
template <class Variant>
bool better(const Variant& a, const Variant& b, const AttentionParams& p, const Device& device) {
  const int columns_a = a.key_columns + a.value_columns, columns_b = b.key_columns + b.value_columns;
  if (columns_a != columns_b) return columns_a < columns_b;
  if (a.modified != b.modified) return b.modified;
  if (a.queries == b.queries) return false;
  const Variant& longer = a.queries > b.queries ? a : b;
  const bool many = tiles(p.shape.query_len, longer.queries) * p.shape.heads * p.shape.batch >= 2 * device.processors;
  const bool fits = !p.mask.blocks.offsets || p.mask.blocks.query_block % longer.queries == 0;
  return (&longer == &a) == (many && fits);
}

// Why no kernel takes such query, key, value and options; or null.
inline const char* unsupported_inputs(const AttentionParams& p, const Device& device) {
  const AttentionShape& shape = p.shape;
  if (p.dtype == DType::float64) return "float64 is not computed on CUDA devices";
  if (device.arch < 75) return "CUDA devices before compute capability 7.5 are not supported";
  if (p.dtype == DType::bfloat16 && device.arch < 80) return "bfloat16 needs compute capability 8.0";
  if (p.score.bias.data && p.score.bias_dtype == DType::float64) return "a bias of float64 is not read on CUDA devices";
  if (shape.query_len > kLongest || shape.kv_len > kLongest) return "sequences on CUDA devices have less than 2^31 - 1024 tokens";
  if (p.mask.blocks.entries > kLongest) return "block masks on CUDA devices have less than 2^31 - 1024 blocks";
  const int bytes = element_bytes(p.dtype);
  if (shape.head_dim * bytes % 16 || shape.value_dim * bytes % 16 || !aligned(p.query, p) || !aligned(p.key, p) || !aligned(p.value, p)) {
    return kUnaligned;
  }
  if (!rows_fit(p.query, p) || !rows_fit(p.key, p) || !rows_fit(p.value, p)) return kFarApart;
  return nullptr;
}

}  // namespace attn_ext::cuda
