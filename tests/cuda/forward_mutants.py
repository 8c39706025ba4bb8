"""Planted defects of the CUDA forward kernels, which the tests are to notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    what: str
    file: str  # in csrc
    old: str  # occurs once
    new: str
    variant: str = "bf16_32_modified"


FORWARD, MMA, FMA, TILE = (f"cuda/{name}.cuh" for name in ("flash_forward", "mma", "fma", "tile"))
SOFTMAX, SCORES, VISITOR = (f"cuda/{name}.cuh" for name in ("softmax", "scores", "key_visitor"))
FACTORS = "cuda/score_factors.h"
KEYS, GUARD, ACCUMULATORS = (f"cuda/{name}.cuh" for name in ("visible_keys", "value_guard", "accumulators"))
DROPOUT, MASK, ONLINE = (f"core/{name}.h" for name in ("dropout", "mask", "online_softmax"))

MUTANTS = (
    # Barriers and waits
    Mutant(
        "no barrier before the queries are read",
        FORWARD,
        "  __syncthreads();\n  own_queries.fetch();",
        "  own_queries.fetch();",
    ),
    Mutant(
        "no wait for the first keys",
        FORWARD,
        "  cp_async_wait<0>();\n  __syncthreads();\n  own_queries",
        "  __syncthreads();\n  own_queries",
    ),
    Mutant(
        "no barrier before the products of keys",
        FORWARD,
        "    __syncthreads();  // these keys are there",
        "    // these keys are there",
    ),
    Mutant(
        "no barrier before the products of values",
        FORWARD,
        "    else __syncthreads();  // these values",
        "    // these values",
    ),
    Mutant(
        "no wait for the values",
        FORWARD,
        "    cp_async_wait<0>();\n    ValueGuard",
        "    ValueGuard",
    ),
    Mutant(
        "values are cleaned before all warps have added them",
        FORWARD,
        "      guard.add(o);\n      __syncthreads();",
        "      guard.add(o);",
    ),
    Mutant(
        "values are read before they are clean",
        FORWARD,
        "      guard.clean();\n      __syncthreads();",
        "      guard.clean();",
    ),
    Mutant(
        "rows of the output are read before they are staged",
        ACCUMULATORS,
        "  __syncwarp();\n  constexpr int kWidth",
        "  constexpr int kWidth",
    ),
    # Tiles and copies
    Mutant(
        "no swizzle", TILE, "row * kPitch + ((chunk ^ swizzle) << 4)", "row * kPitch + ((chunk ^ 0) << 4)"
    ),
    Mutant("swizzle of wide rows in narrow ones", TILE, "row & 7 : row >> 1 & 3", "row & 7 : row & 3"),
    Mutant("keys past the end are read", FORWARD, "key_copy.clipped(", "key_copy.whole("),
    Mutant(
        "values past the end are read",
        FORWARD,
        "if constexpr (kPartial) value_copy.clipped(",
        "if (false) value_copy.clipped(",
    ),
    Mutant("queries past the end are read", FORWARD, "query_copy.clipped(", "query_copy.whole("),
    Mutant(
        "a row too few exists",
        TILE,
        "pass * kRowsPerPass < from.count",
        "pass * kRowsPerPass < from.count - 1",
    ),
    Mutant(
        "columns past the end are not cleared",
        FORWARD,
        "  key_copy.clear_columns(shared + F::kKeyTile);\n  value_copy",
        "  value_copy",
    ),
    Mutant(
        "a chunk past the head's columns is copied",
        TILE,
        "+ Tile::kSpan - 1) / Tile::kSpan)",
        "+ Tile::kSpan) / Tile::kSpan)",
    ),
    Mutant(
        "rows of the copy one apart too far",
        TILE,
        "row_ * row_stride * kBytesPerElement",
        "row_ * (row_stride + 8) * kBytesPerElement",
    ),
    # Heads and rows
    Mutant(
        "key head of the query head",
        FORWARD,
        "kv_head = head / (heads / static_cast<int>(shape.kv_heads))",
        "kv_head = head % static_cast<int>(shape.kv_heads)",
    ),
    Mutant(
        "values of another head",
        FORWARD,
        "head_of<T>(p.value, batch, kv_head)",
        "head_of<T>(p.value, batch, 0)",
    ),
    Mutant(
        "batch of the keys", FORWARD, "head_of<T>(p.key, batch, kv_head)", "head_of<T>(p.key, 0, kv_head)"
    ),
    Mutant(
        "keys of the tile before",
        FORWARD,
        "n > run.first ? n - 1 : after, std::true_type()",
        "n > run.first ? n : after, std::true_type()",
    ),
    Mutant(
        "keys of the next run are not fetched",
        FORWARD,
        "const int after = next.last;",
        "const int after = next.last > 0 ? next.last - 1 : next.last;",
    ),
    # Fragments
    Mutant(
        "B registers swapped",
        MMA,
        "ldmatrix_x4(b, at.by_columns(b_tile, j / 2, k));\n",
        "ldmatrix_x4(b, at.by_columns(b_tile, j / 2, k));\n      std::swap(b[1], b[2]);\n",
    ),
    Mutant(
        "weights of rows g and g + 8 swapped",
        MMA,
        "a[mi][0] = pack<T>(left[0], left[1]), a[mi][1] = pack<T>(left[2], left[3]);",
        "a[mi][1] = pack<T>(left[0], left[1]), a[mi][0] = pack<T>(left[2], left[3]);",
    ),
    Mutant("halves of a register swapped", MMA, "pack<T>(right[0], right[1])", "pack<T>(right[1], right[0])"),
    Mutant(
        "rows and columns of ldmatrix", MMA, "ldmatrix_x4(b, at.by_columns(", "ldmatrix_x4(b, at.by_rows("
    ),
    Mutant("values not transposed", MMA, "ldmatrix_x4_transposed(b,", "ldmatrix_x4(b,"),
    Mutant(
        "second block of 16 rows of a warp",
        MMA,
        "ldmatrix_x4(kept[k][mi], at.by_rows(tile, mi, k))",
        "ldmatrix_x4(kept[k][mi], at.by_rows(tile, 0, k))",
        "bf16_64_long",
    ),
    Mutant("weights of another lane", FMA, "p[0][j][2 + e], owner", "p[0][j][2 + e], owner ^ 1", "f32_32"),
    Mutant("columns of the output", FMA, "2 * (j % 2) + e", "2 * (j % 2) + 1 - e", "f32_32"),
    # Softmax
    Mutant("the sum is not rescaled", ONLINE, "    l = l * alpha;\n", ""),
    Mutant(
        "the output of rows g + 8 is not rescaled",
        SOFTMAX,
        "scale_row(o, mi, h, row_[mi][h].raise(",
        "scale_row(o, mi, 0, row_[mi][h].raise(",
    ),
    Mutant("the maximum goes down", ONLINE, "Math::max(scores_max, m)", "scores_max"),
    Mutant(
        "the maximum of two lanes of four",
        SOFTMAX,
        "        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));\n",
        "",
    ),
    Mutant("the sum over two lanes of four", SOFTMAX, "        l += __shfl_xor_sync(kAllLanes, l, 2);\n", ""),
    Mutant(
        "the maximum never moves",
        SOFTMAX,
        "outgrown |= fused(x, factor_, -row_[mi][h].m) > bound_",
        "outgrown |= fused(x, factor_, -row_[mi][h].m) > 1e30f",
    ),
    Mutant("the maximum always moves", SOFTMAX, "> bound_[mi];", "> -1000.f;"),
    Mutant("weights grow to 2^127", SOFTMAX, "kSlack = 8.f", "kSlack = 120.f"),
    Mutant("no headroom", SOFTMAX, "kExponent = kHeadroom + kSlack", "kExponent = 0.f"),
    Mutant(
        "headroom too small for a thousand keys", SOFTMAX, "kExponent = kHeadroom + kSlack", "kExponent = 9.f"
    ),
    Mutant(
        "fp32 without headroom",
        SOFTMAX,
        "kExponent = 0.f, kFactor = 0x1p-28f",
        "kExponent = 0.f, kFactor = 1.f",
        "f32_32",
    ),
    Mutant(
        "huge scores as any other",
        SOFTMAX,
        "bound_[mi] = __any_sync(kAllLanes, huge) ? -INFINITY : kBound;",
        "bound_[mi] = kBound;",
    ),
    Mutant(
        "headroom stays in lse",
        SOFTMAX,
        "RowStatistics<float>::of(m - headroom",
        "RowStatistics<float>::of(m",
    ),
    Mutant("rows that see nothing divide by 0", SOFTMAX, "l == 0.f ? 0.f : ", ""),
    Mutant(
        "the sink counts in every lane",
        SOFTMAX,
        "if (lane_index() % 4 == 0) row_[mi][h].add",
        "row_[mi][h].add",
    ),
    Mutant("the sink of head 0", FORWARD, "p.score.sinks[head]", "p.score.sinks[0]"),
    Mutant("lse of rows past the end", FORWARD, "      if (row >= rows) continue;\n", ""),
    Mutant(
        "lse of another head",
        FORWARD,
        "(static_cast<int64_t>(batch) * heads + head) * shape.query_len",
        "(static_cast<int64_t>(batch) * heads + kv_head) * shape.query_len",
    ),
    Mutant("no residual", FORWARD, "[first + row] = statistics[mi][h].residual", "[first + row] = 0.f"),
    # Scores and weights
    Mutant(
        "softcap not divided by",
        FACTORS,
        "score.scale / score.softcap",
        "score.scale",
    ),
    Mutant(
        "tanh of small numbers to the first order",
        SCORES,
        "x * fused(square, fused(square, 2.f / 15, -1.f / 3), 1.f)",
        "x",
        "f32_32",
    ),
    Mutant("bias of the first head", SCORES, "+ head_ * bias.stride_head", ""),
    Mutant("bias of row 0", SCORES, "first + query(q) * bias.stride_row", "first"),
    Mutant(
        "columns of the bias are adjacent",
        SCORES,
        "Place::key_offset(k) * bias.stride_column",
        "Place::key_offset(k)",
    ),
    Mutant("bias past the last key", SCORES, "        if (Place::key_offset(k) >= existing) continue;\n", ""),
    Mutant(
        "bias of -inf is added to what may be NaN",
        SCORES,
        "value == -INFINITY ? value : score + value",
        "score + value",
    ),
    Mutant("ALiBi counts from the top left", SCORES, "i + p_.shape.kv_len - p_.shape.query_len", "i"),
    Mutant(
        "ALiBi does not look at positions", SCORES, "score.alibi_positions ? score.alibi_positions[i] : ", ""
    ),
    Mutant("ALiBi slopes of batch 0", SCORES, "batch_ * score.alibi_stride_batch + ", ""),
    Mutant(
        "ALiBi of signed distances",
        SCORES,
        "fabsf(distance - static_cast<float>(Place::key_offset(k)))",
        "(distance - static_cast<float>(Place::key_offset(k)))",
    ),
    Mutant(
        "philox words in another order",
        SCORES,
        "(2 * (run + word) + half)",
        "(2 * (run + (word ^ 1)) + half)",
    ),
    Mutant("philox halves swapped", SCORES, "words[word] >> 16 * half", "words[word] >> 16 * (1 - half)"),
    Mutant(
        "philox counts the key head",
        SCORES,
        "static_cast<uint32_t>(head), static_cast<uint32_t>(batch)",
        "static_cast<uint32_t>(head / 2), static_cast<uint32_t>(batch)",
    ),
    Mutant("threshold one too high", SCORES, ") < p.dropout.threshold", ") <= p.dropout.threshold + 40"),
    Mutant(
        "lse knows of dropout",
        FORWARD,
        "    softmax.step(s, o);\n",
        "    if (p.dropout.enabled()) {\n"
        "      for_elements<MI, F::NJ>([&](int mi, int h, int j, int e) { s[mi][j][2 * h + e] += 0.01f; });\n"
        "    }\n"
        "    softmax.step(s, o);\n",
        "f32_32",
    ),
    # Masks
    Mutant("a band that ends one key early", MASK, "-shape.query_len - 1) + 1);", "-shape.query_len - 1));"),
    Mutant(
        "a band that begins one key early",
        MASK,
        "i + min_i64(mask.band_lower, shape.kv_len)",
        "i - 1 + min_i64(mask.band_lower, shape.kv_len)",
    ),
    Mutant("only the first range", KEYS, "r < p_.mask.key_ranges.count", "r < 1"),
    Mutant("the second key of a pair is cut with the first", KEYS, "min(end & 7, 2)", "(end & 7 ? 2 : 0)"),
    Mutant("segments of batch 0", KEYS, "batch_ * mask.query_segments.stride_batch + query", "query"),
    Mutant("dense mask from the tile's first key", KEYS, "+ key0_ * dense.stride_column", ""),
    Mutant(
        "dense mask is 1 where true",
        KEYS,
        "row[key * dense.stride_column] != 0",
        "row[key * dense.stride_column] == 1",
    ),
    Mutant(
        "block bits of the block's first key",
        KEYS,
        "blocks.kv_block - block_begin) * row_bytes",
        "blocks.kv_block) * row_bytes",
    ),
    Mutant("bits of the wrong query of eight", KEYS, ">> within % 8 & 1", ">> within / 8 % 8 & 1"),
    Mutant("partial blocks are full", KEYS, "if (tile == -1) seen |= filtered(", "seen |= filtered("),
    Mutant(
        "lookup of a block's neighbour",
        KEYS,
        "if (index < block) begin = middle + 1;",
        "if (index < block) begin = middle + 2;",
    ),
    Mutant(
        "rows past the end look at masks",
        KEYS,
        "min(query, static_cast<int>(p.shape.query_len) - 1)",
        "query",
    ),
    # Visitor
    Mutant("the last tile is skipped", VISITOR, "end_ = (any_hi + N - 1) / N;", "end_ = any_hi / N;"),
    Mutant(
        "one whole tile too many", VISITOR, "whole_end_ = all_hi / N;", "whole_end_ = (all_hi + N - 1) / N;"
    ),
    Mutant(
        "one whole tile too many at the front",
        VISITOR,
        "whole_first_ = (all_lo + N - 1) / N",
        "whole_first_ = all_lo / N",
    ),
    Mutant(
        "a tile is visited twice",
        VISITOR,
        "return {whole_first_, end - 1, false};",
        "return {whole_first_, end - 1 + (end < end_), false};",
    ),
    Mutant("nothing is skipped", VISITOR, "first_ = any_lo / N", "first_ = 0"),
    Mutant(
        "tiles without a bias count as whole",
        VISITOR,
        "|| mask.dense.data || p.score.bias.data;",
        "|| p.score.bias.data;",
    ),
    Mutant(
        "tiles that only some blocks fill are whole",
        VISITOR,
        "blocks.tiles[entry] != -1) return false;",
        "false) return false;",
    ),
    Mutant("block lists of the first 16 queries", VISITOR, "query0 + lane_index() * 16);", "query0);"),
    Mutant("ranges of the first 32 queries", VISITOR, "row < M && query0_", "row < 32 && query0_"),
    # What is not finite
    Mutant(
        "NaN in hidden values is felt",
        FORWARD,
        "if constexpr (kPartial) finite = !__syncthreads_or(!guard.finite());",
        "if constexpr (kPartial) __syncthreads();",
    ),
    Mutant("infinite values are dropped", FORWARD, "      guard.add(o);\n", ""),
    Mutant("rows see what is not finite in their neighbour", GUARD, "quad + k % 8 / 2", "quad + k % 4"),
    Mutant("every row sees what is not finite", GUARD, "if (x[mi][j][2 * h + e] != hidden) ", ""),
    Mutant("only the lower half is looked at", GUARD, ": 0x00800080;", ": 0x00000080;"),
    # Stores
    Mutant(
        "rows past the end are stored",
        ACCUMULATORS,
        "row < row0 + 16 * MI && row < rows;",
        "row < row0 + 16 * MI;",
    ),
    Mutant("columns past the end are stored", ACCUMULATORS, "      if (column >= columns) continue;\n", ""),
    Mutant(
        "the last column is not stored",
        ACCUMULATORS,
        "if (column >= columns) continue",
        "if (column + Staging::kPerChunk >= columns) continue",
    ),
    Mutant("the factor of dropout is lost", FORWARD, "static_cast<float>(p.dropout.inverse_keep)", "1.f"),
    Mutant(
        "queries that are not kept are read from the first columns",
        MMA,
        "ldmatrix_x4(a[mi], at.by_rows(tile, mi, k))",
        "ldmatrix_x4(a[mi], at.by_rows(tile, mi, 0))",
        "bf16_192_128",
    ),
)
