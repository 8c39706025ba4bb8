"""Planted defects of the CUDA backward kernels, which the tests are to notice."""

from __future__ import annotations

from functools import partial

from forward_mutants import Mutant

KEY, QUERY, BIAS = (f"cuda/flash_{name}_gradient.cuh" for name in ("key", "query", "bias"))
MEETINGS, WALK, GRADIENT, BITS = (
    f"cuda/{name}.cuh" for name in ("meetings", "tile_walk", "score_gradient", "tile_bits")
)
ROWS, STEPS = "cuda/backward_rows.cuh", "cuda/backward_steps.cu"

plain, single, halves = (
    partial(Mutant, variant=name) for name in ("bf16_64", "f32_256", "bf16_192_modified")
)

MUTANTS = (
    # Barriers and waits
    plain(
        "no barrier before the queries of a tile are read",
        KEY,
        "    __syncthreads();  // these queries are there; those",
        "    // those",
    ),
    plain(
        "no wait for the queries of a tile",
        KEY,
        "    cp_async_wait<0>();\n    __syncthreads();  // these queries are there",
        "    __syncthreads();  // these queries are there",
    ),
    Mutant(
        "the first tiles are fetched before they are known", KEY, "  __syncthreads();  // the first", "  //"
    ),
    single(
        "queries are overwritten while they are read",
        KEY,
        "      __syncthreads();  // these queries are read\n",
        "",
    ),
    plain(
        "gradients are staged before all copies have arrived",
        KEY,
        "  cp_async_wait<0>();\n  __syncthreads();\n\n  const BlockTile of",
        "  cp_async_wait<0>();\n\n  const BlockTile of",
    ),
    Mutant("bits are read before they are written", KEY, "      else __syncthreads();\n", ""),
    Mutant(
        "queries are cleaned while they are multiplied",
        KEY,
        "      if (finite) return;\n      __syncthreads();\n",
        "      if (finite) return;\n",
    ),
    Mutant(
        "queries are read before they are clean",
        KEY,
        "      grad_guard.clean();\n      __syncthreads();\n",
        "      grad_guard.clean();\n",
    ),
    plain(
        "no barrier before the keys of a tile are read",
        QUERY,
        "    __syncthreads();  // these keys and values are there;",
        "    //",
    ),
    plain(
        "no wait for the keys of a tile",
        QUERY,
        "    cp_async_wait<0>();\n    __syncthreads();  // these keys",
        "    __syncthreads();  // these keys",
    ),
    plain(
        "the gradient is staged before all copies have arrived",
        QUERY,
        "  __syncthreads();  // all copies have arrived",
        "  // all copies have arrived",
    ),
    plain(
        "terms of the first warp's rows",
        QUERY,
        "first_row + row0 + mi * 16 + Place::first_query()",
        "first_row + mi * 16 + Place::first_query()",
    ),
    single(
        "keys are overwritten while they are read",
        QUERY,
        "      __syncthreads();  // these keys and values are read\n",
        "",
    ),
    Mutant(
        "a tile of a bias is multiplied before it is there",
        BIAS,
        "    cp_async_wait<0>();\n    __syncthreads();\n",
        "    cp_async_wait<0>();\n",
    ),
    Mutant(
        "a tile of a bias is overwritten while it is read",
        BIAS,
        "if (!__syncthreads_or(any != 0)) continue;",
        "if (threadIdx.x == kThreads) continue;",
    ),
    # Tiles and copies
    plain(
        "rows past the end are read", WALK, "(tile + 1) * kRows > whole_rows_", "tile * kRows > whole_rows_"
    ),
    plain(
        "columns past the end are read",
        WALK,
        "all_columns ? static_cast<int>(kOfQueries ? shape.query_len : shape.kv_len) : 0",
        "static_cast<int>(kOfQueries ? shape.query_len : shape.kv_len)",
    ),
    plain(
        "rows of queries count where those of keys are clipped",
        WALK,
        "kOfQueries ? shape.query_len : shape.kv_len",
        "shape.query_len",
    ),
    plain("rows of the first tile", WALK, "second_row + start_of_tile(second(a), tile)", "second_row"),
    plain(
        "a chunk of another row",
        "cuda/tile.cuh",
        "thread / Tile::kSpan * row_bytes(tensor)",
        "thread % Tile::kSpan * row_bytes(tensor)",
    ),
    plain("tiles are not moved to their stage", "cuda/mma.cuh", "result.rows += by, ", ""),
    Mutant(
        "terms of the first rows",
        KEY,
        "from.terms + threadIdx.x * 4",
        "a.rows.terms + threadIdx.x * 4",
    ),
    plain(
        "terms of the other stage",
        KEY,
        "shared0 + F::kRows + stage * F::kRowsBytes + threadIdx.x * 16",
        "shared0 + F::kRows + (F::kStages - 1 - stage) * F::kRowsBytes + threadIdx.x * 16",
    ),
    Mutant("the first stage always", KEY, "F::kStages == 1 ? 0 : turn % 2;", "0;"),
    Mutant(
        "keys in place of values",
        KEY,
        "own_values(value_tile, F::kValueTile)",
        "own_values(value_tile, F::kKeyTile)",
    ),
    Mutant(
        "queries in place of gradients", KEY, "grad_at = query_at + F::kGradOutTile", "grad_at = query_at"
    ),
    Mutant("keys in place of values", QUERY, "value_at = key_at + F::kValueTile", "value_at = key_at"),
    # Heads and rows
    Mutant("query head of the key head", KEY, "head0 = own.head * group", "head0 = own.head"),
    Mutant(
        "the first head of a group only",
        KEY,
        "walk.start(a, own, 0, head0, group,",
        "walk.start(a, own, 0, head0, 1,",
    ),
    Mutant("gradients of batch 0", KEY, "head_of<T>(to, of.batch, of.head)", "head_of<T>(to, 0, of.head)"),
    Mutant(
        "key head of the query head",
        WALK,
        "first_head / (of_batch / static_cast<int>(shape.kv_heads))",
        "first_head % static_cast<int>(shape.kv_heads)",
    ),
    Mutant("rows of the first warp", QUERY, "own0 = at.tile * M + row0", "own0 = at.tile * M"),
    Mutant(
        "key head of a bias",
        BIAS,
        "kv_head = head / static_cast<int>(shape.heads / shape.kv_heads)",
        "kv_head = head % static_cast<int>(shape.kv_heads)",
    ),
    # Factors and terms
    Mutant("no scale of keys", KEY, "store(dk, a.scale,", "store(dk, 1.f,"),
    Mutant("no factor of dropout in values", KEY, "store(dv, a.inverse_keep,", "store(dv, 1.f,"),
    halves("no factor of dropout in values alone", KEY, "store(dv, a.inverse_keep,", "store(dv, 1.f,"),
    Mutant("dropped weights count in values", KEY, "      modified.drop(left);\n", ""),
    Mutant("no slope of the softcap in keys", KEY, "      modified.through_softcap(s);\n", ""),
    halves("no slope of the softcap in keys alone", KEY, "      modified.through_softcap(s);\n", ""),
    Mutant(
        "weights in place of gradients of scores",
        KEY,
        "product_pb(dk, dp, queries",
        "product_pb(dk, s, queries",
    ),
    plain(
        "deltas of two queries swapped",
        KEY,
        "[0] = quad.x, dp[mi][j][1] = quad.y",
        "[0] = quad.y, dp[mi][j][1] = quad.x",
    ),
    plain(
        "keys never precise",
        KEY,
        "F::kAlwaysPrecise || (kIsPartial && walk.at(turn).is_precise());",
        "F::kAlwaysPrecise;",
    ),
    Mutant(
        "kept of the first 16 keys",
        KEY,
        "bits.kept(Place::first_query() + Place::query_offset(q), row0)",
        "bits.kept(Place::first_query() + Place::query_offset(q), 0)",
    ),
    Mutant("no scale of queries", QUERY, "dq[mi][j][2 * h + e] *= a.scale;", "dq[mi][j][2 * h + e] *= 1.f;"),
    Mutant("no slope of the softcap in queries", QUERY, "      modified.through_softcap(s);\n", ""),
    plain(
        "deltas of rows 8 apart mixed",
        QUERY,
        "make_float4(upper, upper, lower, lower)",
        "make_float4(upper, lower, upper, lower)",
    ),
    plain(
        "normalizer of the row 8 before",
        QUERY,
        "terms[RowTerms::normalizer(row + 8)]",
        "terms[RowTerms::normalizer(row)]",
    ),
    Mutant(
        "deltas of the first 16 rows",
        QUERY,
        "const float4 delta = deltas[own_pair + mi * 8];",
        "const float4 delta = deltas[own_pair];",
        "bf16_128_long",
    ),
    plain(
        "queries never precise",
        QUERY,
        "F::kAlwaysPrecise || (kIsPartial && walk.at(turn).is_precise());",
        "F::kAlwaysPrecise;",
    ),
    # What weights and gradients of scores are
    Mutant("no residual", GRADIENT, "(p - normalizer.x) - normalizer.y", "p - normalizer.x", "f32_32"),
    Mutant(
        "normalizers of rows that do not exist", GRADIENT, "row < rows_ ? lse_[row] : -INFINITY", "lse_[row]"
    ),
    Mutant("rows that see nothing weigh", GRADIENT, "lse == -INFINITY ? make_float2(INFINITY, 0.f) : ", ""),
    Mutant(
        "what is hidden is multiplied",
        GRADIENT,
        "kPartial && weight == 0.f ? 0.f : weight * ds",
        "weight * ds",
    ),
    Mutant(
        "no factor of dropout in gradients",
        GRADIENT,
        "keeps(q, k) ? ds * a_.inverse_keep : 0.f",
        "keeps(q, k) ? ds : 0.f",
    ),
    Mutant(
        "dropped pairs have a gradient of weights",
        GRADIENT,
        "keeps(q, k) ? ds * a_.inverse_keep : 0.f",
        "ds * a_.inverse_keep",
    ),
    Mutant(
        "dropped pairs have no gradient",
        GRADIENT,
        "      ds += minus_delta(q);\n",
        "      if (keeps(q, k) || !a_.params.dropout.enabled()) ds += minus_delta(q);\n",
    ),
    Mutant("kept keys of another query", GRADIENT, "kept(q) << (q * Place::kKeys)", "kept(q) << (q * 2)"),
    Mutant("slopes of two keys swapped", GRADIENT, "16 * (pair % 2)", "16 * (1 - pair % 2)"),
    # Bits of a tile
    Mutant("keys 8 apart are neighbours", BITS, "(word >> 1 & 2)", "(word & 2)"),
    Mutant("bits of rows past the end", BITS, "min(query0 + row, last)", "query0 + row"),
    Mutant("bits of the first 16 keys", BITS, "(2 * (row0 / 8) + key % 2)", "(key % 2)"),
    Mutant("bits of even keys", BITS, "(2 * (row0 / 8) + key % 2)", "(2 * (row0 / 8))"),
    Mutant("kept bits one too low", BITS, "key0) << 16;", "key0) << 15;"),
    # Meetings
    Mutant("meetings of head 0", WALK, "(lists.heads > 1 ? first_head : 0)", "0"),
    Mutant("meetings of batch 0", WALK, "(lists.batch > 1 ? batch : 0)", "0"),
    Mutant(
        "meetings of the first head of a group",
        WALK,
        "        if (lists.heads > 1) of_head += lists.per_head();\n",
        "",
    ),
    Mutant("rows of the first head of a group", WALK, "row += a.rows.padded, ", "", "bf16_64"),
    Mutant(
        "gradients of the first head of a group",
        WALK,
        ", second_row += bytes(second(a).stride_head);",
        ";",
        "bf16_64",
    ),
    Mutant("32 tiles at most", WALK, "++chunk * 32 >= tiles", "++chunk >= 1"),
    Mutant(
        "partial tiles are whole",
        WALK,
        "partial = __ballot_sync(kAllLanes, meeting == kPartial);",
        "partial = 0;",
    ),
    Mutant("no tile is whole", MEETINGS, "run.partial ? kPartial : kWhole", "kPartial"),
    Mutant(
        "tiles between runs are not written",
        MEETINGS,
        "    write(run.last + 1, kApart);\n",
        "    written = run.last + 1;\n",
    ),
    Mutant("tiles before the first run are not written", MEETINGS, "  write(0, kApart);\n", ""),
    Mutant(
        "meetings are not transposed",
        MEETINGS,
        "(kOfKeys ? tile : static_cast<int64_t>(tile) * key_tiles)",
        "static_cast<int64_t>(tile) * key_tiles",
    ),
    Mutant("tiles of two turns share a place", WALK, "kSlots = 4", "kSlots = 2"),
    plain("precise tiles are not treated as partial", WALK, "        partial |= precise;\n", ""),
    plain(
        "precise by the rows of another tile",
        WALK,
        "kOfQueries ? row + static_cast<int64_t>(tile) * kRows : row;",
        "row;",
    ),
    Mutant(
        "the last of 32 tiles is lost",
        WALK,
        "meet &= meet - 1;",
        "meet = (meet & (meet - 1)) & 0x7fffffffu;",
    ),
    # Rows
    Mutant("no gradient of lse", ROWS, "    delta -= grad_lse;\n", ""),
    Mutant(
        "a sum over half of the lanes", ROWS, "int other = 1; other < kLanes", "int other = 2; other < kLanes"
    ),
    Mutant("delta has the other sign", ROWS, "+ 2] = -delta;", "+ 2] = delta;"),
    Mutant(
        "terms of a row one block of rows too early",
        ROWS,
        "terms[RowTerms::normalizer(row)] = normalizer;",
        "terms[RowTerms::normalizer(row % 64)] = normalizer;",
        "bf16_64",
    ),
    Mutant(
        "terms of unpadded heads",
        ROWS,
        "head_row * a.rows.padded * RowTerms::kFloats",
        "head_row * shape.query_len * RowTerms::kFloats",
    ),
    Mutant(
        "large normalizers are rounded",
        ROWS,
        "kLargestRounded = 1 << 10",
        "kLargestRounded = 1 << 30",
        "bf16_64",
    ),
    Mutant("sinks feel rows without keys", ROWS, "(out_is_zero ? -grad_lse : delta)", "delta"),
    Mutant("sinks of rows that see nothing", ROWS, "weight == 0.f ? 0.f : -weight", "-weight"),
    # Biases and sinks
    Mutant("every split sums to the end", BIAS, "end = steps * (split + 1) / a.bias.splits", "end = steps"),
    Mutant(
        "a row's sum over half of a quad", BIAS, "      total += __shfl_xor_sync(kAllLanes, total, 1);\n", ""
    ),
    Mutant("a column's sum over one warp", BIAS, "warp < F::kWarps", "warp < 1"),
    Mutant("rows past the end are stored", BIAS, "    if (query >= shape.query_len) continue;\n", ""),
    Mutant("columns past the end are stored", BIAS, "key < shape.kv_len;", "true;"),
    Mutant("partial sums of the first split", BIAS, "split * p.grad_bias_elements", "0"),
    Mutant(
        "column sums are read before they are there",
        BIAS,
        "    __syncthreads();\n    const int keys",
        "    const int keys",
    ),
    Mutant("the first split only", STEPS, "split * elements + i", "i"),
    Mutant("sinks of batch 0", STEPS, "batch < shape.batch", "batch < 1"),
    Mutant(
        "no barrier between sums of sinks",
        STEPS,
        "    __syncthreads();\n  }\n  if (threadIdx.x == 0) a.params",
        "  }\n  if (threadIdx.x == 0) a.params",
    ),
    # What is not finite
    Mutant("queries that are not finite are multiplied", KEY, "      query_guard.clean();\n", ""),
    Mutant("gradients that are not finite are multiplied", KEY, "      grad_guard.clean();\n", ""),
    Mutant("gradients that are not finite are lost", KEY, "        grad_guard.add(dv);\n", ""),
    Mutant(
        "every key sees what is not finite", KEY, "grad_guard.see(left, 0.f)", "grad_guard.see(left, 1e30f)"
    ),
    Mutant("keys that are not finite are multiplied", QUERY, "      guard.clean();\n", ""),
)
