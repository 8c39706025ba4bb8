// Writes the new keys, turned, and the new values of each sequence into its cache, before anything is read there.
#include "cuda/decode_sequence.cuh"
#include "cuda/launch.cuh"
#include "cuda/rotary.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 128;

// A column of a row of the cache.  Nothing but zeros can be stored where the scale is 0.
DEVICE void store(const DeviceDecodeParams& p, const CacheView& cache, int64_t page, int head, int64_t offset, float x) {
  if (p.format == CacheFormat::plain) return store_number(cache.data, p.dtype, offset, x);
  const float scale = cache.scale[page * p.shape.kv_heads + head], code = scale == 0.f ? 0.f : x / scale;
  if (p.format == CacheFormat::int8) static_cast<int8_t*>(cache.data)[offset] = from_float<int8_t>(code);
  else static_cast<Float8E4M3*>(cache.data)[offset] = from_float<Float8E4M3>(code);
}

}  // namespace

// A block for each new token of each head.
__global__ void __launch_bounds__(kThreads) decode_append(const __grid_constant__ DeviceDecodeParams p) {
  const int tokens = static_cast<int>(p.shape.kv_len), heads = static_cast<int>(p.shape.kv_heads);
  const int token = blockIdx.x % tokens, head = blockIdx.x / tokens % heads, batch = blockIdx.x / tokens / heads;
  const Sequence sequence(p, batch);
  const int position = sequence.length() + token;
  const int page = sequence.page(position);
  if (page < 0) return;

  const auto place = [&](const CacheView& cache) {
    return page * cache.stride_batch + head * cache.stride_head + sequence.row(position) * cache.stride_row;
  };
  const auto row = [&](const ConstTensorView& view) {
    const int64_t first = batch * view.stride_batch + head * view.stride_head + token * view.stride_row;
    return [&p, &view, first](int column) { return load_number(view.data, p.dtype, first + column); };
  };
  const auto key = row(p.new_key), value = row(p.new_value);
  const int64_t key_place = place(p.key_cache), value_place = place(p.value_cache);
  for (int column = threadIdx.x; column < p.shape.head_dim; column += kThreads)
    store(p, p.key_cache, page, head, key_place + column, turned(p.rotary, position, column, key));
  for (int column = threadIdx.x; column < p.shape.value_dim; column += kThreads)
    store(p, p.value_cache, page, head, value_place + column, value(column));
}

void append(const DeviceDecodeParams& p, const Stream& stream) {
  launch<decode_append>("decode_append", p.shape.batch * p.shape.kv_heads * p.shape.kv_len, kThreads, 0, stream, p);
}

}  // namespace attn_ext::cuda
