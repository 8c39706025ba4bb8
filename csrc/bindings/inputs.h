// What the attention operators take, checked and as the kernels' params: on any device.
//
// Callers explain a bad argument better than a C++ exception can; the checks here are the last line, so that no
// argument whatever reaches a kernel that would read or write outside a tensor.
#pragma once
#include "bindings/arguments.h"

namespace attn_ext::bindings {

// Whether what tensors hold is looked at here, before a kernel follows it, or by the kernel: reading the memory of another
// device would wait for it, and a graph that is replayed comes with other contents.
enum class Contents { checked, unchecked };

inline AttentionShape checked_shape(const Tensor& query, const Tensor& key, const Tensor& value, DType dtype) {
  check_device(key, "key", query.device());
  check_device(value, "value", query.device());
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
inline void check_broadcasts(const Tensor& tensor, const char* name, const AttentionShape& shape, Device device) {
  check_device(tensor, name, device);
  check_dim(tensor, name, 4);
  const int64_t full[4] = {shape.batch, shape.heads, shape.query_len, shape.kv_len};
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size(d) == 1 || tensor.size(d) == full[d], name, " must broadcast to ", shape_string(full, 4),
                    ", got ", shape_string(tensor));
}

inline MaskParams::KeyRanges checked_key_ranges(Tensor& ranges, const AttentionShape& shape, Device device, Contents contents) {
  check_device(ranges, "key_ranges", device);
  STD_TORCH_CHECK(ranges.dtype_code() == aoti_torch_dtype_int64(), "key_ranges must be int64");
  check_dim(ranges, "key_ranges", 4);
  const int64_t batch = ranges.size(0), rows = ranges.size(1), count = ranges.size(2);
  STD_TORCH_CHECK((batch == 1 || batch == shape.batch) && (rows == 1 || rows == shape.query_len) && ranges.size(3) == 2,
                  "key_ranges must be (", shape.batch, " or 1, ", shape.query_len, " or 1, n, 2), got ", shape_string(ranges));
  STD_TORCH_CHECK(1 <= count && count <= kMaxKeyRanges, "key_ranges must have 1 to ", kMaxKeyRanges, " ranges, got ", count);
  ranges = contiguous(std::move(ranges));
  const auto* data = static_cast<const int64_t*>(ranges.data());
  const int64_t readable = contents == Contents::checked ? ranges.elements() : 0;
  for (int64_t i = 0; i < readable; ++i)
    STD_TORCH_CHECK(0 <= data[i] && data[i] <= shape.kv_len, "key_ranges must hold 0 to ", shape.kv_len, ", got ", data[i]);
  return {data, batch == 1 ? 0 : 2 * rows * count, rows == 1 ? 0 : 2 * count, static_cast<int>(count)};
}

inline MaskParams::SegmentIds checked_segments(Tensor& ids, const char* name, Device device, int64_t batch, int64_t length) {
  check_rows(ids, name, device, batch, length);
  STD_TORCH_CHECK(ids.dtype_code() == aoti_torch_dtype_int32(), name, " must be int32");
  ids = contiguous(std::move(ids));
  return {static_cast<const int32_t*>(ids.data()), ids.size(0) == 1 ? 0 : length};
}

// The tensors of a block mask.  Kernels of the CPU follow the lists without a second look.
struct BlockTensors {
  Tensor offsets, indices, tiles, bits;

  void take(Arguments& arguments) {
    offsets = arguments.optional_tensor(), indices = arguments.optional_tensor();
    tiles = arguments.optional_tensor(), bits = arguments.optional_tensor();
  }
  MaskParams::BlockLists check(const AttentionShape& shape, Device device, Contents contents) {
    const bool all = offsets && indices && tiles && bits;
    STD_TORCH_CHECK(all || !(offsets || indices || tiles || bits),
                    "block_offsets, block_indices, block_tiles and block_bits go together");
    if (!all) return {};
    check_device(offsets, "block_offsets", device), check_device(indices, "block_indices", device);
    check_device(tiles, "block_tiles", device), check_device(bits, "block_bits", device);
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
                                       .entries = indices.size(0),
                                       .bit_tiles = bits.size(0),
                                       .query_block = static_cast<int>(query_block),
                                       .kv_block = static_cast<int>(kv_block)};
    const int64_t readable = contents == Contents::checked ? batch * heads : 0;
    for (int64_t list = 0; list < readable; ++list)
      for (int64_t row = 0; row < rows; ++row) check_row(lists, lists.offsets + list * (rows + 1) + row, columns);
    return shape.query_len && shape.kv_len ? lists : MaskParams::BlockLists();
  }

 private:
  static constexpr int64_t kMaxBlock = 1 << 16;

  static void check_row(const MaskParams::BlockLists& lists, const int64_t* row, int64_t columns) {
    STD_TORCH_CHECK(0 <= row[0] && row[0] <= row[1] && row[1] <= lists.entries, "block_offsets must rise from 0 to ",
                    lists.entries, ", got ", row[0], " before ", row[1]);
    int64_t last = -1;
    for (int64_t i = row[0]; i < row[1]; ++i) {
      STD_TORCH_CHECK(last < lists.indices[i] && lists.indices[i] < columns,
                      "block_indices of a row must rise and be from 0 to ", columns - 1, ", got ", lists.indices[i]);
      STD_TORCH_CHECK(-1 <= lists.tiles[i] && lists.tiles[i] < lists.bit_tiles, "block_tiles must be from -1 to ",
                      lists.bit_tiles - 1, ", got ", lists.tiles[i]);
      last = lists.indices[i];
    }
  }
};

// What forward and backward share, in the order of the schemas.  Owns what the params point to.
struct Inputs {
  Tensor query, key, value, bias, sinks, mask, key_ranges, query_segments, kv_segments, alibi_slopes, alibi_positions, dropout_seed;
  BlockTensors blocks;
  Device device;
  Contents contents;

  explicit Inputs(Contents contents) : contents(contents) {}
  void take_tensors(Arguments& arguments) {
    query = arguments.tensor(), key = arguments.tensor(), value = arguments.tensor();
    device = query.device();
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
      check_broadcasts(bias, "bias", shape, device);
      int dtype = 0;
      while (dtype < kComputeDTypes && !bias.is(static_cast<DType>(dtype))) ++dtype;
      STD_TORCH_CHECK(dtype < kComputeDTypes, "bias must be float32, float64, float16 or bfloat16");
      p.score.bias = broadcast_view(bias);
      p.score.bias_dtype = static_cast<DType>(dtype);
    }
    if (mask) {
      check_broadcasts(mask, "mask", shape, device);
      check_dtype(mask, "mask", DType::boolean, "dtype bool");
      p.mask.dense = broadcast_view(mask);
    }
    if (key_ranges) p.mask.key_ranges = checked_key_ranges(key_ranges, shape, device, contents);
    STD_TORCH_CHECK(static_cast<bool>(query_segments) == static_cast<bool>(kv_segments),
                    "query_segments and kv_segments go together");
    if (query_segments) {
      p.mask.query_segments = checked_segments(query_segments, "query_segments", device, shape.batch, shape.query_len);
      p.mask.kv_segments = checked_segments(kv_segments, "kv_segments", device, shape.batch, shape.kv_len);
    }
    p.mask.blocks = blocks.check(shape, device, contents);
    if (alibi_slopes) check_alibi(p);
    if (sinks) p.score.sinks = checked_sinks(sinks, shape, device);
  }
  void check_alibi(AttentionParams& p) {
    const AttentionShape& shape = p.shape;
    check_device(alibi_slopes, "alibi_slopes", device);
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
    check_device(alibi_positions, "alibi_positions", device);
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
    if (dropout_p != 0) p.dropout = checked_dropout(dropout_p, dropout_seed, device, contents);
  }
  static DropoutParams checked_dropout(double p, const Tensor& seed, Device device, Contents contents) {
    STD_TORCH_CHECK(0 <= p && p <= 1, "dropout_p must be from 0 to 1, got ", p);
    STD_TORCH_CHECK(static_cast<bool>(seed), "dropout needs a seed");
    check_device(seed, "dropout_seed", device);
    STD_TORCH_CHECK(seed.dtype_code() == aoti_torch_dtype_int64() && seed.dim() == 0, "dropout_seed must be one int64");
    const auto* data = static_cast<const int64_t*>(seed.data());
    if (contents == Contents::checked) return DropoutParams::of(p, static_cast<uint64_t>(*data));
    DropoutParams dropout = DropoutParams::of(p, 0);
    dropout.seed_data = data;
    return dropout;
  }
  void set_views(AttentionParams& p) {
    for (auto [tensor, view] : {std::pair{&query, &p.query}, std::pair{&key, &p.key}, std::pair{&value, &p.value}}) {
      *tensor = with_adjacent_columns(std::move(*tensor));
      *view = const_view(*tensor);
    }
  }
};

}  // namespace attn_ext::bindings
