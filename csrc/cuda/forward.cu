// Which forward kernel runs, and whether there is one: the one place that knows.
#include "core/mask.h"
#include "cuda/variant.h"

namespace attn_ext::cuda {

#define FORWARD(name, ...) extern const ForwardVariant forward_##name;
#include "core/variants.def"

std::span<const ForwardVariant* const> forward_variants() {
  static const ForwardVariant* const variants[] = {
#define FORWARD(name, ...) &forward_##name,
#include "core/variants.def"
  };
  return variants;
}

namespace {

// Kernels count rows and keys with 32 bits, up to the end of the last tile, and bytes of a tile too.
constexpr int64_t kLongest = std::numeric_limits<int32_t>::max() - 1024;
constexpr int64_t kLargestRow = (int64_t{1} << 24) - 1;  // bytes

// Whether scores are more than scale * q.k with a scale > 0, which is not so small that a hidden key's -inf times it is lost.
bool modified(const ForwardParams& p) {
  return p.score.softcap > 0 || p.score.bias.data || p.score.alibi_slopes || p.dropout.enabled() ||
         !(0x1p-100 <= p.score.scale && p.score.scale <= 0x1p100);
}

int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

bool runs(const ForwardVariant& v, const ForwardParams& p, const Device& device) {
  return v.dtype == p.dtype && v.key_columns >= p.shape.head_dim && v.value_columns >= p.shape.value_dim &&
         v.shared_bytes <= device.shared_memory && (v.modified || !modified(p));
}

int64_t blocks(const ForwardVariant& v, const ForwardParams& p) {
  return (p.shape.query_len + v.queries - 1) / v.queries * p.shape.heads * p.shape.batch;
}

// Fewer columns, then no look at modifiers, then more queries as long as two blocks are there for each processor.
bool better(const ForwardVariant& a, const ForwardVariant& b, const ForwardParams& p, const Device& device) {
  const int columns_a = a.key_columns + a.value_columns, columns_b = b.key_columns + b.value_columns;
  if (columns_a != columns_b) return columns_a < columns_b;
  if (a.modified != b.modified) return b.modified;
  const ForwardVariant& longer = a.queries > b.queries ? a : b;
  return (&longer == &a) == (blocks(longer, p) >= 2 * device.processors);
}

const ForwardVariant* select(const ForwardParams& p, const Device& device) {
  const ForwardVariant* best = nullptr;
  for (const ForwardVariant* v : forward_variants())
    if (runs(*v, p, device) && (!best || better(*v, *best, p, device))) best = v;
  return best;
}

template <class View>
bool aligned(const View& view, int bytes) {
  const auto whole = [&](int64_t stride) { return stride * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && whole(view.stride_batch) && whole(view.stride_head) &&
         whole(view.stride_row);
}
template <class View>
bool row_fits(const View& view, int bytes) {
  return 0 <= view.stride_row && view.stride_row * bytes <= kLargestRow;
}

}  // namespace

const char* unsupported(const ForwardParams& p, const Device& device) {
  const AttentionShape& shape = p.shape;
  if (p.dtype == DType::float64) return "float64 is not computed on CUDA devices";
  if (device.arch < 75) return "CUDA devices before compute capability 7.5 are not supported";
  if (p.dtype == DType::bfloat16 && device.arch < 80) return "bfloat16 needs compute capability 8.0";
  if (p.score.bias.data && p.score.bias_dtype == DType::float64) return "a bias of float64 is not read on CUDA devices";
  if (shape.query_len > kLongest || shape.kv_len > kLongest) return "sequences on CUDA devices have less than 2^31 - 1024 tokens";
  if (p.mask.blocks.entries > kLongest) return "block masks on CUDA devices have less than 2^31 - 1024 blocks";
  const int bytes = element_bytes(p.dtype);
  if (shape.head_dim * bytes % 16 || shape.value_dim * bytes % 16 || !aligned(p.query, bytes) || !aligned(p.key, bytes) ||
      !aligned(p.value, bytes) || !aligned(p.out, bytes)) {
    return "rows on CUDA devices start at and have multiples of 16 bytes";
  }
  if (!row_fits(p.query, bytes) || !row_fits(p.key, bytes) || !row_fits(p.value, bytes)) {
    return "rows on CUDA devices are less than 16 MiB apart";
  }
  const ForwardVariant* variant = select(p, device);
  if (!variant) return "heads of this size are not supported on this CUDA device";
  if (blocks(*variant, p) > std::numeric_limits<int32_t>::max()) return "too many tiles of queries for one CUDA grid";
  return nullptr;
}

void forward(const ForwardParams& params, const Stream& stream) {
  if (params.shape.batch == 0 || params.shape.heads == 0 || params.shape.query_len == 0) return;
  const ForwardVariant& variant = *select(params, stream.device);
  variant.launch(params, stream, variant);
}

}  // namespace attn_ext::cuda
