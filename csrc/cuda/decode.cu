// Which decoding kernel runs, and whether there is one: the one place that knows.
#include "cuda/decode_plan.h"
#include "cuda/variant.h"

namespace attn_ext::cuda {

#define DECODE(name, ...) extern const DecodeVariant decode_##name;
#include "core/variants.def"

std::span<const DecodeVariant* const> decode_variants() {
  static const DecodeVariant* const variants[] = {
#define DECODE(name, ...) &decode_##name,
#include "core/variants.def"
  };
  return variants;
}

namespace {

// Kernels count tokens, up to the end of the last range, blocks and pages with 32 bits.
constexpr int64_t kMost = int64_t{1} << 30;

// Fewest columns.
const DecodeVariant* select(const DecodeParams& p, const Device& device) {
  const DecodeVariant* best = nullptr;
  for (const DecodeVariant* v : decode_variants()) {
    const bool runs = v->dtype == p.dtype && v->columns >= max_i64(p.shape.head_dim, p.shape.value_dim) &&
                      v->shared_bytes <= device.shared_memory && v->quantised == (p.format != CacheFormat::plain);
    if (runs && (!best || v->columns < best->columns)) best = v;
  }
  return best;
}

// Whether no more blocks are asked for than a grid has.
bool fits_grid(const DecodeParams& p, const Device& device) {
  int64_t rows = 1;
  const AttentionShape& shape = p.shape;
  for (const int64_t factor : {shape.batch, shape.kv_heads, max_i64(decode_row_blocks(p), shape.kv_len), shape.group(), shape.query_len})
    if (__builtin_mul_overflow(rows, max_i64(1, factor), &rows)) return false;
  return rows <= kMost - 8 * device.processors;
}

}  // namespace

const char* unsupported(const DecodeParams& p, const Device& device) {
  if (p.dtype == DType::float64) return "float64 is not computed on CUDA devices";
  if (device.arch < 75) return "CUDA devices before compute capability 7.5 are not supported";
  if (p.dtype == DType::bfloat16 && device.arch < 80) return "bfloat16 needs compute capability 8.0";
  if (p.page_size > kMost || p.pages_per_sequence > kMost / max_i64(1, p.page_size) || p.shape.kv_len > kMost)
    return "sequences on CUDA devices have up to 2^30 tokens";
  if (!select(p, device)) return "heads of this size are not supported on this CUDA device";
  if (!fits_grid(p, device)) return "too many queries for one CUDA grid";
  return nullptr;
}

void decode(const DeviceDecodeParams& p, const Stream& stream) {
  if (p.shape.batch == 0 || p.shape.kv_heads == 0) return;
  if (p.shape.kv_len > 0) append(p, stream);
  if (p.shape.query_len == 0) return;
  const DecodeVariant& variant = *select(p, stream.device);
  variant.launch(p, stream, variant);
  merge_ranges(p, stream);
}

}  // namespace attn_ext::cuda
