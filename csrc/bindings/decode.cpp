// torch.ops.attn_ext.attention_decode.
//
// Lengths and page numbers come from users and change between calls: they are copied as they are checked, before
// anything is read or written through them, so that nothing that happens to the tensors later can matter.
#include <algorithm>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/torch_executor.h"
#include "cpu/kernel_table.h"

namespace attn_ext::bindings {
namespace {

// A tensor of int32 or int64.
class Integers {
 public:
  Integers(const Tensor& tensor, const char* name, int64_t dim) : wide_(tensor.dtype_code() == aoti_torch_dtype_int64()) {
    check_cpu(tensor, name);
    STD_TORCH_CHECK(wide_ || tensor.dtype_code() == aoti_torch_dtype_int32(), name, " must be int32 or int64");
    check_dim(tensor, name, dim);
    data_ = tensor.data();
  }
  int64_t at(int64_t offset) const {
    return wide_ ? static_cast<const int64_t*>(data_)[offset] : static_cast<const int32_t*>(data_)[offset];
  }

 private:
  bool wide_;
  const void* data_;
};

CacheFormat cache_format(const Tensor& cache, DType dtype) {
  const int32_t code = cache.dtype_code();
  if (cache.is(dtype)) return CacheFormat::plain;
  STD_TORCH_CHECK(dtype != DType::float64 && (code == aoti_torch_dtype_int8() || code == aoti_torch_dtype_float8_e4m3fn()),
                  "key_cache must have the dtype of query, or be int8 or float8_e4m3fn if query is not float64");
  return code == aoti_torch_dtype_int8() ? CacheFormat::int8 : CacheFormat::float8_e4m3;
}

// The offsets that numbers have in memory: sums of x * stride, first <= x <= last, over dimensions whose strides fall.
struct Dimension {
  int64_t stride, first, last;
};
using Lattice = std::vector<Dimension>;

Lattice lattice(const Tensor& tensor) {
  Lattice result;
  for (int d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) result.push_back({tensor.stride(d), 0, tensor.size(d) - 1});
  std::sort(result.begin(), result.end(), [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
  return result;
}

bool is_empty(const Tensor& tensor) {
  for (int d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) == 0) return true;
  return false;
}

// Whether steps along a dimension pass all that the smaller ones reach, as in every view of a plain tensor.
bool is_nested(const Lattice& dimensions) {
  int64_t reach = 0;
  for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
    if (d->stride <= reach) return false;
    reach += d->last * d->stride;
  }
  return true;
}

// Whether the dimensions from `at` on make `offset`.
bool has_offset(const Lattice& dimensions, size_t at, int64_t offset) {
  if (at == dimensions.size()) return offset == 0;
  int64_t lowest = 0, highest = 0;  // of what the smaller ones make
  for (size_t i = at + 1; i < dimensions.size(); ++i) {
    lowest += dimensions[i].first * dimensions[i].stride;
    highest += dimensions[i].last * dimensions[i].stride;
  }
  const auto& [stride, first, last] = dimensions[at];
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  const int64_t end = std::min(last, floor_div(offset - lowest, stride));
  for (int64_t x = std::max(first, -floor_div(highest - offset, stride)); x <= end; ++x)
    if (has_offset(dimensions, at + 1, offset - x * stride)) return true;
  return false;
}

// Of nested ones of a dtype: few x are left to try in each dimension.
bool overlap(const Tensor& a, const Tensor& b) {
  Lattice difference = lattice(a);
  for (Dimension& d : difference) {
    d.first = -d.last;
    d.last = 0;
  }
  for (const Dimension& d : lattice(b)) {
    const auto is_reached = [&](const Dimension& other) { return other.stride <= d.stride; };
    const auto at = std::find_if(difference.begin(), difference.end(), is_reached);
    if (at != difference.end() && at->stride == d.stride) at->last = d.last;
    else difference.insert(at, d);
  }
  const auto item_size = static_cast<int64_t>(aoti_torch_dtype_element_size(a.dtype_code()));
  return has_offset(difference, 0, (static_cast<char*>(a.data()) - static_cast<char*>(b.data())) / item_size);
}

struct DecodeInputs {
  Tensor query, key_cache, value_cache, cache_seqlens, block_table, new_key, new_value, rotary_cos, rotary_sin, key_scale,
      value_scale, alibi_slopes, sinks;
  std::vector<int64_t> lengths, pages;

  void take(Arguments& arguments, DecodeParams& p) {
    query = arguments.tensor(), key_cache = arguments.tensor(), value_cache = arguments.tensor();
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

  void check(DecodeParams& p) {
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
    check_cpu(query, "query");
    query = with_adjacent_columns(std::move(query));
    p.query = const_view(query);
  }

 private:
  CacheView checked_cache(const Tensor& cache, const char* name, Tensor& scale, const char* scale_name, const DecodeParams& p,
                          int64_t columns) {
    check_cpu(cache, name);
    check_shape(cache, name, {key_cache.size(0), p.shape.kv_heads, p.page_size, columns});
    STD_TORCH_CHECK(cache.dtype_code() == key_cache.dtype_code(), name, " must have the dtype of key_cache");
    STD_TORCH_CHECK(columns == 1 || cache.stride(3) == 1, name, " must have adjacent columns, got stride ", cache.stride(3));
    STD_TORCH_CHECK(static_cast<bool>(scale) == (p.format != CacheFormat::plain), scale_name,
                    " goes with caches of int8 and float8_e4m3fn, and with no other");
    CacheView result{{view(cache)}};
    if (scale) {
      check_cpu(scale, scale_name);
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
      check_cpu(rows, name);
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
      check_cpu(table, name);
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
      check_rows(alibi_slopes, "alibi_slopes", cpu(), p.shape.batch, p.shape.heads);
      alibi_slopes = contiguous(converted(std::move(alibi_slopes), DType::float64));
      p.score.alibi_slopes = static_cast<const double*>(alibi_slopes.data());
      p.score.alibi_stride_batch = alibi_slopes.size(0) == 1 ? 0 : p.shape.heads;
    }
    if (sinks) p.score.sinks = checked_sinks(sinks, p.shape, cpu());
  }

  void check_lengths(DecodeParams& p) {
    const Integers given(cache_seqlens, "cache_seqlens", 1);
    check_shape(cache_seqlens, "cache_seqlens", {p.shape.batch});
    if (block_table) {
      check_dim(block_table, "block_table", 2);
      STD_TORCH_CHECK(block_table.size(0) == p.shape.batch, "block_table must have ", p.shape.batch, " rows, got ",
                      block_table.size(0));
    }
    const int64_t pages_each = block_table ? block_table.size(1) : 1;
    int64_t capacity;
    if (__builtin_mul_overflow(pages_each, p.page_size, &capacity)) capacity = std::numeric_limits<int64_t>::max();
    const int64_t positions = rotary_cos ? rotary_cos.size(0) : capacity, room = std::min(capacity, positions) - p.shape.kv_len;
    lengths.resize(p.shape.batch);
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      lengths[b] = given.at(b * cache_seqlens.stride(0));
      STD_TORCH_CHECK(0 <= lengths[b] && lengths[b] <= room, "cache_seqlens must hold 0 to ", room, ", got ", lengths[b]);
    }
    p.lengths = lengths.data();
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
  void check_pages(DecodeParams& p) {
    const Integers table(block_table, "block_table", 2);
    for (int64_t b = 0; b < p.shape.batch; ++b)
      if (p.total(b) > 0) p.pages_per_sequence = std::max(p.pages_per_sequence, (p.total(b) - 1) / p.page_size + 1);
    pages.resize(p.shape.batch * p.pages_per_sequence);
    const int64_t page_count = key_cache.size(0);
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      if (p.total(b) == 0) continue;
      const int64_t first = std::min(p.first_key(b), p.lengths[b]) / p.page_size, last = (p.total(b) - 1) / p.page_size;
      for (int64_t i = first; i <= last; ++i) {
        const int64_t page = table.at(b * block_table.stride(0) + i * block_table.stride(1));
        STD_TORCH_CHECK(0 <= page && page < page_count, "block_table must hold 0 to ", page_count - 1, ", got ", page);
        pages[b * p.pages_per_sequence + i] = page;
      }
    }
    p.pages = pages.data();
  }
};

void attention_decode(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  DecodeInputs inputs;
  DecodeParams params;
  inputs.take(arguments, params);
  inputs.check(params);
  const AttentionShape& shape = params.shape;
  Tensor out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  const int32_t statistics = torch_dtype(statistics_dtype(params.dtype));
  Tensor lse = empty({shape.batch, shape.heads, shape.query_len}, {0, 1, 2}, statistics, cpu());
  params.out = view(out);
  params.lse = lse.data();
  cpu::kernel_table().decode[static_cast<int>(params.dtype)](params, torch_executor());
  give(stack, out, lse);
}

}  // namespace
}  // namespace attn_ext::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(attn_ext, library) {
  library.def(
      "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, "
      "Tensor? block_table, Tensor? new_key, Tensor? new_value, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? key_scale, "
      "Tensor? value_scale, Tensor? alibi_slopes, Tensor? sinks, float scale, float softcap, bool rotary_interleaved, "
      "SymInt? window_left, SymInt? num_splits) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, library) {
  library.impl("attention_decode", attn_ext::bindings::attention_decode);
}
