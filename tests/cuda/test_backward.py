"""Every CUDA backward kernel against float64, on and off its tiles' edges; which call gets which kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_problems import DTYPES, make_cuda_options
from emulated import A100, emulated
from gradient_variants import BIAS_VARIANTS, KEY_VARIANTS, PASSES, QUERY_VARIANTS, BiasVariant
from problems import (
    BIAS_SHAPES,
    BLOCK_SIZES,
    FEATURES,
    MASKS,
    assert_same_bits,
    make_bias,
    make_block_mask,
    make_inputs,
    run,
)
from test_forward import EDGES, MODIFIERS, off_edge, options_of_everything
from test_varlen import LENGTHS, block_diagonal, check_varlen, cu_seqlens
from test_varlen import MASKS as PACKED_MASKS

import attn_ext
from attn_ext import BlockMask, Causal, Dense, KeyLengths, Prefix, Segments, SlidingWindow
from attn_ext.masks import Conjunction
from attn_ext.testing import check_attention


def kernels(running: Any, kind: str = "") -> list[str]:
    """The names of the kernels of gradients that ran."""
    names = (launch["kernel"] for launch in running.statistics()["launches"])
    return [name for name in names if "_gradient_" in name and kind in name]


def is_ambiguous(name: str) -> bool:
    """Whether a plain kernel takes the heads of a modified one, too."""
    query = PASSES[name].query
    return query.modified and any(
        not other.modified
        and other.dtype == query.dtype
        and other.key_columns >= query.key_columns
        and other.value_columns >= query.value_columns
        for other in QUERY_VARIANTS
    )


@pytest.mark.sample(
    6 * len(PASSES),
    name=tuple(PASSES),
    tiles_of=("key", "query"),
    queries=(*EDGES, (2, 7)),
    keys=(*EDGES, (2, 7), (3, 1)),
    heads=((1, 1), (2, 2), (2, 1), (4, 4), (3, 1), (4, 2)),  # and of how many queries each key head is
    batch=(1, 2),
    columns=((0, 0), (8, 0), (0, 8), (3, 15), (24, 31)),
    mask=(*((mask,) for mask in MASKS), ("causal", "blocks"), ("window", "key_lengths"), ()),
    feature=(*((feature,) for feature in FEATURES), ("bias", "alibi", "dropout"), ("bias", "softcap"), ()),
    seed=tuple(range(10)),
)
def test_tiles(case: SimpleNamespace) -> None:
    chosen, (heads, group) = PASSES[case.name], case.heads
    tiles = chosen.query if case.tiles_of == "query" else chosen.keys[-1]
    sizes = case.batch, heads, off_edge(tiles.queries, *case.queries), off_edge(tiles.keys, *case.keys)
    head_dim, value_dim = tiles.key_columns - case.columns[0], tiles.value_columns - case.columns[1]
    inputs = make_inputs(*sizes, head_dim, value_dim=value_dim, group=group, dtype=tiles.dtype)
    features = case.feature
    if not tiles.modified:
        features = tuple(feature for feature in features if feature not in MODIFIERS)
    elif is_ambiguous(case.name) and not set(features) & set(MODIFIERS):
        features = (*features, "softcap")
    options = make_cuda_options((*case.mask, *features), *sizes)
    mask = options.get("mask")
    parts = mask.masks if isinstance(mask, Conjunction) else (mask,)
    if any(part.block_size[0] % 128 for part in parts if isinstance(part, BlockMask)):
        chosen = PASSES[case.name.removesuffix("_long")]
    with emulated(device=PASSES[case.name].device, seed=case.seed) as running:
        check_attention(*inputs, **options)
        assert kernels(running, "key_gradient") + kernels(running, "query_gradient") == chosen.kernels
        expected = ["bias_gradient"] * ("bias" in features)
        assert [name.removeprefix("flash_")[:13] for name in kernels(running, "flash_bias")] == expected


@pytest.mark.parametrize("columns_less", [(0, 0), (31, 24)])
@pytest.mark.parametrize("name", PASSES)
def test_selected_for_heads_of_its_size(name: str, columns_less: tuple[int, int]) -> None:
    query = PASSES[name].query
    head_dim, value_dim = query.key_columns - columns_less[0], query.value_columns - columns_less[1]
    inputs = make_inputs(1, 1, 3, 5, head_dim, value_dim=value_dim, dtype=query.dtype)
    cases = [{"softcap": 5.0}, {"scale": -0.1}, {"scale": 0.0}, {"alibi_slopes": torch.ones(1)}]
    cases += [{"dropout_p": 0.5, "dropout_seed": 1}, {"bias": torch.zeros(1)}]
    if not query.modified:
        cases = [{}, {"sinks": torch.zeros(1)}, {"mask": Causal()}]
    elif not is_ambiguous(name):
        cases += [{}]
    for options in cases:
        with emulated(device=PASSES[name].device) as running:
            run(*inputs, **options)
            ran = kernels(running, "key_gradient") + kernels(running, "query_gradient")
            assert ran == PASSES[name].kernels, options
        assert all(launch["atomics"] == 0 for launch in running.statistics()["launches"])


@pytest.mark.parametrize("variant", BIAS_VARIANTS, ids=lambda variant: variant.name)
def test_selected_for_biases(variant: BiasVariant) -> None:
    with emulated() as running:
        for less in (0, 9, 31):
            columns = variant.key_columns - less, variant.value_columns - less
            inputs = make_inputs(1, 1, 3, 5, columns[0], value_dim=columns[1], dtype=variant.dtype)
            run(*inputs, bias=torch.randn(3, 5))
        assert kernels(running, "flash_bias") == 3 * [f"flash_bias_gradient_{variant.name}"]


def test_no_gradient_of_a_bias_that_is_not_wanted() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 1, 3, 5)]
    with emulated() as running:
        attn_ext.attention(*inputs, bias=torch.randn(3, 5)).sum().backward()
        assert not kernels(running, "flash_bias")


def test_the_table_is_read() -> None:
    reached = [variant for chosen in PASSES.values() for variant in chosen.keys]
    assert set(reached) == set(KEY_VARIANTS)
    assert len(KEY_VARIANTS) == len({variant.name for variant in KEY_VARIANTS}) > 20
    assert {variant.dtype for variant in BIAS_VARIANTS} == set(DTYPES)
    for chosen in PASSES.values():
        assert [variant.outputs for variant in chosen.keys] in (["both"], ["key", "value"])
        assert {variant[1:4] for variant in chosen.keys} == {chosen.query[1:4]}


# Lengths


EMPTY = ((2, 4, 0, 70), (2, 4, 70, 0), (0, 4, 70, 70), (2, 0, 70, 70), (2, 4, 0, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(*sizes, 24, dtype=dtype)
    options = {"bias": torch.randn(1, 1, *sizes[2:]), "sinks": torch.randn(sizes[1])}
    with emulated():
        check_attention(*inputs)
        check_attention(*inputs, **options)
        check_attention(*inputs, bias=torch.randn(1), mask=Causal())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 2003), (2005, 1), (2003, 64), (3, 2048)], ids=str)
def test_long_rows_and_columns(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, *lengths, 32, group=2, dtype=dtype)
    with emulated():
        check_attention(*inputs, sinks=torch.randn(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(130, 64), (64, 130), (33, 65), (1, 300)], ids=str)
def test_rows_that_see_nothing(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """Whole tiles of them, and some of a tile; with sinks they have an lse."""
    inputs = make_inputs(2, 2, *lengths, 40, dtype=dtype)
    dense = torch.rand(2, 1, *lengths) < 0.7
    dense &= (torch.rand(2, 1, lengths[0], 1) < 0.5) & (torch.arange(lengths[0]) < 70)[:, None]
    masks = (Causal("bottom_right") & KeyLengths([0, 9]), Dense(dense), Prefix(0), SlidingWindow(5, 0))
    with emulated():
        for mask in masks:
            check_attention(*inputs, mask=mask)
            check_attention(*inputs, mask=mask, sinks=torch.tensor([3.0, -torch.inf]))


# Masks


@pytest.mark.sample(
    21,
    query_block=BLOCK_SIZES,
    kv_block=BLOCK_SIZES[::-1],
    dtype=DTYPES,
    query_len=(1, 65, 130, 200),
    kv_len=(64, 129, 257, 300),
    broadcast=((1, 1), (2, 1), (1, 4), (2, 4)),
    density=(0.05, 0.2, 0.5, 0.9),
    partial=(0.0, 0.5, 1.0),
    rule=(None, Causal(), SlidingWindow(70, 3), KeyLengths([33, 110])),
)
def test_blocks(case: SimpleNamespace) -> None:
    sizes = *case.broadcast, case.query_len, case.kv_len
    mask = make_block_mask(sizes, (case.query_block, case.kv_block), case.density, case.partial)
    mask = mask if case.rule is None else mask & case.rule
    inputs = make_inputs(2, 4, case.query_len, case.kv_len, 16, group=2, dtype=case.dtype)
    with emulated():
        check_attention(*inputs, mask=mask)


@pytest.mark.sample(
    24,
    lengths=((70, 130), (200, 90), (129, 257)),
    mask=(
        SlidingWindow(20, 0),
        SlidingWindow(0, 20, "bottom_right"),
        SlidingWindow(None, 5),
        SlidingWindow(3, None, "bottom_right"),
        SlidingWindow(9, 0) | Prefix(5),
        SlidingWindow(9, 9) | SlidingWindow(9, 0, "bottom_right") | Prefix(5),
        Causal() & KeyLengths([70, 3]),
        Causal("bottom_right") | Prefix(70),
    ),
    dtype=DTYPES,
    group=(1, 2, 4),
    options=({}, {"softcap": 3.0}, {"dropout_p": 0.3, "dropout_seed": 7}),
)
def test_ranges(case: SimpleNamespace) -> None:
    inputs = make_inputs(2, 4, *case.lengths, 32, group=case.group, dtype=case.dtype)
    with emulated():
        check_attention(*inputs, mask=case.mask, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modified", [False, True])
def test_documents(dtype: torch.dtype, modified: bool) -> None:
    """Segments whose keys are one run, and ones whose keys are not."""
    inputs = make_inputs(2, 2, 150, 190, 48, dtype=dtype)
    runs = Segments(*(torch.arange(length).expand(2, -1) * 7 // 200 for length in (150, 190)))
    scattered = Segments(torch.randint(-1, 2, (2, 150)), torch.randint(-1, 2, (2, 190)))
    options = {"alibi_slopes": torch.rand(2, 2)} if modified else {}
    with emulated():
        check_attention(*inputs, mask=runs & Causal("bottom_right"), **options)
        check_attention(*inputs, mask=scattered, **options)


@pytest.mark.sample(
    20,
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
        check_varlen(*lengths, packed, each, inputs, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_and_alibi_of_packed_sequences(dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [16, 3, 40, 1], [90, 20, 40, 33]
    rows, columns = sum(lengths_q), sum(lengths_k)
    inputs = make_inputs(1, 2, rows, columns, 32, group=2, dtype=dtype)
    slopes, distances = torch.rand(2), torch.zeros(rows, columns)
    row, column = 0, 0
    for q, k in zip(lengths_q, lengths_k, strict=True):
        distance = (torch.arange(q)[:, None] + k - q - torch.arange(k)).abs()
        distances[row : row + q, column : column + k] = distance
        row, column = row + q, column + k

    def attention(*tensors: torch.Tensor, bias: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (tensor.squeeze(0).transpose(0, 1) for tensor in tensors)
        packed = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
        added = bias + slopes[:, None, None] * distances  # what ALiBi takes away
        out, lse = attn_ext.attention_varlen(
            *tokens, *packed, alibi_slopes=slopes, bias=added, return_lse=True
        )
        return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    mask = block_diagonal(lengths_q, lengths_k, [None] * 4)
    bias = torch.randn(2, rows, columns)
    with emulated() as running:
        check_attention(*inputs, mask=mask, bias=bias, attention=attention)
        check_varlen(lengths_q, lengths_k, None, [None] * 4, inputs, bias=torch.randn(1, rows, columns))
        assert kernels(running, "flash_bias")


# Scores and weights


@pytest.mark.sample(
    48,
    variant=BIAS_VARIANTS,
    full=BIAS_SHAPES,
    bias_dtype=DTYPES,
    columns=((0, 0), (8, 3), (31, 16)),
    queries=((0, 5), (1, -1), (1, 0), (1, 1), (2, 7)),
    keys=((0, 5), (1, -1), (1, 0), (1, 1), (2, 7)),
    heads=((1, 2, 2), (3, 1, 1), (2, 4, 2)),
    features=((), ("softcap",), ("causal",), ("dropout", "blocks"), ("key_lengths", "sinks"), ("alibi",)),
    as_mask=(False, False, True),
)
def test_gradients_of_biases(case: SimpleNamespace) -> None:
    """What broadcasts is summed over."""
    variant, (batch, heads, group) = case.variant, case.heads
    sizes = batch, heads, off_edge(variant.queries, *case.queries), off_edge(variant.keys, *case.keys)
    head_dim, value_dim = variant.key_columns - case.columns[0], variant.value_columns - case.columns[1]
    inputs = make_inputs(*sizes, head_dim, value_dim=value_dim, group=group, dtype=variant.dtype)
    bias = make_bias(sizes, case.full, case.bias_dtype)
    options = make_cuda_options(case.features, *sizes)
    if case.as_mask:
        added = Dense(bias.requires_grad_())
        options["mask"] = added if "mask" not in options else options["mask"] & added
    else:
        options["bias"] = bias
    with emulated() as running:
        check_attention(*inputs, **options)
        assert kernels(running, "flash_bias") == [f"flash_bias_gradient_{variant.name}"]


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.bfloat16, (1,)), (torch.float16, (1500,)), (torch.float32, (1500, 1))]
)
def test_blocks_that_sum_several_tiles_of_a_bias(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Where there are more tiles than blocks worth having."""
    inputs = make_inputs(1, 1, 1500, 1500, 8, dtype=dtype)
    with emulated() as running:
        check_attention(*inputs, bias=torch.randn(shape), mask=SlidingWindow(60, 0))
        launches = running.statistics()["launches"]
    (blocks,) = (launch["grid"][0] for launch in launches if launch["kernel"].startswith("flash_bias"))
    assert blocks <= 1024 < (1500 // 64 + 1) * (1500 // 32 + 1)


@pytest.mark.parametrize("layout", ["columns first", "heads last", "expanded", "spaced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_biases(dtype: torch.dtype, layout: str) -> None:
    bias = {
        "columns first": torch.randn(2, 4, 71, 37).mT,
        "heads last": torch.randn(2, 37, 71, 4).movedim(3, 1),
        "expanded": torch.randn(2, 1, 1, 71).expand(2, 4, 37, 71),
        "spaced": torch.randn(2, 4, 74, 142)[:, :, ::2, ::2],
    }[layout]
    with emulated():
        check_attention(*make_inputs(2, 4, 37, 71, 24, group=2, dtype=dtype), bias=bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-4, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_dropout(p: float, dtype: torch.dtype, masked: bool) -> None:
    """What is dropped is what the CPU drops."""
    inputs = make_inputs(2, 2, 67, 99, 16, group=2, dtype=dtype)
    options: dict[str, Any] = {"mask": Causal("bottom_right") & KeyLengths([99, 40])} if masked else {}
    for seed in (5, 2**62 + 3):
        options |= {"dropout_p": p, "dropout_seed": seed}
        with emulated():
            check_attention(*inputs, **options)
            check_attention(*inputs, **options, bias=torch.randn(1, 2, 67, 99), softcap=4.0)
            results = run(*inputs, **options)
        if p == 1:
            assert not any(results[name].any() for name in results if name.startswith("grad"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, -1e3, 1e4, -0.4, 0.0, 1e-4])
@pytest.mark.parametrize("causal", [False, True])
def test_scales(dtype: torch.dtype, scale: float, causal: bool) -> None:
    inputs = make_inputs(1, 2, 70, 150, 32, dtype=dtype)
    # What fp16 can represent of gradients that are as large as the scale.
    grad_out, lse = torch.randn(1, 2, 70, 32, dtype=dtype) / 64, abs(scale) < 1e4
    with emulated():
        mask = Causal("bottom_right") if causal else None
        check_attention(*inputs, mask=mask, scale=scale, grad_out=grad_out, lse=lse)
        check_attention(*inputs, scale=scale, bias=torch.randn(2, 70, 150), grad_out=grad_out, lse=lse)


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcaps(dtype: torch.dtype, softcap: float) -> None:
    inputs = make_inputs(1, 2, 37, 71, 40, dtype=dtype)
    with emulated():
        for scale in (0.25, 1e3):
            check_attention(*inputs, softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["whole", "partial", "all"])
def test_rows_of_the_lowest_number(dtype: torch.dtype, rows: str) -> None:
    """The bias absorbs the scores of such a row: its keys weigh the same."""
    bias = torch.zeros(1, 1, 70, 130)
    bias[:, :, 5:20, : 65 if rows == "partial" else 130] = torch.finfo(torch.float32).min
    if rows == "all":
        bias.fill_(torch.finfo(torch.float32).min)
    inputs = make_inputs(1, 2, 70, 130, 16, dtype=dtype)
    with emulated():
        check_attention(*inputs, bias=bias, lse=False)
        check_attention(*inputs, mask=Dense(bias) & Causal("bottom_right"), lse=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [(-1e4, 60.0), (1e4, 0.0), (-torch.inf, 3.0)])
def test_sinks(dtype: torch.dtype, sinks: tuple[float, float]) -> None:
    inputs = make_inputs(3, 2, 150, 70, 24, dtype=dtype)
    with emulated():
        for mask in (None, Causal("bottom_right"), KeyLengths([70, 0, 5])):
            check_attention(*inputs, mask=mask, sinks=torch.tensor(sinks))
            check_attention(*inputs, mask=mask, sinks=torch.tensor(sinks), dropout_p=0.5, dropout_seed=3)


# What is given, and what is wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 2), (0, 3), (2, 4)], ids=str)
def test_gradients_of_some_inputs(dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    """Have the same bits as those of all, and the others are not there."""
    inputs = make_inputs(2, 4, 40, 70, 24, group=2, dtype=dtype)
    bias, sinks = torch.randn(4, 40, 70), torch.randn(4)
    grad_out, grad_lse = torch.randn(2, 4, 40, 24, dtype=dtype), torch.randn(2, 4, 40)
    leaves = [t.clone().requires_grad_(index in wanted) for index, t in enumerate((*inputs, bias, sinks))]
    with emulated():
        options = {"bias": bias, "sinks": sinks, "grad_out": grad_out, "grad_lse": grad_lse}
        results = run(*inputs, **options)
        outputs = attn_ext.attention(*leaves[:3], bias=leaves[3], sinks=leaves[4], return_lse=True)
        torch.autograd.backward(outputs, (grad_out, grad_lse))
    for leaf, name in zip(leaves, ("query", "key", "value", "bias", "sinks"), strict=True):
        assert leaf.requires_grad == (leaf.grad is not None)
        assert leaf.grad is None or torch.equal(leaf.grad, results[f"grad_{name}"]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [(), ("causal",), ("bias", "sinks"), ("dropout", "alibi")])
def test_gradients_of_lse_alone(dtype: torch.dtype, features: tuple[str, ...]) -> None:
    """A gradient of the output that is 0, and one that is not there, are the same."""
    inputs = [t.requires_grad_() for t in make_inputs(2, 2, 70, 90, 40, dtype=dtype)]
    options = make_cuda_options(features, 2, 2, 70, 90)
    grad_lse = torch.randn(2, 2, 70)
    with emulated():
        check_attention(*inputs, **options, grad_out=torch.zeros(2, 2, 70, 40, dtype=dtype))
        lse = attn_ext.attention(*inputs, **options, return_lse=True)[1]
        grads = torch.autograd.grad(lse, inputs, grad_lse, allow_unused=True)
        zeros = torch.zeros(2, 2, 70, 40, dtype=dtype)
        expected = run(*inputs, **options, grad_out=zeros, grad_lse=grad_lse)
    for name, grad in zip(("query", "key", "value"), grads, strict=True):
        assert torch.equal(expected[f"grad_{name}"], torch.zeros_like(inputs[2]) if grad is None else grad)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows last": lambda t: t.mT.contiguous().mT,
    "batch last": lambda t: t.movedim(0, 3).contiguous().movedim(3, 0),
    "spaced columns": lambda t: torch.stack((t, t), -1).flatten(3)[..., ::2],
    "spaced rows": lambda t: torch.stack((t, t), 3).flatten(2, 3)[:, :, ::2],
    "unaligned": lambda t: torch.cat((t[..., :1], t), -1)[..., 1:],
    "from a wider row": lambda t: torch.cat((t, t[..., :8]), -1)[..., : t.size(-1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    """Of the inputs, of the gradient of the output, and of both."""
    inputs = make_inputs(2, 4, 37, 70, 24, value_dim=16, group=2, dtype=dtype)
    grad_out = torch.randn(2, 4, 37, 16, dtype=dtype)
    laid = LAYOUTS[layout]
    with emulated():
        options: dict[str, Any] = {"mask": Causal("bottom_right")}
        check_attention(*map(laid, inputs), grad_out=laid(grad_out), **options)
        expected = run(*inputs, grad_out=grad_out, **options)
        assert_same_bits(run(*inputs, grad_out=laid(grad_out), **options), expected)
        assert_same_bits(run(*map(laid, inputs), grad_out=grad_out, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1, 4, 1, 1), (2, 1, 37, 1), (1, 1, 1, 16), (1, 1, 37, 16)], ids=str)
def test_expanded_gradients_of_the_output(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(2, 4, 37, 70, 24, value_dim=16, group=2, dtype=dtype)
    grad_out = torch.randn(shape, dtype=dtype).expand(2, 4, 37, 16)
    with emulated():
        check_attention(*inputs, grad_out=grad_out)
        expected = run(*inputs, grad_out=grad_out.contiguous())
        assert_same_bits(run(*inputs, grad_out=grad_out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 70, 24), (2, 1, 70, 24), (1, 4, 1, 24), (1, 1, 1, 1)], ids=str)
def test_expanded_inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(shape, dtype=dtype).expand(2, 4, 70, 24) for _ in range(3))
    with emulated():
        check_attention(query, key, value)
        expected = run(query.contiguous(), key.contiguous(), value.contiguous())
        assert_same_bits(run(query, key, value), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_lie_like_their_inputs(dtype: torch.dtype) -> None:
    inputs = [LAYOUTS["heads last"](t).requires_grad_() for t in make_inputs(2, 4, 9, 20, 24, dtype=dtype)]
    with emulated():
        grads = torch.autograd.grad(attn_ext.attention(*inputs).sum(), inputs)
    assert [grad.stride() for grad in grads] == [tensor.stride() for tensor in inputs]


# The same bits


@pytest.mark.parametrize(
    "name", ["bf16_64", "f16_128_long", "bf16_32_modified", "f16_192_modified", "f32_64", "f32_256"]
)
def test_schedules_give_the_same_bits(name: str) -> None:
    """Whatever block, warp or lane runs first: also, the race detector sees other orders."""
    query = PASSES[name].query
    sizes = 2, 2, 70, 90
    inputs = make_inputs(*sizes, query.key_columns, value_dim=query.value_columns, group=2, dtype=query.dtype)
    options = options_of_everything(sizes) if query.modified else {"mask": Causal(), "sinks": torch.randn(2)}
    grad_out, grad_lse = (
        torch.randn(*sizes[:3], query.value_columns, dtype=query.dtype),
        torch.randn(sizes[:3]),
    )
    results = []
    for seed in (0, 1, 2, 0):
        with emulated(device=PASSES[name].device, seed=seed) as running:
            results.append(run(*inputs, grad_out=grad_out, grad_lse=grad_lse, **options))
            assert kernels(running)[: len(PASSES[name].kernels)] == PASSES[name].kernels
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("huge", [False, True])
def test_tiles_of_128_queries_give_the_same_bits(huge: bool) -> None:
    """They are taken where each processor gets two, and where they join no blocks of a mask."""
    inputs = make_inputs(1, 2, 384, 200, 64, group=2, dtype=torch.float16)
    if huge:  # scores of a row beyond 2^24: its neighbours are computed in another way
        inputs[0][:, :, 20] = inputs[1][:, :, 3] = 2000.0
    sizes = 1, 2, 384, 200
    lists = {size: make_block_mask(sizes, (size, size), 0.5) for size in (64, 128)}
    for mask, long in ((Causal(), True), (lists[64], False), (lists[128], True)):
        results = []
        for processors, expected in ((3, long), (4, False)):
            with emulated(device=A100._replace(processors=processors)) as running:
                results.append(run(*inputs, mask=mask))
                launches = [launch["kernel"] for launch in running.statistics()["launches"]]
            end = "_long" * expected
            assert {f"flash_forward_f16_64{end}", f"flash_query_gradient_f16_64{end}"} <= set(launches)
        assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modified", [False, True])
def test_a_batch_element_alone_gives_the_same_bits(dtype: torch.dtype, modified: bool) -> None:
    inputs = make_inputs(2, 4, 70, 130, 40, group=2, dtype=dtype)
    grad_out, grad_lse = torch.randn(2, 4, 70, 40, dtype=dtype), torch.randn(2, 4, 70)
    options: dict[str, Any] = {"mask": Causal("bottom_right")}
    if modified:
        options |= {"bias": torch.randn(2, 4, 70, 130), "alibi_slopes": torch.rand(2, 4), "softcap": 9.0}
    with emulated():
        results = run(*inputs, grad_out=grad_out, grad_lse=grad_lse, **options)
        for batch in range(2):
            own = slice(batch, batch + 1)
            parts = options | {
                name: options[name][own] for name in ("bias", "alibi_slopes") if name in options
            }
            alone = run(*(x[own] for x in inputs), grad_out=grad_out[own], grad_lse=grad_lse[own], **parts)
            assert_same_bits(alone, {name: result[own] for name, result in results.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 4])
def test_grouped_heads_equal_repeated_heads(dtype: torch.dtype, group: int) -> None:
    """To the bit in the rows of queries; and so does a group in which all queries but one's see nothing."""
    query, key, value = make_inputs(2, 4, 70, 90, 40, group=group, dtype=dtype)
    grad_out = torch.randn(2, 4, 70, 40, dtype=dtype)
    repeated = [t.repeat_interleave(group, 1) for t in (key, value)]
    lonely = torch.zeros(2, 4, 1, 1, dtype=torch.bool).index_fill_(1, torch.arange(1, 4, group), True)
    with emulated():
        actual = run(query, key, value, grad_out=grad_out, mask=Causal())
        expected = run(query, *repeated, grad_out=grad_out, mask=Causal())
        assert_same_bits(actual, expected, "out", "lse", "grad_query")
        mask = Dense(lonely.expand(2, 4, 70, 90)) & Causal()
        actual = run(query, key, value, grad_out=grad_out, mask=mask)
        expected = run(query, *repeated, grad_out=grad_out, mask=mask)
    for name in ("grad_key", "grad_value"):
        assert torch.equal(actual[name], expected[name][:, 1::group]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_mask_hides_by_another_rule_is_the_same(dtype: torch.dtype) -> None:
    """Whole tiles, partial ones and lists of blocks are visited in one order."""
    inputs = make_inputs(1, 2, 140, 200, 32, dtype=dtype)
    grad_out = torch.randn(1, 2, 140, 32, dtype=dtype)
    allowed = Causal("bottom_right").to_dense(1, 1, 140, 200)
    blocks = attn_ext.BlockMask.from_mask(Dense(allowed), 140, 200, block_size=(32, 16))
    with emulated():
        expected = run(*inputs, grad_out=grad_out, mask=Causal("bottom_right"))
        for mask in (Dense(allowed), blocks, blocks & Causal("bottom_right")):
            assert_same_bits(run(*inputs, grad_out=grad_out, mask=mask), expected)


# What is not finite


def hiding(kind: str, allowed: torch.Tensor) -> attn_ext.Mask:
    """A mask of the pairs in `allowed`, (1, 1, L, L) and lower triangular."""
    if kind == "causal":
        return Causal()
    if kind == "boolean":
        return Dense(allowed)
    if kind == "additive":
        return Dense(torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf))
    return attn_ext.BlockMask.from_mask(Dense(allowed), *allowed.shape[2:], block_size=(32, 16))


KINDS = ("causal", "boolean", "additive", "blocks")


@pytest.mark.sample(
    36, kind=KINDS, dtype=DTYPES, bad=(torch.nan, torch.inf), columns=(24, 64, 192), softcap=(None, None, 3.0)
)
def test_bad_keys_are_felt_by_those_who_see_them(case: SimpleNamespace) -> None:
    """Rows that do not see them have the same bits, and so have gradients of keys that only these see."""
    length, bad_at = 75, 41
    query, key, value = make_inputs(1, 2, length, length, case.columns, dtype=case.dtype)
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    grad_out = torch.randn(1, 2, length, case.columns, dtype=case.dtype)
    options = {"mask": hiding(case.kind, allowed), "softcap": case.softcap}
    with emulated():
        expected = run(query, key, value, grad_out=grad_out, **options)
        for where in ("key", "value"):
            poisoned = {"key": key.clone(), "value": value.clone()}
            poisoned[where][:, 0, bad_at] = case.bad
            actual = run(query, **poisoned, grad_out=grad_out, **options)
            assert torch.equal(actual["grad_query"][:, :, :bad_at], expected["grad_query"][:, :, :bad_at])
            assert not actual["grad_query"][:, 0, bad_at:].isfinite().all(-1).any()
            for name in ("grad_query", "grad_key", "grad_value"):  # the other head
                assert torch.equal(actual[name][:, 1], expected[name][:, 1]), name


@pytest.mark.sample(
    36, kind=KINDS, dtype=DTYPES, bad=(torch.nan, torch.inf), columns=(24, 64, 192), softcap=(None, None, 3.0)
)
def test_bad_queries_are_felt_by_the_keys_they_see(case: SimpleNamespace) -> None:
    """Keys hidden from a query, and other queries, feel neither it nor the gradient of its output."""
    length, bad_at = 75, 41
    query, key, value = make_inputs(1, 2, length, length, case.columns, group=2, dtype=case.dtype)
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    grad_out = torch.randn(1, 2, length, case.columns, dtype=case.dtype)
    options = {"mask": hiding(case.kind, allowed), "softcap": case.softcap}
    others = torch.arange(length) != bad_at
    with emulated():
        expected = run(query, key, value, grad_out=grad_out, **options)
        for where in ("query", "grad_out"):
            poisoned = {"query": query.clone(), "grad_out": grad_out.clone()}
            poisoned[where][:, 1, bad_at] = case.bad
            actual = run(key=key, value=value, **poisoned, **options)
            for name in ("grad_key", "grad_value"):
                assert torch.equal(actual[name][:, :, bad_at + 1 :], expected[name][:, :, bad_at + 1 :]), name
            assert torch.equal(actual["grad_query"][:, :, others], expected["grad_query"][:, :, others])
            assert not actual["grad_query"][:, 1, bad_at].isfinite().any()
            assert not actual["grad_value"][:, 0, : bad_at + 1].isfinite().all(-1).any()
            assert not actual["grad_key"][:, 0, : bad_at + 1].isfinite().all(-1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("dtype", "columns"), [*((dtype, 24) for dtype in DTYPES), (DTYPES[1], 64), (DTYPES[2], 256)]
)
def test_what_nobody_sees_is_never_felt(dtype: torch.dtype, bad: float, columns: int) -> None:
    """Keys and values that a length hides; queries and gradients of rows that see nothing."""
    query, key, value = make_inputs(2, 2, 70, 90, columns, group=2, dtype=dtype)
    grad_out, grad_lse = torch.randn(2, 2, 70, columns, dtype=dtype), torch.randn(2, 2, 70)
    dead = torch.arange(70)[:, None] % 3 == 0
    seen = torch.arange(90) < torch.tensor([33, 70])[:, None, None, None]
    options: dict[str, Any] = {"bias": torch.randn(2, 70, 90)}
    for mask in (Dense(seen & ~dead), KeyLengths([33, 70]) & Dense(~dead.expand(1, 1, 70, 90))):
        bad_query, bad_grad, bad_lse = query.clone(), grad_out.clone(), grad_lse.clone()
        bad_query[:, :, ::3] = bad_grad[:, :, ::3] = bad_lse[:, :, ::3] = bad
        hidden = ~seen.expand(2, 1, 1, 90).mT
        bad_key, bad_value = (torch.where(hidden, bad, t) for t in (key, value))
        with emulated():
            for extra in ({}, options):
                expected = run(query, key, value, mask=mask, grad_out=grad_out, grad_lse=grad_lse, **extra)
                actual = run(
                    bad_query, bad_key, bad_value, mask=mask, grad_out=bad_grad, grad_lse=bad_lse, **extra
                )
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_that_is_none_feels_nothing(dtype: torch.dtype) -> None:
    """Nor do sinks feel the gradients of rows without keys."""
    inputs = make_inputs(2, 3, 40, 20, 16, dtype=dtype)
    sinks, grad_out = torch.tensor([-torch.inf, 1.0, 0.0]), torch.randn(2, 3, 40, 16, dtype=dtype)
    with emulated():
        expected = run(*inputs, sinks=sinks, mask=Causal("bottom_right"), grad_out=grad_out)
        grad_out[:, 1:, 3] = torch.nan  # which sees nothing
        grad_out[:, 0, 30] = torch.nan
        actual = run(*inputs, sinks=sinks, mask=Causal("bottom_right"), grad_out=grad_out)
    assert actual["grad_sinks"][0] == 0
    assert torch.equal(actual["grad_sinks"], expected["grad_sinks"])
