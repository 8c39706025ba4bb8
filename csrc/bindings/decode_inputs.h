// What attention_decode takes, checked and as the kernels' params: on any device.
//
// Lengths and page numbers come from users and change between calls: on the CPU they are copied as they are checked, before
// anything is read or written through them, so that nothing that happens to the tensors later can matter.  On other devices
// the kernels bring them to what there is.
#pragma once
#include <algorithm>
#include <vector>

#include "bindings/inputs.h"
#include "bindings/overlap.h"

namespace attn_ext::bindings {

// A tensor of int32 or int64, whose numbers the host reads only where contents are checked.
inline IntegerView integer_view(const Tensor& tensor, const char* name, Device device, int64_t dim) {
  check_device(tensor, name, device);
  const bool wide = tensor.dtype_code() == aoti_torch_dtype_int64();
  STD_TORCH_CHECK(wide || tensor.dtype_code() == aoti_torch_dtype_int32(), name, " must be int32 or int64");
  check_dim(tensor, name, dim);
  return {tensor.data(), tensor.stride(0), dim > 1 ? tensor.stride(1) : 0, wide};
}

inline CacheFormat cache_format(const Tensor& cache, DType dtype) {
  const int32_t code = cache.dtype_code();
  if (cache.is(dtype)) return CacheFormat::plain;
  STD_TORCH_CHECK(dtype != DType::float64 && (code == aoti_torch_dtype_int8() || code == aoti_torch_dtype_float8_e4m3fn()),
                  "key_cache must have the dtype of query, or be int8 or float8_e4m3fn if query is not float64");
  return code == aoti_torch_dtype_int8() ? CacheFormat::int8 : CacheFormat::float8_e4m3;
}

// Owns what the params point to.
struct DecodeInputs {
  Tensor query, key_cache, value_cache, cache_seqlens, block_table, new_key, new_value, rotary_cos, rotary_sin, key_scale,
      value_scale, alibi_slopes, sinks;
  std::vector<int64_t> lengths, pages;  // copies, where contents are checked
  Device device;
  Contents contents;

  explicit DecodeInputs(Contents contents) : contents(contents) {}
  void take(Arguments& arguments, DecodeParams& p) {
    query = arguments.tensor(), key_cache = arguments.tensor(), value_cache = arguments.tensor();
    device = query.device();
    cache_seqlens = arguments.tensor(), block_table = arguments.optional_tensor();
    new_key = arguments.optional_tensor(), new_value = arguments.optional_tensor();
    rotary_cos = arguments.optional_tensor(), rotary_sin = arguments.optional_tensor();
    key_scale = arguments.optional_tensor(), value_scale = arguments.optional_tensor();
    alibi_slopes = arguments.optional_tensor(), sinks = arguments.optional_tensor();
    p.score.scale = arguments.number();
    p.score.softcap = checked_softcap(arguments.number());
    p.rotary.interleaved = arguments.flag();
    const auto window_left = arguments.optional_int(), splits = arguments.optional_int();
    STD_TORCH_CHECK(window_left.value_or(0) >= 0, "window_left must not be negative, got ", window_left.value_or(0));
    STD_TORCH_CHECK(splits.value_or(1) > 0, "num_splits must be positive, got ", splits.value_or(1));
    p.window_left = window_left.value_or(p.window_left);
    p.splits = std::min<int64_t>(splits.value_or(0), 1 << 30);
  }

  void check(DeviceDecodeParams& p) {
    p.dtype = compute_dtype(query);
    p.format = cache_format(key_cache, p.dtype);
    check_dim(query, "query", 4);
    check_dim(key_cache, "key_cache", 4);
    check_dim(value_cache, "value_cache", 4);
    p.shape = {.batch = query.size(0), .heads = query.size(1), .kv_heads = key_cache.size(1), .query_len = query.size(2),
               .kv_len = new_key && new_key.dim() == 4 ? new_key.size(2) : 0, .head_dim = query.size(3),
               .value_dim = value_cache.size(3)};
    p.page_size = key_cache.size(2);
    const AttentionShape& shape = p.shape;
    STD_TORCH_CHECK(shape.kv_heads > 0 ? shape.heads % shape.kv_heads == 0 : shape.heads == 0,
                    "the heads of query must be a multiple of those of key_cache, got ", shape.heads, " and ", shape.kv_heads);
    for (const int64_t columns : {shape.head_dim, shape.value_dim})
      STD_TORCH_CHECK(1 <= columns && columns <= kMaxHeadDim, "there must be 1 to ", kMaxHeadDim, " columns, got ", columns);
    STD_TORCH_CHECK(block_table || key_cache.size(0) == shape.batch, "key_cache must hold ", shape.batch, " sequences, got ",
                    key_cache.size(0));
    p.key_cache = checked_cache(key_cache, "key_cache", key_scale, "key_scale", p, shape.head_dim);
    p.value_cache = checked_cache(value_cache, "value_cache", value_scale, "value_scale", p, shape.value_dim);
    check_new_rows(p);
    check_rotary(p);
    check_terms(p);
    check_lengths(p);
    query = with_adjacent_columns(std::move(query));
    p.query = const_view(query);
  }

 private:
  CacheView checked_cache(const Tensor& cache, const char* name, Tensor& scale, const char* scale_name, const DecodeParams& p,
                          int64_t columns) {
    check_device(cache, name, device);
    check_shape(cache, name, {key_cache.size(0), p.shape.kv_heads, p.page_size, columns});
    STD_TORCH_CHECK(cache.dtype_code() == key_cache.dtype_code(), name, " must have the dtype of key_cache");
    STD_TORCH_CHECK(columns == 1 || cache.stride(3) == 1, name, " must have adjacent columns, got stride ", cache.stride(3));
    STD_TORCH_CHECK(static_cast<bool>(scale) == (p.format != CacheFormat::plain), scale_name,
                    " goes with caches of int8 and float8_e4m3fn, and with no other");
    CacheView result{{view(cache)}};
    if (scale) {
      check_device(scale, scale_name, device);
      check_dtype(scale, scale_name, DType::float32, "dtype float32");
      check_shape(scale, scale_name, {cache.size(0), p.shape.kv_heads});
      scale = contiguous(std::move(scale));
      result.scale = static_cast<const float*>(scale.data());
    }
    return result;
  }
  void check_new_rows(DecodeParams& p) {
    STD_TORCH_CHECK(static_cast<bool>(new_key) == static_cast<bool>(new_value), "new_key and new_value go together");
    if (!new_key) return;
    const auto checked = [&](Tensor& rows, const char* name, int64_t columns) {
      check_device(rows, name, device);
      check_dtype(rows, name, p.dtype, "the dtype of query");
      check_shape(rows, name, {p.shape.batch, p.shape.kv_heads, p.shape.kv_len, columns});
      rows = with_adjacent_columns(std::move(rows));
      return const_view(rows);
    };
    p.new_key = checked(new_key, "new_key", p.shape.head_dim);
    p.new_value = checked(new_value, "new_value", p.shape.value_dim);
    if (p.shape.kv_len > 0) check_writable();
  }
  void check_writable() {
    if (is_empty(key_cache) || is_empty(value_cache)) return;
    STD_TORCH_CHECK(is_nested(lattice(key_cache)), "key_cache must not overlap itself");
    STD_TORCH_CHECK(is_nested(lattice(value_cache)), "value_cache must not overlap itself");
    STD_TORCH_CHECK(!overlap(key_cache, value_cache), "key_cache and value_cache must not overlap");
  }
  void check_rotary(DecodeParams& p) {
    STD_TORCH_CHECK(static_cast<bool>(rotary_cos) == static_cast<bool>(rotary_sin), "rotary_cos and rotary_sin go together");
    if (!rotary_cos) return;
    check_dim(rotary_cos, "rotary_cos", 2);
    p.rotary.half = rotary_cos.size(1);
    STD_TORCH_CHECK(2 * p.rotary.half <= p.shape.head_dim, "rotary_cos must have at most ", p.shape.head_dim / 2,
                    " columns, got ", p.rotary.half);
    const bool wide = p.dtype != DType::float64 && rotary_cos.is(DType::float32);
    p.rotary.dtype = wide ? DType::float32 : p.dtype;
    const auto checked = [&](Tensor& table, const char* name) {
      check_device(table, name, device);
      check_dtype(table, name, p.rotary.dtype, "the dtype of query, or float32 unless query is float64");
      check_shape(table, name, {rotary_cos.size(0), p.rotary.half});
      table = contiguous(std::move(table));
      return ConstTensorView{table.data(), 0, 0, p.rotary.half, 1};
    };
    p.rotary.cos = checked(rotary_cos, "rotary_cos");
    p.rotary.sin = checked(rotary_sin, "rotary_sin");
  }
  void check_terms(DecodeParams& p) {
    if (alibi_slopes) {
      check_rows(alibi_slopes, "alibi_slopes", device, p.shape.batch, p.shape.heads);
      alibi_slopes = contiguous(converted(std::move(alibi_slopes), DType::float64));
      p.score.alibi_slopes = static_cast<const double*>(alibi_slopes.data());
      p.score.alibi_stride_batch = alibi_slopes.size(0) == 1 ? 0 : p.shape.heads;
    }
    if (sinks) p.score.sinks = checked_sinks(sinks, p.shape, device);
  }

  void check_lengths(DeviceDecodeParams& p) {
    p.given_lengths = integer_view(cache_seqlens, "cache_seqlens", device, 1);
    check_shape(cache_seqlens, "cache_seqlens", {p.shape.batch});
    p.page_count = key_cache.size(0);
    p.pages_per_sequence = 1;
    if (block_table) {
      p.table = integer_view(block_table, "block_table", device, 2);
      p.pages_per_sequence = block_table.size(1);
      STD_TORCH_CHECK(block_table.size(0) == p.shape.batch, "block_table must have ", p.shape.batch, " rows, got ",
                      block_table.size(0));
    }
    int64_t capacity;
    if (__builtin_mul_overflow(p.pages_per_sequence, p.page_size, &capacity)) capacity = std::numeric_limits<int64_t>::max();
    const int64_t positions = rotary_cos ? rotary_cos.size(0) : capacity;
    p.room = std::min(capacity, positions) - p.shape.kv_len;
    if (contents == Contents::checked) return check_contents(p);
    STD_TORCH_CHECK(p.room >= 0 || p.shape.batch == 0, "cache_seqlens must hold 0 to ", p.room, ", which nothing does");
  }
  void check_contents(DeviceDecodeParams& p) {
    lengths.resize(p.shape.batch);
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      lengths[b] = p.given_lengths.at(b);
      STD_TORCH_CHECK(0 <= lengths[b] && lengths[b] <= p.room, "cache_seqlens must hold 0 to ", p.room, ", got ", lengths[b]);
    }
    p.lengths = lengths.data();
    p.pages_per_sequence = 0;
    if (block_table) check_pages(p);
    if (p.format != CacheFormat::plain && p.shape.kv_len > 0) check_scales(p);
  }
  // What is appended is divided by them.
  void check_scales(const DecodeParams& p) {
    for (int64_t b = 0; b < p.shape.batch; ++b)
      for (int64_t i = p.lengths[b] / p.page_size; i <= (p.total(b) - 1) / p.page_size; ++i) {
        const int64_t page = p.pages ? p.pages[b * p.pages_per_sequence + i] : b;
        for (int64_t at = page * p.shape.kv_heads; at < (page + 1) * p.shape.kv_heads; ++at)
          STD_TORCH_CHECK(p.key_cache.scale[at] != 0 && p.value_cache.scale[at] != 0,
                          "key_scale and value_scale must not be 0 where new_key and new_value are written");
      }
  }
  // Of the pages that will be read or written; others may hold anything.
  void check_pages(DeviceDecodeParams& p) {
    for (int64_t b = 0; b < p.shape.batch; ++b)
      if (p.total(b) > 0) p.pages_per_sequence = std::max(p.pages_per_sequence, (p.total(b) - 1) / p.page_size + 1);
    pages.resize(p.shape.batch * p.pages_per_sequence);
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      if (p.total(b) == 0) continue;
      const int64_t first = std::min(p.first_key(b), p.lengths[b]) / p.page_size, last = (p.total(b) - 1) / p.page_size;
      for (int64_t i = first; i <= last; ++i) {
        const int64_t page = p.table.at(b, i);
        STD_TORCH_CHECK(0 <= page && page < p.page_count, "block_table must hold 0 to ", p.page_count - 1, ", got ", page);
        pages[b * p.pages_per_sequence + i] = page;
      }
    }
    p.pages = pages.data();
  }
};

}  // namespace attn_ext::bindings
