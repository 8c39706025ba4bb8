"""Planted defects of the CUDA decoding kernels, which the tests are to notice."""

from __future__ import annotations

from forward_mutants import Mutant

DECODE, ROWS, COPY = (f"cuda/{name}.cuh" for name in ("flash_decode", "decode_rows", "decode_copy"))
SEQUENCE, CODES, MERGED = (f"cuda/{name}.cuh" for name in ("decode_sequence", "decode_codes", "decode_merge"))
PRODUCTS, ROTARY = (f"cuda/{name}.cuh" for name in ("decode_products", "rotary"))
APPEND, MERGE, PLAN = "cuda/decode_append.cu", "cuda/decode_merge.cu", "cuda/decode_plan.h"
CODED, FLOAT = "bf16_128_quantised", "f32_128"

DEFECTS = (
    # Barriers and waits
    (
        "no wait for the keys",
        DECODE,
        "      cp_async_wait<2 * kAhead - 1>();\n      __syncwarp();  // these keys",
        "      __syncwarp();  // these keys",
    ),
    (
        "the keys' lanes do not meet",
        DECODE,
        "__syncwarp();  // these keys are there",
        "// these keys are there",
    ),
    ("keys are overwritten", DECODE, "__syncwarp();  // these keys are read", "// these keys are read"),
    (
        "no wait for the values",
        DECODE,
        "      cp_async_wait<2 * kAhead - 1>();\n      __syncwarp();  // these values",
        "      __syncwarp();  // these values",
    ),
    (
        "the wait for values is too short",
        DECODE,
        "      cp_async_wait<2 * kAhead - 1>();\n      __syncwarp();  // these values",
        "      cp_async_wait<2 * kAhead>();\n      __syncwarp();  // these values",
    ),
    ("values are overwritten", DECODE, "__syncwarp();  // these values are read", "// these values are read"),
    ("queries are read too early", DECODE, "row0, count);\n      __syncthreads();\n", "row0, count);\n"),
    ("outputs overwrite tiles", DECODE, "__syncthreads();  // all tiles are read", "// all tiles are read"),
    (
        "outputs are read too early",
        DECODE,
        "    }\n    __syncthreads();\n\n    constexpr int kQuads",
        "    }\n\n    constexpr int kQuads",
    ),
    (
        "tiles overwrite outputs",
        DECODE,
        "__syncthreads();  // the outputs are read",
        "// the outputs are read",
    ),
    (
        "codes are read before they are wide",
        DECODE,
        "        keys = widened;\n        __syncwarp();",
        "        keys = widened;",
        CODED,
    ),
    (
        "values are read before they are wide",
        DECODE,
        "        values = widened;\n        __syncwarp();",
        "        values = widened;",
        CODED,
    ),
    (
        "values are cleaned while lanes add them",
        DECODE,
        "        guard.add(o);\n        __syncwarp();",
        "        guard.add(o);",
    ),
    # Ranges and tiles
    (
        "a range is one key short",
        DECODE,
        "min(min(key0 + each, sequence.total())",
        "min(min(key0 + each - 1, sequence.total())",
    ),
    ("the last tile is left out", DECODE, "end - key0 + kTile - 1) / kTile", "end - key0) / kTile"),
    ("tiles before the window are read", DECODE, "max(0, begin - key0) / kTile + warp", "warp"),
    ("warps share tiles", DECODE, "tile < last; tile += kWarps", "tile < last; tile += kWarps - 1"),
    ("the block looks at its first row only", DECODE, "rows.keys_end());", "rows.keys_end() - 1);"),
    ("ranges do not begin at the window", SEQUENCE, "return first_key(0); }", "return 0; }"),
    ("one range is missing", SEQUENCE, "(keys + each - 1) / each : 0", "keys / each : 0"),
    ("ranges are of any length", PLAN, "return ceil_div(each, kDecodeTile) * kDecodeTile;", "return each;"),
    (
        "a block does not take the next range",
        DECODE,
        "range < ranges; range += shares",
        "range < ranges; range += ranges",
    ),
    (
        "the next page is that of the same tile",
        DECODE,
        "page = page_in(ahead + kWarps);\n      const Noted now",
        "page = page_in(ahead);\n      const Noted now",
    ),
    (
        "tiles take turns wrongly",
        DECODE,
        "turn + 1 < kAhead ? turn + 1 : 0)",
        "turn + 1 < kAhead ? turn + 1 : kAhead - 1)",
    ),
    # What is seen
    ("the own position is hidden", ROWS, "key > position_[h]", "key >= position_[h]"),
    ("windows are one key too wide", ROWS, "key < first[h]", "key + 1 < first[h]"),
    ("pages that are not there are seen", ROWS, " || !(there >> n & 1)", ""),
    (
        "tiles count as seen by all",
        ROWS,
        "end <= sequence_.position(first_query_) + 1;",
        "end <= sequence_.position(last_query_) + 1;",
    ),
    (
        "windows of later queries are forgotten",
        ROWS,
        "sequence_.first_key(last_query_) <= begin",
        "sequence_.first_key(first_query_) <= begin",
    ),
    ("NaN of hidden values is felt", DECODE, "const bool finite = !cut ||", "const bool finite = true ||"),
    (
        "hidden keys are copied",
        COPY,
        "    const bool exists = places.there >> row & 1;\n      UNROLL",
        "    const bool exists = true;\n      UNROLL",
    ),
    (
        "rows are heads of the next query",
        ROWS,
        "kv_head * group + row % group, query = row / group",
        "kv_head * group + row / group, query = row % group",
    ),
    # Addresses
    ("pages are not looked up", SEQUENCE, "p_.table.at(batch_,", "p_.table.at(0,"),
    (
        "pages beyond the pool are read",
        SEQUENCE,
        "0 <= page && page < min_i64(p_.page_count, std::numeric_limits<int>::max())",
        "0 <= page",
    ),
    ("negative pages are read", SEQUENCE, "return 0 <= page && page <", "return page <"),
    (
        "lengths beyond the cache",
        SEQUENCE,
        "min_i64(p.given_lengths.at(batch), p.room)",
        "p.given_lengths.at(batch)",
    ),
    ("negative lengths", SEQUENCE, "max_i64(0, min_i64(", "max_i64(-50, min_i64("),
    (
        "rows of a page are mixed up",
        COPY,
        "places.row * cache_.stride_row",
        "(places.row ^ 1) * cache_.stride_row",
    ),
    ("heads are mixed up", COPY, "head_ * cache_.stride_head", "(head_ ^ 1) * cache_.stride_head"),
    ("the swizzle is not that of the products", COPY, "(to ^ pass % 2 << 6)", "(to ^ 0)"),
    (
        "missing columns are left as they are",
        COPY,
        "    if (!in_chunks_) return;\n    UNROLL",
        "    return;\n    UNROLL",
    ),
    ("odd rows are copied in chunks", COPY, "in_chunks_ = odd == 0;", "in_chunks_ = true;"),
    (
        "elements that are not there are read",
        COPY,
        "column < columns_ && there >> row & 1",
        "column < columns_",
    ),
    # Scores, codes, rotary embedding
    ("softcap is not multiplied back", ROWS, "p_.score_cap * fast_tanh", "fast_tanh"),
    (
        "slopes in units of e",
        ROWS,
        "static_cast<float>(slopes[own(1).head]) * static_cast<float>(kLog2E)",
        "static_cast<float>(slopes[own(1).head])",
    ),
    (
        "slopes of one sequence",
        ROWS,
        "p_.score.alibi_slopes + batch_ * p_.score.alibi_stride_batch",
        "p_.score.alibi_slopes",
    ),
    ("signs of codes", CODES, "(four ^ 0x80808080)", "four", CODED),
    (
        "scales of the wrong keys",
        CODES,
        "8 * j + lane_index() % 4 * 2 + e)",
        "8 * j + lane_index() % 4 * 2)",
        CODED,
    ),
    ("keys are not scaled", DECODE, "scale_columns(s, now.key_scale);", "(void)0;", CODED),
    (
        "outputs are not moved with the largest scale",
        CODES,
        "factor = largest_ / moved;",
        "factor = 1.f;",
        CODED,
    ),
    ("scales of pages of other heads", DECODE, "* kv_heads + kv_head]", "* kv_heads]", CODED),
    ("queries are not turned", DECODE, "if (!p.rotary.cos.data) continue;", "continue;"),
    (
        "keys are turned by the wrong angle",
        APPEND,
        "turned(p.rotary, position,",
        "turned(p.rotary, position - token,",
    ),
    ("turned the wrong way", ROTARY, "a * cos - b * sin", "a * cos + b * sin"),
    ("interleaved pairs are apart", ROTARY, "rotary.interleaved ? 1 : half", "half"),
    (
        "columns of values are turned",
        APPEND,
        "value_place + column, value(column))",
        "value_place + column, turned(p.rotary, position, column, value))",
    ),
    (
        "appended rows follow each other in memory",
        APPEND,
        "sequence.row(position) * cache",
        "(sequence.row(sequence.length()) + token) * cache",
    ),
    ("appended to pages that are not there", APPEND, "  if (page < 0) return;\n", ""),
    ("a scale of zero is divided by", APPEND, "scale == 0.f ? 0.f : x / scale", "x / scale", CODED),
    # Merges
    ("parts are not weighed", MERGED, "weight(part.m) * part.l / l", "part.l / l"),
    ("the residual is lost", MERGED, "l = exp2f(row.residual);", "l = 1.f;", FLOAT),
    ("sinks count for each lane", MERGE, "p.score.sinks && lane == 0", "p.score.sinks"),
    ("sinks of another head", MERGE, "p.score.sinks[head]", "p.score.sinks[head ^ 1]"),
    (
        "ranges beyond 32 are left out",
        MERGE,
        "for (int first = 0; first < ranges; first += 32)",
        "for (int first = 0; first < min(ranges, 32); first += 32)",
    ),
    ("states of half the lanes", MERGE, "int apart = 16; apart > 0", "int apart = 8; apart > 0"),
    (
        "a warp's part is left out",
        DECODE,
        "UNROLL for (int w = 0; w < kWarps; ++w) {\n        const unsigned char",
        "UNROLL for (int w = 1; w < kWarps; ++w) {\n        const unsigned char",
    ),
    (
        "columns beyond the value are written",
        MERGE,
        "if (column < shape.value_dim) store_number",
        "store_number",
    ),
    # Plain arithmetic
    (
        "the second half of the rows is left out",
        PRODUCTS,
        "if (rows_ > 8) scores_of<2>",
        "if (rows_ > 9) scores_of<2>",
        FLOAT,
    ),
    ("columns of keys are left out", PRODUCTS, "(p.shape.head_dim + 3) / 4", "(p.shape.head_dim) / 4", FLOAT),
    (
        "columns of values are left out",
        PRODUCTS,
        "if (8 * c >= value_columns_) break;",
        "if (8 * c + 16 >= value_columns_) break;",
        FLOAT,
    ),
)
MUTANTS = tuple(Mutant(*defect[:4], *(defect[4:] or ("bf16_64",))) for defect in DEFECTS)
