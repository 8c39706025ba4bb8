// torch.ops.attn_ext.*: schemas, checks, allocation, and the call into the kernels.
//
// Callers explain a bad argument better than a C++ exception can; the checks here are the last line, so that no
// argument whatever reaches a kernel that would read or write outside a tensor.
#include "bindings/arguments.h"
#include "bindings/torch_executor.h"
#include "core/dropout.h"
#include "cpu/kernel_table.h"

namespace attn_ext::bindings {
namespace {

AttentionShape checked_shape(const Tensor& query, const Tensor& key, const Tensor& value, DType dtype) {
  check_cpu(query, "query");
  check_cpu(key, "key");
  check_cpu(value, "value");
  check_dtype(key, "key", dtype, "the dtype of query");
  check_dtype(value, "value", dtype, "the dtype of query");
  check_dim(query, "query", 4);
  check_dim(key, "key", 4);
  check_dim(value, "value", 4);
  const AttentionShape shape{.batch = query.size(0),
                             .heads = query.size(1),
                             .kv_heads = key.size(1),
                             .query_len = query.size(2),
                             .kv_len = key.size(2),
                             .head_dim = query.size(3),
                             .value_dim = value.size(3)};
  check_shape(key, "key", {shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim});
  check_shape(value, "value", {shape.batch, shape.kv_heads, shape.kv_len, shape.value_dim});
  STD_TORCH_CHECK(shape.kv_heads > 0 ? shape.heads % shape.kv_heads == 0 : shape.heads == 0,
                  "the heads of query must be a multiple of those of key, got ", shape.heads, " and ", shape.kv_heads);
  STD_TORCH_CHECK(1 <= shape.head_dim && shape.head_dim <= kMaxHeadDim, "query and key must have 1 to ", kMaxHeadDim,
                  " columns, got ", shape.head_dim);
  STD_TORCH_CHECK(1 <= shape.value_dim && shape.value_dim <= kMaxHeadDim, "value must have 1 to ", kMaxHeadDim,
                  " columns, got ", shape.value_dim);
  return shape;
}

// The shape of (batch, heads, query_len, kv_len), any of it 1.
void check_broadcasts(const Tensor& tensor, const char* name, const AttentionShape& shape) {
  check_cpu(tensor, name);
  check_dim(tensor, name, 4);
  const int64_t full[4] = {shape.batch, shape.heads, shape.query_len, shape.kv_len};
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size(d) == 1 || tensor.size(d) == full[d], name, " must broadcast to ", shape_string(full, 4),
                    ", got ", shape_string(tensor));
}

MaskParams::KeyRanges checked_key_ranges(Tensor& ranges, const AttentionShape& shape) {
  check_cpu(ranges, "key_ranges");
  STD_TORCH_CHECK(ranges.dtype_code() == aoti_torch_dtype_int64(), "key_ranges must be int64");
  check_dim(ranges, "key_ranges", 4);
  const int64_t batch = ranges.size(0), rows = ranges.size(1), count = ranges.size(2);
  STD_TORCH_CHECK((batch == 1 || batch == shape.batch) && (rows == 1 || rows == shape.query_len) && ranges.size(3) == 2,
                  "key_ranges must be (", shape.batch, " or 1, ", shape.query_len, " or 1, n, 2), got ", shape_string(ranges));
  STD_TORCH_CHECK(1 <= count && count <= kMaxKeyRanges, "key_ranges must have 1 to ", kMaxKeyRanges, " ranges, got ", count);
  ranges = contiguous(std::move(ranges));
  const auto* data = static_cast<const int64_t*>(ranges.data());
  for (int64_t i = 0; i < 2 * batch * rows * count; ++i)
    STD_TORCH_CHECK(0 <= data[i] && data[i] <= shape.kv_len, "key_ranges must hold 0 to ", shape.kv_len, ", got ", data[i]);
  return {data, batch == 1 ? 0 : 2 * rows * count, rows == 1 ? 0 : 2 * count, static_cast<int>(count)};
}

MaskParams::SegmentIds checked_segments(Tensor& ids, const char* name, int64_t batch, int64_t length) {
  check_rows(ids, name, batch, length);
  STD_TORCH_CHECK(ids.dtype_code() == aoti_torch_dtype_int32(), name, " must be int32");
  ids = contiguous(std::move(ids));
  return {static_cast<const int32_t*>(ids.data()), ids.size(0) == 1 ? 0 : length};
}

// The tensors of a block mask.  Everything in them is looked at: kernels follow the lists without a second look.
struct BlockTensors {
  Tensor offsets, indices, tiles, bits;

  void take(Arguments& arguments) {
    offsets = arguments.optional_tensor(), indices = arguments.optional_tensor();
    tiles = arguments.optional_tensor(), bits = arguments.optional_tensor();
  }
  MaskParams::BlockLists check(const AttentionShape& shape) {
    const bool all = offsets && indices && tiles && bits;
    STD_TORCH_CHECK(all || !(offsets || indices || tiles || bits),
                    "block_offsets, block_indices, block_tiles and block_bits go together");
    if (!all) return {};
    check_cpu(offsets, "block_offsets"), check_cpu(indices, "block_indices");
    check_cpu(tiles, "block_tiles"), check_cpu(bits, "block_bits");
    check_dim(offsets, "block_offsets", 3), check_dim(indices, "block_indices", 1), check_dim(bits, "block_bits", 3);
    STD_TORCH_CHECK(offsets.dtype_code() == aoti_torch_dtype_int64() && indices.dtype_code() == aoti_torch_dtype_int32() &&
                        tiles.dtype_code() == aoti_torch_dtype_int32() && bits.dtype_code() == aoti_torch_dtype_uint8(),
                    "block_offsets must be int64, block_indices and block_tiles int32, and block_bits uint8");
    const int64_t kv_block = bits.size(1), query_block = 8 * bits.size(2);
    for (int64_t size : {query_block, kv_block})
      STD_TORCH_CHECK(16 <= size && size <= kMaxBlock && size % 16 == 0, "blocks must be a multiple of 16 queries and keys, up to ",
                      kMaxBlock, ", got ", query_block, " x ", kv_block);
    const int64_t rows = (shape.query_len + query_block - 1) / query_block, columns = (shape.kv_len + kv_block - 1) / kv_block;
    const int64_t batch = offsets.size(0), heads = offsets.size(1);
    STD_TORCH_CHECK((batch == 1 || batch == shape.batch) && (heads == 1 || heads == shape.heads) && offsets.size(2) == rows + 1,
                    "block_offsets must be (", shape.batch, " or 1, ", shape.heads, " or 1, ", rows + 1, "), got ",
                    shape_string(offsets));
    check_shape(tiles, "block_tiles", {indices.size(0)});
    offsets = contiguous(std::move(offsets)), indices = contiguous(std::move(indices));
    tiles = contiguous(std::move(tiles)), bits = contiguous(std::move(bits));
    const MaskParams::BlockLists lists{.offsets = static_cast<const int64_t*>(offsets.data()),
                                       .stride_batch = batch == 1 ? 0 : heads * (rows + 1),
                                       .stride_head = heads == 1 ? 0 : rows + 1,
                                       .indices = static_cast<const int32_t*>(indices.data()),
                                       .tiles = static_cast<const int32_t*>(tiles.data()),
                                       .bits = static_cast<const uint8_t*>(bits.data()),
                                       .query_block = static_cast<int>(query_block),
                                       .kv_block = static_cast<int>(kv_block)};
    for (int64_t list = 0; list < batch * heads; ++list)
      for (int64_t row = 0; row < rows; ++row)
        check_row(lists, lists.offsets + list * (rows + 1) + row, indices.size(0), columns, bits.size(0));
    return shape.query_len && shape.kv_len ? lists : MaskParams::BlockLists();
  }

 private:
  static constexpr int64_t kMaxBlock = 1 << 16;

  static void check_row(const MaskParams::BlockLists& lists, const int64_t* row, int64_t count, int64_t columns, int64_t tiles) {
    STD_TORCH_CHECK(0 <= row[0] && row[0] <= row[1] && row[1] <= count, "block_offsets must rise from 0 to ", count, ", got ",
                    row[0], " before ", row[1]);
    int64_t last = -1;
    for (int64_t i = row[0]; i < row[1]; ++i) {
      STD_TORCH_CHECK(last < lists.indices[i] && lists.indices[i] < columns,
                      "block_indices of a row must rise and be from 0 to ", columns - 1, ", got ", lists.indices[i]);
      STD_TORCH_CHECK(-1 <= lists.tiles[i] && lists.tiles[i] < tiles, "block_tiles must be from -1 to ", tiles - 1, ", got ",
                      lists.tiles[i]);
      last = lists.indices[i];
    }
  }
};

// What forward and backward share, in the order of the schemas.  Owns what the params point to.
struct Inputs {
  Tensor query, key, value, bias, sinks, mask, key_ranges, query_segments, kv_segments, alibi_slopes, alibi_positions, dropout_seed;
  BlockTensors blocks;

  void take_tensors(Arguments& arguments) {
    query = arguments.tensor(), key = arguments.tensor(), value = arguments.tensor();
  }
  void take_options(Arguments& arguments) {
    bias = arguments.optional_tensor(), sinks = arguments.optional_tensor(), mask = arguments.optional_tensor();
    key_ranges = arguments.optional_tensor(), query_segments = arguments.optional_tensor();
    kv_segments = arguments.optional_tensor(), alibi_slopes = arguments.optional_tensor();
    alibi_positions = arguments.optional_tensor();
    dropout_seed = arguments.optional_tensor();
    blocks.take(arguments);
  }
  void check(AttentionParams& p) {
    p.dtype = compute_dtype(query);
    p.shape = checked_shape(query, key, value, p.dtype);
    const AttentionShape& shape = p.shape;
    if (bias) {
      check_broadcasts(bias, "bias", shape);
      int dtype = 0;
      while (dtype < kComputeDTypes && !bias.is(static_cast<DType>(dtype))) ++dtype;
      STD_TORCH_CHECK(dtype < kComputeDTypes, "bias must be float32, float64, float16 or bfloat16");
      p.score.bias = broadcast_view(bias);
      p.score.bias_dtype = static_cast<DType>(dtype);
    }
    if (mask) {
      check_broadcasts(mask, "mask", shape);
      check_dtype(mask, "mask", DType::boolean, "dtype bool");
      p.mask.dense = broadcast_view(mask);
    }
    if (key_ranges) p.mask.key_ranges = checked_key_ranges(key_ranges, shape);
    STD_TORCH_CHECK(static_cast<bool>(query_segments) == static_cast<bool>(kv_segments),
                    "query_segments and kv_segments go together");
    if (query_segments) {
      p.mask.query_segments = checked_segments(query_segments, "query_segments", shape.batch, shape.query_len);
      p.mask.kv_segments = checked_segments(kv_segments, "kv_segments", shape.batch, shape.kv_len);
    }
    p.mask.blocks = blocks.check(shape);
    if (alibi_slopes) check_alibi(p);
    if (sinks) p.score.sinks = checked_sinks(sinks, shape);
  }
  void check_alibi(AttentionParams& p) {
    const AttentionShape& shape = p.shape;
    check_cpu(alibi_slopes, "alibi_slopes");
    check_dim(alibi_slopes, "alibi_slopes", 3);
    const int64_t batch = alibi_slopes.size(0), rows = alibi_slopes.size(2);
    STD_TORCH_CHECK((batch == 1 || batch == shape.batch) && alibi_slopes.size(1) == shape.heads && (rows == 1 || rows == shape.query_len),
                    "alibi_slopes must be (", shape.batch, " or 1, ", shape.heads, ", ", shape.query_len, " or 1), got ",
                    shape_string(alibi_slopes));
    alibi_slopes = contiguous(converted(std::move(alibi_slopes), DType::float64));
    p.score.alibi_slopes = static_cast<const double*>(alibi_slopes.data());
    p.score.alibi_stride_batch = batch == 1 ? 0 : shape.heads * rows;
    p.score.alibi_stride_head = rows;
    p.score.alibi_stride_row = rows == 1 ? 0 : 1;
    if (!alibi_positions) return;
    check_cpu(alibi_positions, "alibi_positions");
    check_shape(alibi_positions, "alibi_positions", {shape.query_len});
    STD_TORCH_CHECK(alibi_positions.dtype_code() == aoti_torch_dtype_int64(), "alibi_positions must be int64");
    alibi_positions = contiguous(std::move(alibi_positions));
    p.score.alibi_positions = static_cast<const int64_t*>(alibi_positions.data());
  }
  void set_numbers(Arguments& arguments, AttentionParams& p) {
    p.score.scale = arguments.number();
    p.score.softcap = checked_softcap(arguments.number());
    const double dropout_p = arguments.number();
    const auto band_lower = arguments.optional_int(), band_upper = arguments.optional_int();
    p.mask.band_lower = band_lower.value_or(MaskParams::no_lower);
    p.mask.band_upper = band_upper.value_or(MaskParams::no_upper);
    if (dropout_p != 0) p.dropout = checked_dropout(dropout_p, dropout_seed);
  }
  static DropoutParams checked_dropout(double p, const Tensor& seed) {
    STD_TORCH_CHECK(0 <= p && p <= 1, "dropout_p must be from 0 to 1, got ", p);
    STD_TORCH_CHECK(static_cast<bool>(seed), "dropout needs a seed");
    check_cpu(seed, "dropout_seed");
    STD_TORCH_CHECK(seed.dtype_code() == aoti_torch_dtype_int64() && seed.dim() == 0, "dropout_seed must be one int64");
    return DropoutParams::of(p, static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data())));
  }
  void set_views(AttentionParams& p) {
    for (auto [tensor, view] : {std::pair{&query, &p.query}, std::pair{&key, &p.key}, std::pair{&value, &p.value}}) {
      *tensor = with_adjacent_columns(std::move(*tensor));
      *view = const_view(*tensor);
    }
  }
};

// Fills and returns out.
Tensor run_forward(Inputs& inputs, ForwardParams& params) {
  const AttentionShape& shape = params.shape;
  Tensor out = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  inputs.set_views(params);
  params.out = view(out);
  cpu::kernel_table().forward[static_cast<int>(params.dtype)](params, torch_executor());
  return out;
}

void attention_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Inputs inputs;
  ForwardParams params;
  inputs.take_tensors(arguments);
  inputs.take_options(arguments);
  inputs.set_numbers(arguments, params);
  inputs.check(params);
  const int64_t rows[3] = {params.shape.batch, params.shape.heads, params.shape.query_len};
  const int32_t statistics = torch_dtype(statistics_dtype(params.dtype));
  Tensor lse = empty(rows, {0, 1, 2}, statistics), lse_residual = empty(rows, {0, 1, 2}, statistics);
  params.lse = lse.data();
  params.lse_residual = lse_residual.data();
  Tensor out = run_forward(inputs, params);
  give(stack, out, lse, lse_residual);
}

// The usual inference: fewer arguments and results take a small call less time.
void attention_output(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Inputs inputs;
  ForwardParams params;
  inputs.take_tensors(arguments);
  inputs.bias = arguments.optional_tensor(), inputs.mask = arguments.optional_tensor();
  inputs.key_ranges = arguments.optional_tensor();
  params.score.scale = arguments.number();
  params.mask.band_lower = arguments.optional_int().value_or(MaskParams::no_lower);
  params.mask.band_upper = arguments.optional_int().value_or(MaskParams::no_upper);
  inputs.check(params);
  Tensor out = run_forward(inputs, params);
  give(stack, out);
}

void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor grad_out = arguments.tensor(), grad_lse = arguments.optional_tensor();
  Inputs inputs;
  BackwardParams params;
  inputs.take_tensors(arguments);
  Tensor out = arguments.tensor(), lse = arguments.tensor(), lse_residual = arguments.tensor();
  inputs.take_options(arguments);
  inputs.set_numbers(arguments, params);
  const bool wants_grad_bias = arguments.flag(), wants_grad_sinks = arguments.flag();
  inputs.check(params);
  const AttentionShape& shape = params.shape;
  const DType dtype = params.dtype, statistics = statistics_dtype(dtype);

  const auto check_like_out = [&](const Tensor& tensor, const char* name) {
    check_cpu(tensor, name);
    check_dtype(tensor, name, dtype, "the dtype of query");
    check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  };
  check_like_out(out, "out");
  check_like_out(grad_out, "grad_out");
  const auto checked_statistics = [&](Tensor& tensor, const char* name) {
    check_cpu(tensor, name);
    check_dtype(tensor, name, statistics, "dtype float64 for float64 inputs and float32 for all others");
    check_shape(tensor, name, {shape.batch, shape.heads, shape.query_len});
    tensor = contiguous(std::move(tensor));
    return static_cast<const void*>(tensor.data());
  };
  params.lse = checked_statistics(lse, "lse");
  params.lse_residual = checked_statistics(lse_residual, "lse_residual");
  if (grad_lse) params.grad_lse = checked_statistics(grad_lse, "grad_lse");

  Tensor grad_query = empty_in_order_of(inputs.query, {shape.batch, shape.heads, shape.query_len, shape.head_dim});
  Tensor grad_key = empty_in_order_of(inputs.key, {shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim});
  Tensor grad_value = empty_in_order_of(inputs.value, {shape.batch, shape.kv_heads, shape.kv_len, shape.value_dim});
  params.grad_query = view(grad_query);
  params.grad_key = view(grad_key);
  params.grad_value = view(grad_value);

  Tensor grad_bias = nothing(statistics), grad_sinks = nothing(DType::float64);
  if (wants_grad_bias) {
    const Tensor& bias = inputs.bias;
    STD_TORCH_CHECK(static_cast<bool>(bias), "the gradient of a bias that is not there");
    grad_bias = empty({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, {0, 1, 2, 3}, torch_dtype(statistics));
    const ConstTensorView grad = broadcast_view(grad_bias);
    params.grad_bias = {grad_bias.data(), grad.stride_batch, grad.stride_head, grad.stride_row, grad.stride_column};
    params.grad_bias_elements = bias.size(0) * bias.size(1) * bias.size(2) * bias.size(3);
  }
  if (wants_grad_sinks) {
    STD_TORCH_CHECK(static_cast<bool>(inputs.sinks), "the gradient of sinks that are not there");
    grad_sinks = empty({shape.heads}, {0}, torch_dtype(DType::float64));
    params.grad_sinks = static_cast<double*>(grad_sinks.data());
  }

  inputs.set_views(params);
  for (auto [tensor, input] : {std::pair{&out, &params.out}, std::pair{&grad_out, &params.grad_out}}) {
    *tensor = with_adjacent_columns(std::move(*tensor));
    *input = const_view(*tensor);
  }
  cpu::kernel_table().backward[static_cast<int>(dtype)](params, torch_executor());
  give(stack, grad_query, grad_key, grad_value, grad_bias, grad_sinks);
}

// dropout_mask(dropout_seed, dropout_p, batch, heads, query_begin, query_end, kv_len) -> bool, true = kept
void dropout_mask(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor seed = arguments.tensor();
  const DropoutParams dropout = Inputs::checked_dropout(arguments.number(), seed);
  const int64_t batch = arguments.integer(), heads = arguments.integer(), begin = arguments.integer();
  const int64_t end = arguments.integer(), kv_len = arguments.integer();
  STD_TORCH_CHECK(batch >= 0 && heads >= 0 && 0 <= begin && begin <= end && kv_len >= 0, "sizes must not be negative");
  Tensor mask = empty({batch, heads, end - begin, kv_len}, {0, 1, 2, 3}, torch_dtype(DType::boolean));
  auto* kept = static_cast<uint8_t*>(mask.data());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < kv_len; ++j) *kept++ = keeps_weight(dropout, b, h, i, j);
  give(stack, mask);
}

}  // namespace
}  // namespace attn_ext::bindings

// What the two operators that know everything share.
#define ATTN_EXT_OPTIONS                                                                                        \
  "Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? key_ranges, Tensor? query_segments, Tensor? kv_segments, " \
  "Tensor? alibi_slopes, Tensor? alibi_positions, Tensor? dropout_seed, Tensor? block_offsets, Tensor? block_indices, "                  \
  "Tensor? block_tiles, Tensor? block_bits, float scale, float softcap, float dropout_p, SymInt? band_lower, " \
  "SymInt? band_upper"

STABLE_TORCH_LIBRARY(attn_ext, library) {
  library.def("attention_forward(Tensor query, Tensor key, Tensor value, " ATTN_EXT_OPTIONS
              ") -> (Tensor out, Tensor lse, Tensor lse_residual)");
  library.def(
      "attention_output(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? key_ranges, "
      "float scale, SymInt? band_lower, SymInt? band_upper) -> Tensor");
  // Gradients that are not wanted are tensors without elements.
  library.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor lse_residual, " ATTN_EXT_OPTIONS ", bool wants_grad_bias, bool wants_grad_sinks) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_sinks)");
  library.def(
      "dropout_mask(Tensor dropout_seed, float dropout_p, SymInt batch, SymInt heads, SymInt query_begin, "
      "SymInt query_end, SymInt kv_len) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, library) {
  library.impl("attention_forward", attn_ext::bindings::attention_forward);
  library.impl("attention_output", attn_ext::bindings::attention_output);
  library.impl("attention_backward", attn_ext::bindings::attention_backward);
  library.impl("dropout_mask", attn_ext::bindings::dropout_mask);
}
