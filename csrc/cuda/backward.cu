// Which kernels compute gradients, whether there are any, and what they work in: the one place that knows.
#include <algorithm>

#include "cuda/selector.h"
#include "cuda/variant.h"

namespace attn_ext::cuda {

#define KEY_GRADIENT(name, ...) extern const BackwardVariant key_gradient_##name;
#define QUERY_GRADIENT(name, ...) extern const BackwardVariant query_gradient_##name;
#define BIAS_GRADIENT(name, ...) extern const BackwardVariant bias_gradient_##name;
#include "core/variants.def"

using Variants = std::span<const BackwardVariant* const>;

Variants key_gradient_variants() {
  static const BackwardVariant* const variants[] = {
#define KEY_GRADIENT(name, ...) &key_gradient_##name,
#include "core/variants.def"
  };
  return variants;
}
Variants query_gradient_variants() {
  static const BackwardVariant* const variants[] = {
#define QUERY_GRADIENT(name, ...) &query_gradient_##name,
#include "core/variants.def"
  };
  return variants;
}
Variants bias_gradient_variants() {
  static const BackwardVariant* const variants[] = {
#define BIAS_GRADIENT(name, ...) &bias_gradient_##name,
#include "core/variants.def"
  };
  return variants;
}

namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kBiasBlocks = 1024;              // worth having, for balance
constexpr int64_t kBiasPartials = int64_t{1} << 24;  // floats they may have between them

const BackwardVariant* select(Variants variants, const BackwardParams& p, const Device& device,
                              KeyOutputs outputs = KeyOutputs::both) {
  const BackwardVariant* best = nullptr;
  for (const BackwardVariant* v : variants)
    if (v->outputs == outputs && runs(*v, p, device) && (!best || better(*v, *best, p, device))) best = v;
  return best;
}

// Everything about a call but where its memory lies.
struct Plan {
  const BackwardVariant *key = nullptr, *value = nullptr;  // value: null where key computes both
  const BackwardVariant *query = nullptr, *bias = nullptr;
  const MeetingsVariant *of_keys = nullptr, *of_queries = nullptr;

  Plan(const BackwardParams& p, const Device& device)
      : query(select(query_gradient_variants(), p, device)),
        bias(p.grad_bias.data ? select(bias_gradient_variants(), p, device) : nullptr) {
    const Variants keys = key_gradient_variants();
    const BackwardVariant *both = select(keys, p, device), *half = select(keys, p, device, KeyOutputs::key);
    const BackwardVariant* other_half = select(keys, p, device, KeyOutputs::value);
    const bool halves = half && other_half && (!both || better(*half, *both, p, device));
    key = halves ? half : both;
    value = halves ? other_half : nullptr;
    of_keys = key ? meetings_variant(*key, true) : nullptr;
    of_queries = query ? meetings_variant(*query, false) : nullptr;
  }
  bool is_complete(const BackwardParams& p) const {
    return key && query && of_keys && of_queries && (bias || !p.grad_bias.data);
  }

  int64_t key_blocks(const BackwardParams& p) const {
    return tiles(p.shape.kv_len, key->keys) * p.shape.kv_heads * p.shape.batch;
  }
  int64_t query_blocks(const BackwardParams& p) const {
    return tiles(p.shape.query_len, query->queries) * p.shape.heads * p.shape.batch;
  }
  int64_t bias_tiles(const BackwardParams& p) const { return BiasSpans(p, bias->queries, bias->keys).owned(); }
  int64_t bias_splits(const BackwardParams& p) const {
    if (!bias || p.grad_bias_elements == 0) return 1;
    const int64_t wanted = kBiasBlocks / std::max<int64_t>(1, bias_tiles(p)), room = kBiasPartials / p.grad_bias_elements;
    const int64_t steps = BiasSpans(p, bias->queries, bias->keys).shared();
    return std::max<int64_t>(1, std::min({wanted, room, steps}));
  }
};

// Lays arrays out one after the other; without memory, only to measure.
class Memory {
  char* data_;
  int64_t used_ = 0;

 public:
  explicit Memory(void* data) : data_(static_cast<char*>(data)) {}
  int64_t used() const { return used_; }
  template <class T>
  T* take(int64_t count) {
    T* const taken = data_ ? reinterpret_cast<T*>(data_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
};

BackwardArguments arguments_in(Memory& memory, const BackwardParams& p, const Plan& plan) {
  const AttentionShape& shape = p.shape;
  const MaskParams& mask = p.mask;
  BackwardArguments a{.params = p,
                      .rows = {},
                      .factors = ScoreFactors::of(p.score),
                      .scale = static_cast<float>(p.score.scale),
                      .inverse_keep = static_cast<float>(p.dropout.inverse_keep),
                      .of_keys = {}, .of_queries = {}, .bias = {}};
  const int64_t heads = shape.batch * shape.heads;
  a.rows.padded = tiles(shape.query_len, kRowBlock) * kRowBlock;
  a.rows.terms = memory.take<float>(heads * a.rows.padded * RowTerms::kFloats);
  a.rows.precise = memory.take<int32_t>(heads * (a.rows.padded / kRowBlock));
  a.rows.sink = p.grad_sinks ? memory.take<float>(heads * shape.query_len) : nullptr;
  // One list of meetings for all batch elements and heads that have the same mask.
  const auto meetings = [&](int64_t rows, int64_t columns) {
    Meetings result{.data = nullptr,
                    .batch = static_cast<int>(mask.key_ranges.stride_batch || mask.blocks.stride_batch ? shape.batch : 1),
                    .heads = static_cast<int>(mask.blocks.stride_head ? shape.heads : 1),
                    .rows = static_cast<int>(rows),
                    .columns = static_cast<int>(columns)};
    result.data = memory.take<uint8_t>(result.batch * result.heads * result.per_head());
    return result;
  };
  a.of_keys = meetings(tiles(shape.kv_len, plan.key->keys), tiles(shape.query_len, plan.key->queries));
  a.of_queries = meetings(tiles(shape.query_len, plan.query->queries), tiles(shape.kv_len, plan.query->keys));
  a.bias.splits = static_cast<int>(plan.bias_splits(p));
  a.bias.partials = static_cast<float*>(p.grad_bias.data);
  if (a.bias.splits > 1) a.bias.partials = memory.take<float>(a.bias.splits * p.grad_bias_elements);
  return a;
}

}  // namespace

const char* unsupported(const BackwardParams& p, const Device& device) {
  if (const char* reason = unsupported_inputs(p, device)) return reason;
  for (const ConstTensorView* view : {&p.out, &p.grad_out})
    if (!aligned(*view, p)) return kUnaligned;
  for (const TensorView* view : {&p.grad_query, &p.grad_key, &p.grad_value})
    if (!aligned(*view, p)) return kUnaligned;
  if (!rows_fit(p.grad_out, p)) return kFarApart;
  const Plan plan(p, device);
  if (!plan.is_complete(p)) return kNoVariant;
  const int64_t bias_blocks = plan.bias ? plan.bias_tiles(p) * plan.bias_splits(p) : 0;
  if (std::max({plan.key_blocks(p), plan.query_blocks(p), bias_blocks}) > kMostBlocks) return kTooManyTiles;
  return nullptr;
}

int64_t backward_workspace(const BackwardParams& p, const Device& device) {
  Memory measure(nullptr);
  arguments_in(measure, p, Plan(p, device));
  return measure.used();
}

void backward(const BackwardParams& p, void* workspace, const Stream& stream) {
  const Plan plan(p, stream.device);
  Memory memory(workspace);
  const BackwardArguments a = arguments_in(memory, p, plan);
  const AttentionShape& shape = p.shape;
  const bool has_queries = shape.batch && shape.heads && shape.query_len;
  const bool has_keys = shape.batch && shape.kv_heads && shape.kv_len;
  if (has_queries) prepare_rows(a, stream);
  if (has_queries && has_keys) {
    plan.of_keys->launch(a, stream, *plan.of_keys);
    plan.of_queries->launch(a, stream, *plan.of_queries);
  }
  if (has_keys) plan.key->launch(a, plan.key_blocks(p), stream, *plan.key);
  if (has_keys && plan.value) plan.value->launch(a, plan.key_blocks(p), stream, *plan.value);
  if (has_queries) plan.query->launch(a, plan.query_blocks(p), stream, *plan.query);
  if (plan.bias && p.grad_bias_elements) {
    plan.bias->launch(a, plan.bias_tiles(p) * a.bias.splits, stream, *plan.bias);
    if (a.bias.splits > 1) add_bias_splits(a, stream);
  }
  if (p.grad_sinks && shape.heads) add_sink_gradients(a, stream);
}

}  // namespace attn_ext::cuda
