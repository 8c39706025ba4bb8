// Which forward kernel runs, and whether there is one: the one place that knows.
#include "cuda/selector.h"
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

bool runs(const ForwardVariant& v, const ForwardParams& p, const Device& device) {
  return v.dtype == p.dtype && v.key_columns >= p.shape.head_dim && v.value_columns >= p.shape.value_dim &&
         v.shared_bytes <= device.shared_memory && (v.modified || !is_modified(p));
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

}  // namespace

const char* unsupported(const ForwardParams& p, const Device& device) {
  if (const char* reason = unsupported_inputs(p, device)) return reason;
  if (!aligned(p.out, p)) return kUnaligned;
  const ForwardVariant* variant = select(p, device);
  if (!variant) return kNoVariant;
  if (blocks(*variant, p) > kMostBlocks) return kTooManyTiles;
  return nullptr;
}

void forward(const ForwardParams& params, const Stream& stream) {
  if (params.shape.batch == 0 || params.shape.heads == 0 || params.shape.query_len == 0) return;
  const ForwardVariant& variant = *select(params, stream.device);
  variant.launch(params, stream, variant);
}

}  // namespace attn_ext::cuda
