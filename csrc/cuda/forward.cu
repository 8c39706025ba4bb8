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
  if (tiles(p.shape.query_len, variant->queries) * p.shape.heads * p.shape.batch > kMostBlocks) return kTooManyTiles;
  return nullptr;
}

void forward(const ForwardParams& params, const Stream& stream) {
  if (params.shape.batch == 0 || params.shape.heads == 0 || params.shape.query_len == 0) return;
  const ForwardVariant& variant = *select(params, stream.device);
  variant.launch(params, stream, variant);
}

}  // namespace attn_ext::cuda
