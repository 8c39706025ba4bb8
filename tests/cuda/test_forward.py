"""Every CUDA forward kernel against float64, on and off its tiles' edges; which call gets which kernel."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_problems import DTYPES, make_cuda_options
from emulated import A100, SM_75, Device, emulated
from forward_variants import BY_NAME, ELEMENTS, ONE_PROCESSOR, VARIANTS, Variant
from problems import (
    BIAS_SHAPES,
    BLOCK_SIZES,
    FEATURES,
    GROUPS,
    MASKS,
    make_bias,
    make_block_mask,
    make_inputs,
)
from test_bindings import forward_arguments
from test_varlen import LENGTHS, block_diagonal, check_varlen, cu_seqlens
from test_varlen import MASKS as PACKED_MASKS

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, SlidingWindow, _ops
from attn_ext.testing import check_attention

SM_86 = Device(arch=86, shared_memory=99 << 10, processors=84)
MODIFIERS = tuple(feature for feature in FEATURES if feature != "sinks")  # of scores or weights


def kernels(running: Any) -> list[str]:
    """The names of the forward variants that ran."""
    names = (launch["kernel"] for launch in running.statistics()["launches"])
    return [name.removeprefix("flash_forward_") for name in names if name.startswith("flash_forward_")]


def off_edge(tile: int, tiles: int, offset: int) -> int:
    return max(1, tile * tiles + offset)


# Lengths as (tiles, rows more), head dims as columns less.
EDGES = ((0, 1), (1, -1), (1, 0), (1, 1), (0, 7), (1, 9))


@pytest.mark.sample(
    10 * len(VARIANTS),
    variant=tuple(variant.name for variant in VARIANTS),
    queries=EDGES,
    keys=(*EDGES, (2, -9), (2, 0), (3, 1)),
    heads=((1, 1), (2, 2), (2, 1)),  # and of how many queries each key head is
    batch=(1, 2),
    columns=((0, 0), (8, 0), (0, 8), (3, 15), (24, 31)),
    mask=(*((mask,) for mask in MASKS), ("causal", "blocks"), ("window", "key_lengths"), ()),
    feature=(*((feature,) for feature in FEATURES), ("bias", "alibi", "dropout"), ()),
    seed=tuple(range(10)),
)
def test_tiles(case: SimpleNamespace) -> None:
    """Of every variant; backward is that of the CPU, given what the kernel left."""
    variant, (heads, group) = BY_NAME[case.variant], case.heads
    sizes = case.batch, heads, off_edge(variant.queries, *case.queries), off_edge(variant.keys, *case.keys)
    head_dim, value_dim = variant.key_columns - case.columns[0], variant.value_columns - case.columns[1]
    inputs = make_inputs(*sizes, head_dim, value_dim=value_dim, group=group, dtype=variant.dtype)
    features = case.feature if variant.modified else set(case.feature) - set(MODIFIERS)
    options = make_cuda_options((*case.mask, *features), *sizes)
    with emulated(variant=variant.name, seed=case.seed) as running:
        check_attention(*inputs, **options)
        assert kernels(running) == [variant.name]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_selected_for_heads_of_its_size(variant: Variant) -> None:
    inputs = make_inputs(
        1,
        1,
        2 * variant.queries,
        1,
        variant.key_columns,
        value_dim=variant.value_columns,
        dtype=variant.dtype,
    )
    with emulated(device=variant.device) as running:
        attn_ext.attention(*inputs, softcap=5.0 if variant.modified else None)
        assert kernels(running) == [variant.name]
        assert running.statistics()["launches"][0]["dynamic_shared_bytes"] == variant.shared_bytes


@pytest.mark.parametrize(
    ("element", "columns", "device", "options", "name"),
    [
        ("bf16", (32, 32), A100, {}, "32"),
        ("bf16", (33, 32), A100, {}, "64"),
        ("f16", (16, 57), A100, {}, "64"),
        ("f16", (80, 80), A100, {}, "96"),
        ("bf16", (97, 33), A100, {}, "128"),
        ("bf16", (192, 128), A100, {}, "192_128"),
        ("bf16", (192, 129), A100, {}, "192"),
        ("bf16", (128, 192), A100, {}, "192"),
        ("f16", (193, 8), A100, {}, "256"),
        ("f32", (8, 8), A100, {}, "32"),
        ("f32", (65, 8), SM_86, {}, "128"),
        ("f32", (200, 200), SM_86, {}, "256"),
        ("f16", (256, 256), SM_75, {}, "256"),
        ("f16", (64, 64), A100, {"scale": -1.0}, "64_modified"),
        ("f16", (64, 64), A100, {"scale": 0.0}, "64_modified"),
        ("f16", (64, 64), A100, {"bias": torch.zeros(1)}, "64_modified"),
        ("f16", (64, 64), A100, {"alibi_slopes": torch.ones(1)}, "64_modified"),
        ("f16", (64, 64), A100, {"dropout_p": 0.5, "dropout_seed": 1}, "64_modified"),
        ("f16", (64, 64), A100, {"sinks": torch.zeros(1), "mask": Causal()}, "64"),
        ("bf16", (64, 64), ONE_PROCESSOR, {}, "64_long"),
        ("bf16", (128, 128), ONE_PROCESSOR, {}, "128_long"),
        ("bf16", (128, 128), ONE_PROCESSOR, {"softcap": 1.0}, "128_modified"),
    ],
)
def test_selector(
    element: str, columns: tuple[int, int], device: Device, options: dict[str, Any], name: str
) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[element]
    inputs = make_inputs(1, 1, 256, 3, columns[0], value_dim=columns[1], dtype=dtype)
    with emulated(device=device) as running:
        check_attention(*inputs, **options, grad=False)
        assert kernels(running) == [f"{element}_{name}"]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        (A100, torch.float16, 257, "heads of this size are not supported on this CUDA device"),
        (A100, torch.float32, 257, "heads of this size"),
        (SM_75, torch.float32, 129, "heads of this size"),
        (SM_75, torch.bfloat16, 64, "bfloat16 needs compute capability 8.0"),
        (SM_86._replace(arch=70), torch.float16, 64, "before compute capability 7.5"),
        (A100, torch.float64, 64, "float64 is not computed on CUDA devices"),
    ],
)
def test_unsupported(device: Device, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    inputs = make_inputs(1, 1, 4, 4, head_dim, dtype=dtype)
    with emulated(device=device), pytest.raises(NotImplementedError, match=reason):
        attn_ext.attention(*inputs)


def test_a_bias_of_float64_is_refused() -> None:
    with emulated(), pytest.raises(NotImplementedError, match="a bias of float64 is not read on CUDA"):
        attn_ext.attention(*make_inputs(1, 1, 4, 4), bias=torch.zeros(4).double())


# Masks


@pytest.mark.sample(
    21,
    query_block=BLOCK_SIZES,
    kv_block=BLOCK_SIZES[::-1],
    dtype=DTYPES,
    query_len=(1, 65, 130, 200),
    kv_len=(64, 129, 257, 300),
    broadcast=((1, 1), (2, 1), (1, 4), (2, 4)),
    density=(0.2, 0.5, 0.9),
    partial=(0.0, 0.5, 1.0),
    rule=(None, Causal(), SlidingWindow(70, 3), KeyLengths([33, 110])),
)
def test_blocks(case: SimpleNamespace) -> None:
    sizes = *case.broadcast, case.query_len, case.kv_len
    mask = make_block_mask(sizes, (case.query_block, case.kv_block), case.density, case.partial)
    mask = mask if case.rule is None else mask & case.rule
    inputs = make_inputs(2, 4, case.query_len, case.kv_len, 16, group=2, dtype=case.dtype)
    with emulated():
        check_attention(*inputs, mask=mask, grad=False)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("number", [-(2**40), -(2**31) - 1, -(2**31), -1, 2**31 - 1, 2**31, 2**32 + 1, 2**40])
def test_block_offsets_of_any_size(number: int, where: int) -> None:
    """Nobody checks them before the kernel, which brings them to what there is."""
    query, key, value = make_inputs(1, 1, 32, 64, 16)
    blocks = make_block_mask((1, 1, 32, 64), (16, 16), 0.6).blocks
    offsets = blocks.offsets.clone()
    offsets[..., where] = number
    with emulated():
        forward = torch.ops.attn_ext_emulated.attention_forward.default
        options = _ops.Options(scale=0.5)._asdict() | {
            "block_offsets": offsets,
            "block_indices": blocks.indices,
            "block_tiles": blocks.tiles,
            "block_bits": blocks.bits,
        }
        assert forward(query=query, key=key, value=value, **options)[0].isfinite().all()


@pytest.mark.parametrize("group", GROUPS)
def test_groups(group: int) -> None:
    inputs = make_inputs(2, 2 * group, 5, 19, 32, group=group, dtype=torch.bfloat16)
    with emulated():
        check_attention(*inputs)


@pytest.mark.sample(
    26,
    lengths=tuple(LENGTHS)[2:],
    mask=tuple(PACKED_MASKS),
    dtype=DTYPES,
    group=(1, 2),
    options=(
        {},
        {"sinks": torch.linspace(-2, 2, 2)},
        {"dropout_p": 0.3, "dropout_seed": 7},
        {"softcap": 3.0},
    ),
)
def test_packed_sequences(case: SimpleNamespace) -> None:
    lengths = [part[:12] for part in LENGTHS[case.lengths]]
    packed, each = PACKED_MASKS[case.mask](*lengths)
    inputs = make_inputs(1, 2, sum(lengths[0]), sum(lengths[1]), 24, group=case.group, dtype=case.dtype)
    with emulated():
        check_varlen(*lengths, packed, each, inputs, **case.options, grad=False)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_alibi_of_packed_sequences(per_sequence: bool) -> None:
    """Positions are those within each sequence, which no formula of the packed index gives."""
    lengths_q, lengths_k = [16, 3, 40, 1], [90, 20, 40, 33]
    query, key, value = make_inputs(1, 2, sum(lengths_q), sum(lengths_k), 32, group=2, dtype=torch.float16)
    slopes = torch.rand(4, 2) if per_sequence else torch.rand(2)
    bias = torch.zeros(1, 2, sum(lengths_q), sum(lengths_k))
    row, column = 0, 0
    for index, (q, k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        distance = (torch.arange(q)[:, None] + k - q - torch.arange(k)).abs()
        slope = slopes[index] if per_sequence else slopes
        bias[0, :, row : row + q, column : column + k] = -slope[:, None, None] * distance
        row, column = row + q, column + k

    def attention(*tensors: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (tensor.squeeze(0).transpose(0, 1) for tensor in tensors)
        packed_lengths = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
        out, lse = attn_ext.attention_varlen(
            *tokens, *packed_lengths, alibi_slopes=slopes, mask=Causal("bottom_right"), return_lse=True
        )
        return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    mask = block_diagonal(lengths_q, lengths_k, [Causal("bottom_right")] * 4)
    with emulated():
        check_attention(query, key, value, mask=mask, bias=bias, attention=attention, grad=False)


# Scores and weights


@pytest.mark.sample(
    24,
    full=BIAS_SHAPES,
    bias_dtype=DTYPES,
    dtype=DTYPES,
    mask=("bias", "boolean"),
    sizes=((2, 4, 35, 70), (1, 2, 64, 129), (3, 2, 1, 65)),
)
def test_what_broadcasts(case: SimpleNamespace) -> None:
    inputs = make_inputs(*case.sizes, 24, group=2, dtype=case.dtype)
    bias = make_bias(case.sizes, case.full, case.bias_dtype)
    with emulated():
        if case.mask == "bias":
            check_attention(*inputs, bias=bias)
        else:
            check_attention(*inputs, mask=Dense(bias != -torch.inf))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-7, 1e-4, 0.5, 1.0])
def test_dropout(p: float, dtype: torch.dtype) -> None:
    """What is dropped is what the CPU drops, as the gradients see."""
    inputs = make_inputs(2, 4, 67, 99, 16, group=2, dtype=dtype)
    for seed in (5, 2**62 + 3):
        with emulated():
            check_attention(*inputs, dropout_p=p, dropout_seed=seed)
            kept = attn_ext.attention(*inputs, dropout_p=p, dropout_seed=seed)
        assert p < 1 or not kept.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [30.0, -1e3, 1e4])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_scores(dtype: torch.dtype, magnitude: float, causal: bool) -> None:
    """The gradients need what rounding lse lost: its unit in the last place is a factor in every weight."""
    inputs = make_inputs(1, 2, 70, 150, 32, dtype=dtype)
    options = {"mask": Causal("bottom_right") if causal else None, "scale": magnitude}
    # What fp16 can represent of gradients that are as large as the scale.
    lse = dtype != torch.float16 or magnitude < 1e4
    with emulated():
        check_attention(*inputs, **options, grad=False)
        check_attention(*inputs, **options, grad_out=torch.randn(1, 2, 70, 32, dtype=dtype) / 64, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sink", [1.0, -1.0])
def test_sinks_of_the_largest_numbers(dtype: torch.dtype, sink: float) -> None:
    """As large as fp32 allows: they stay finite, and alone in a row they are its lse."""
    inputs = make_inputs(1, 2, 5, 40, 16, dtype=dtype)
    sinks = torch.full((2,), sink * torch.finfo(torch.float32).max)
    expected = attn_ext.attention(*inputs, mask=KeyLengths([0]), sinks=sinks, return_lse=True)
    with emulated():
        actual = attn_ext.attention(*inputs, mask=KeyLengths([0]), sinks=sinks, return_lse=True)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bias", "scores"])
def test_largest_values_under_huge_scores(dtype: torch.dtype, kind: str) -> None:
    """All keys weigh the same, below a maximum whose last place is more than what keeps sums small."""
    query, key, _ = make_inputs(1, 2, 20, 48, 16, dtype=dtype)
    value = torch.full_like(key, 0.9 * torch.finfo(dtype).max)
    options: dict[str, Any] = {"bias": torch.full((1, 1, 1, 48), torch.finfo(torch.float32).min)}
    if kind == "scores":
        query, key, options = torch.full_like(query, 1e4), torch.full_like(key, 1e4), {"scale": 1.0}
    with emulated():
        out = attn_ext.attention(query, key, value, **options)
    assert (out.bfloat16() == value[0, 0, 0, 0].bfloat16()).all()


def test_blocks_beyond_32_bits() -> None:
    """The last block of the longest sequence would end where an int has wrapped."""
    kv_len, block = 2**31 - 2000, 1 << 16
    query, key, value = make_inputs(1, 1, 1, 1, 16, dtype=torch.float16)
    key, value = (x.expand(1, 1, kv_len, 16) for x in (key, value))
    arguments = forward_arguments(
        query=query,
        key=key,
        value=value,
        block_offsets=torch.tensor([[[0, 1]]]),
        block_indices=torch.tensor([kv_len // block], dtype=torch.int32),
        block_tiles=torch.tensor([-1], dtype=torch.int32),
        block_bits=torch.zeros(0, block, 2, dtype=torch.uint8),
    )
    with emulated():
        out, *_ = torch.ops.attn_ext_emulated.attention_forward.default(**arguments)
    assert torch.equal(out, value[:, :, :1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_of_many_keys(dtype: torch.dtype) -> None:
    with emulated():
        check_attention(*make_inputs(1, 2, 3, 2000, 32, dtype=dtype))


# The same bits


def options_of_everything(sizes: tuple[int, ...]) -> dict[str, Any]:
    batch, heads, query_len, kv_len = sizes
    mask = KeyLengths([kv_len, kv_len // 3]) & (SlidingWindow(50, 9) | attn_ext.Prefix(4))
    return {
        "mask": mask & make_block_mask((1, heads, query_len, kv_len), (32, 48), 0.8),
        "bias": torch.randn(batch, 1, query_len, kv_len),
        "sinks": torch.randn(heads),
        "alibi_slopes": torch.rand(batch, heads),
        "softcap": 20.0,
        "dropout_p": 0.4,
        "dropout_seed": 3,
    }


@pytest.mark.parametrize("name", ["bf16_64", "bf16_128_long", "f16_192_128_modified", "f32_64"])
def test_schedules_give_the_same_bits(name: str) -> None:
    """Whatever block, warp or lane runs first: also, the race detector sees other orders."""
    variant = BY_NAME[name]
    sizes = 2, 2, 130, 150
    inputs = make_inputs(
        *sizes, variant.key_columns, value_dim=variant.value_columns, group=2, dtype=variant.dtype
    )
    options = options_of_everything(sizes) if variant.modified else {"mask": Causal()}
    results = []
    for seed in (0, 1, 2):
        with emulated(seed=seed, variant=name):
            results.append(attn_ext.attention(*inputs, **options, return_lse=True))
    for first, other in itertools.product(results[:1], results[1:]):
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modified", [False, True])
def test_a_batch_element_alone_gives_the_same_bits(dtype: torch.dtype, modified: bool) -> None:
    sizes = 2, 4, 70, 130
    inputs = make_inputs(*sizes, 40, group=2, dtype=dtype)
    options: dict[str, Any] = {"mask": Causal()}
    if modified:
        options |= {"bias": torch.randn(2, 4, 70, 130), "alibi_slopes": torch.rand(2, 4), "softcap": 9.0}
    with emulated():
        out, lse = attn_ext.attention(*inputs, **options, return_lse=True)
        for batch in range(2):
            own = slice(batch, batch + 1)
            parts = options | {
                name: options[name][own] for name in ("bias", "alibi_slopes") if name in options
            }
            alone = attn_ext.attention(*(x[own] for x in inputs), **parts, return_lse=True)
            assert torch.equal(alone[0], out[own])
            assert torch.equal(alone[1], lse[own])


@pytest.mark.parametrize("columns", [32, 64, 96, 128, 192, 256])
def test_batches_of_every_size_give_the_same_bits(columns: int) -> None:
    """More elements make more blocks, and so may choose other tiles of queries; maxima move at every step."""
    inputs = [4 * x for x in make_inputs(1, 2, 200, 200, columns, dtype=torch.bfloat16)]
    results = {}
    with emulated(device=Device(processors=4)) as running:
        for batch in (1, 4):
            out = attn_ext.attention(*(x.expand(batch, -1, -1, -1) for x in inputs), mask=Causal())
            results[batch] = out[:1]
        if columns in (64, 128):
            assert len(set(kernels(running))) == 2
    assert torch.equal(results[1], results[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_mask_hides_by_another_rule_is_the_same(dtype: torch.dtype) -> None:
    """Whole tiles, partial ones and lists of blocks are visited in one order."""
    inputs = make_inputs(1, 2, 140, 200, 32, dtype=dtype)
    allowed = Causal("bottom_right").to_dense(1, 1, 140, 200)
    blocks = attn_ext.BlockMask.from_mask(Dense(allowed), 140, 200, block_size=(32, 16))
    with emulated():
        expected = attn_ext.attention(*inputs, mask=Causal("bottom_right"), return_lse=True)
        for mask in (Dense(allowed), blocks, blocks & Causal("bottom_right")):
            actual = attn_ext.attention(*inputs, mask=mask, return_lse=True)
            assert all(map(torch.equal, actual, expected))


def test_the_table_is_read() -> None:
    assert {variant.dtype for variant in VARIANTS} == set(ELEMENTS.values())
    assert len(VARIANTS) == len(BY_NAME) > 30
