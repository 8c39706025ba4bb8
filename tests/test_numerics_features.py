"""Bias, softcap, ALiBi, sinks and dropout: each alone, with each other and with masks, in every dtype."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import (
    BIAS_SHAPES,
    DTYPES,
    FEATURES,
    MASKS,
    assert_same_bits,
    make_bias,
    make_inputs,
    make_options,
    run,
)
from torch import Tensor

import attn_ext
from attn_ext import reference
from attn_ext.testing import check_attention, dropout_mask

pytestmark = pytest.mark.usefixtures("isa")

BAD_VALUES = (torch.nan, torch.inf, -torch.inf)
QUERY_LENGTHS = (1, 2, 5, 8, 15, 17, 33, 48, 63, 65, 97)
KV_LENGTHS = (1, 3, 7, 16, 31, 33, 64, 95, 129, 193, 257)
HEAD_DIMS = (1, 8, 16, 24, 33, 64)
SIZES = (2, 4, 37, 71)

# Each feature as a user would give it, for four heads.
OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": torch.linspace(-2, 2, 71)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 1.0, 4.0])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
    "all": {
        "bias": torch.linspace(-2, 2, 71),
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": torch.tensor([-3.0, 0.0, 1.0, 4.0]),
        "dropout_p": 0.3,
        "dropout_seed": 5,
    },
}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal but for the rounding of another way to compute the same, in `dtype`."""
    tolerance = 8 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_unharmed(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal; pairs of bfloat16 numbers that are not finite are multiplied one by one, in another order."""
    if dtype == torch.bfloat16:
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


def check(case: SimpleNamespace, features: tuple[str, ...], scale: float | None = None) -> None:
    inputs = make_inputs(
        *(case.batch, 4, case.query_len, case.kv_len, case.head_dim), group=case.group, dtype=case.dtype
    )
    options = make_options(features, case.batch, 4, case.query_len, case.kv_len)
    check_attention(*inputs, **options, scale=scale)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.sample(
    24,
    query_len=QUERY_LENGTHS,
    kv_len=KV_LENGTHS,
    head_dim=HEAD_DIMS,
    dtype=DTYPES,
    group=(1, 2, 4),
    batch=(1, 2, 3),
)
def test_alone(case: SimpleNamespace, feature: str) -> None:
    check(case, (feature,))


@pytest.mark.sample(
    75,
    features=tuple(p for p in itertools.combinations((*FEATURES, *MASKS), 2) if set(p) - set(MASKS)),
    query_len=QUERY_LENGTHS,
    kv_len=KV_LENGTHS,
    head_dim=HEAD_DIMS,
    dtype=DTYPES,
    group=(1, 2, 4),
    batch=(1, 2, 3),
)
def test_pairs(case: SimpleNamespace) -> None:
    check(case, case.features)


@pytest.mark.sample(
    75,
    features=tuple(itertools.combinations((*FEATURES, *MASKS), 3)),
    query_len=QUERY_LENGTHS,
    kv_len=KV_LENGTHS,
    head_dim=HEAD_DIMS,
    dtype=DTYPES,
    group=(1, 2, 4),
    batch=(1, 2, 3),
)
def test_triples(case: SimpleNamespace) -> None:
    check(case, case.features)


@pytest.mark.sample(
    16, mask=(*MASKS, "causal"), query_len=(7, 40, 300), kv_len=(9, 130, 500), dtype=DTYPES, group=(1, 4)
)
def test_everything_together(case: SimpleNamespace) -> None:
    case = SimpleNamespace(**vars(case), batch=2, head_dim=32)
    check(case, (*(name for name in FEATURES if name != "additive"), case.mask), scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scales_that_are_not_positive(scale: float, causal: bool, feature: str, dtype: torch.dtype) -> None:
    mask = attn_ext.Causal("bottom_right") if causal else None
    inputs = make_inputs(*SIZES, 24, group=2, dtype=dtype)
    check_attention(*inputs, mask=mask, scale=scale, **OPTIONS[feature])


@pytest.mark.parametrize("feature", OPTIONS)
@pytest.mark.parametrize("sizes", [(0, 4, 37, 71), (2, 4, 0, 71), (2, 4, 37, 0)])
def test_empty(sizes: tuple[int, ...], feature: str) -> None:
    options = dict(OPTIONS[feature])
    if "bias" in options:
        options["bias"] = options["bias"][: sizes[3]]
    check_attention(*make_inputs(*sizes, 24, group=2), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", OPTIONS)
def test_half_precision_gradients_are_nearly_as_exact_as_their_dtype(
    feature: str, dtype: torch.dtype
) -> None:
    """At most twice the error of rounding the exact result: nothing accumulates in half precision."""
    inputs = make_inputs(2, 4, 137, 71, 64, group=2, dtype=dtype)
    options = {**OPTIONS[feature]}
    grad_out = torch.randn(2, 4, 137, 64, dtype=dtype)
    actual = run(*inputs, **options, grad_out=grad_out)
    differentiated = [name for name in ("bias", "sinks") if name in options]
    leaves = [t.double().requires_grad_() for t in (*inputs, *(options[name] for name in differentiated))]
    options |= dict(zip(differentiated, leaves[3:], strict=True))
    if p := options.pop("dropout_p", None):
        options["dropout"] = dropout_mask(options.pop("dropout_seed"), p, 2, 4, 137, 71)
    out = reference.attention(*leaves[:3], **options)
    expected = (out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()))
    names = ("out", *(f"grad_{name}" for name in ("query", "key", "value", *differentiated)))
    for name, exact in zip(names, expected, strict=True):
        if name == "grad_sinks":  # four sums of terms that cancel
            continue
        error, rounding = (float((t.double() - exact).norm()) for t in (actual[name], exact.to(dtype)))
        assert error <= 2 * rounding, f"{name}: {error:.2e}, rounding alone {rounding:.2e}"


# --- Bias ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("full", BIAS_SHAPES)
def test_bias_broadcasts(bias_dtype: torch.dtype, full: tuple[bool, ...]) -> None:
    dtype = DTYPES[(sum(full) + DTYPES.index(bias_dtype)) % len(DTYPES)]
    inputs = make_inputs(*SIZES, 20, group=2, dtype=dtype)
    check_attention(*inputs, bias=make_bias(SIZES, full, bias_dtype))


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bias_of_fewer_dimensions(bias_dtype: torch.dtype, dims: int) -> None:
    bias = torch.randn(SIZES[-dims:], dtype=bias_dtype)
    check_attention(*make_inputs(*SIZES, 20), bias=bias)


def layouts(bias: Tensor) -> dict[str, Tensor]:
    batch, heads, query_len, kv_len = bias.shape
    padded = torch.empty(batch, heads, query_len + 2, 3 * kv_len + 5, dtype=bias.dtype)
    spaced = padded[:, :, 2:, 5::3]
    return {
        "columns_first": bias.mT.contiguous().mT,
        "heads_last": bias.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        "spaced": spaced.copy_(bias),
        "expanded": bias[:1, :, :1].expand_as(bias),
        "expanded_columns": bias[..., :1].expand_as(bias),
    }


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("layout", ["columns_first", "heads_last", "spaced", "expanded", "expanded_columns"])
def test_bias_strides(bias_dtype: torch.dtype, layout: str) -> None:
    bias = layouts(torch.randn(2, 4, 37, 70, dtype=bias_dtype))[layout]
    inputs = make_inputs(2, 4, 37, 70, 20, group=4)
    check_attention(*inputs, bias=bias)
    names = ("out", "lse", "grad_query", "grad_bias")
    assert_same_bits(run(*inputs, bias=bias), run(*inputs, bias=bias.contiguous()), *names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", BIAS_SHAPES[1::3])
def test_bias_and_boolean_mask(dtype: torch.dtype, full: tuple[bool, ...]) -> None:
    mask = attn_ext.Dense(torch.rand(2, 1, 37, 71) < 0.6)
    inputs = make_inputs(*SIZES, 20, group=2, dtype=dtype)
    check_attention(*inputs, bias=make_bias(SIZES, full, dtype), mask=mask)
    check_attention(*inputs, bias=make_bias(SIZES, full, dtype), mask=mask & attn_ext.Causal("bottom_right"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
def test_bias_and_additive_mask(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    mask = attn_ext.Dense(torch.randn(4, 37, 1, dtype=dtype, requires_grad=True))
    bias = torch.randn(2, 1, 37, 71, dtype=bias_dtype)
    check_attention(*make_inputs(*SIZES, 20, dtype=dtype), bias=bias, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_equals_additive_mask(dtype: torch.dtype) -> None:
    inputs = make_inputs(*SIZES, 20, dtype=dtype)
    bias = make_bias(SIZES, (False, True, True, True), torch.float32)
    results = run(*inputs, bias=bias)
    grad_bias = results.pop("grad_bias")
    assert_same_bits(results, run(*inputs, mask=attn_ext.Dense(bias)))
    assert (grad_bias[bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wanting_no_gradient_of_the_bias_changes_no_other(dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(*SIZES, 20, dtype=dtype)]
    bias = torch.randn(4, 37, 71)
    grads = []
    for wanted in (False, True):
        out = attn_ext.attention(*inputs, bias=bias.detach().requires_grad_(wanted))
        grads.append(torch.autograd.grad(out.float().sum(), inputs))
    for without, beside in zip(*grads, strict=True):
        assert torch.equal(without, beside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("kv_len", [7, 130])
@pytest.mark.parametrize("rows", ["whole", "partial"])
def test_rows_of_the_lowest_number(
    dtype: torch.dtype, bias_dtype: torch.dtype, kv_len: int, rows: str
) -> None:
    """Where the bias swallows the scores, keys that share it weigh the same, and its gradient says so."""
    bias = torch.randn(1, 4, 37, kv_len).to(bias_dtype)
    bias[:, :, 5:20, : kv_len if rows == "whole" else kv_len // 2] = torch.finfo(bias_dtype).min
    inputs = make_inputs(2, 4, 37, kv_len, 16, group=2, dtype=dtype)
    check_attention(*inputs, bias=bias, lse=bias_dtype == torch.float16)


# --- Softcap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_huge_softcap_is_none(dtype: torch.dtype) -> None:
    inputs = make_inputs(*SIZES, 24, group=2, dtype=dtype)
    capped = run(*inputs, softcap=1e10)
    for name, expected in run(*inputs).items():
        assert_near(capped[name], expected, dtype)
    assert_same_bits(run(*inputs, softcap=0.0), run(*inputs, softcap=None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("scale", [1e-4, 0.25, 1e4])
def test_softcaps_and_scales(dtype: torch.dtype, softcap: float, scale: float) -> None:
    check_attention(*make_inputs(*SIZES, 16, group=2, dtype=dtype), softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_bounds_the_scores(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(*SIZES, 16, dtype=dtype)
    lse = attn_ext.attention(query, key, value, softcap=2.0, scale=1e4, return_lse=True)[1]
    assert (lse - torch.log(torch.tensor(71.0))).abs().max() <= 2.0001


# --- ALiBi --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_len", "kv_len"), [(37, 71), (71, 37), (1, 130), (130, 1)])
def test_alibi_equals_a_bias(dtype: torch.dtype, query_len: int, kv_len: int) -> None:
    inputs = make_inputs(2, 4, query_len, kv_len, 16, group=2, dtype=dtype)
    slopes = torch.rand(2, 4)
    row = torch.arange(query_len).unsqueeze(1) + kv_len - query_len
    bias = -slopes.double()[..., None, None] * (row - torch.arange(kv_len)).abs()
    expected = run(*inputs, bias=bias)
    for name, actual in run(*inputs, alibi_slopes=slopes).items():
        assert_near(actual, expected[name], dtype)


# --- Sinks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_sinks_of_minus_infinity_are_none(dtype: torch.dtype, causal: bool) -> None:
    inputs = make_inputs(2, 4, 50, 40, 16, group=2, dtype=dtype)  # causal: the first rows see nothing
    mask = attn_ext.Causal("bottom_right") if causal else None
    results = run(*inputs, mask=mask, sinks=torch.full((4,), -torch.inf))
    assert (results.pop("grad_sinks") == 0).all()
    expected = run(*inputs, mask=mask)
    for name, actual in results.items():
        assert_near(actual, expected[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_rows_that_see_nothing(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 4, 50, 40, 16, group=2, dtype=dtype)
    sinks, mask = torch.randn(4), attn_ext.Causal("bottom_right")
    grad_lse = torch.randn(2, 4, 50)
    results = run(*inputs, mask=mask, sinks=sinks, grad_out=torch.zeros_like(inputs[0]), grad_lse=grad_lse)
    assert (results["out"][:, :, :10] == 0).all()
    assert (results["grad_query"][:, :, :10] == 0).all()
    expected = sinks.view(1, 4, 1).expand(2, 4, 10).to(results["lse"])
    assert_near(results["lse"][:, :, :10], expected, dtype)
    check_attention(*inputs, mask=mask, sinks=sinks)
    only = run(*inputs, mask=attn_ext.KeyLengths([0, 0]), sinks=sinks, grad_lse=grad_lse)
    assert_near(only["grad_sinks"], grad_lse.sum((0, 2)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [-1e4, 1e4, 60.0])
def test_large_sinks(dtype: torch.dtype, size: float) -> None:
    sinks = torch.tensor([size, -size, 0.0, size / 2])
    check_attention(*make_inputs(*SIZES, 16, group=2, dtype=dtype), sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_is_a_key_whose_value_is_zero(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(2, 4, 37, 71, 16, dtype=dtype)
    sinks = torch.randn(4)
    bias = torch.cat((sinks.view(4, 1, 1), torch.zeros(4, 1, 71)), dim=-1)
    with_sink = (torch.nn.functional.pad(t, (0, 0, 1, 0)) for t in (key, value))
    expected = run(query, *with_sink, bias=bias)
    actual = run(query, key, value, sinks=sinks)
    for name in ("out", "lse", "grad_query"):
        assert_near(actual[name], expected[name], dtype)


# --- Dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_nothing_and_of_everything(dtype: torch.dtype) -> None:
    inputs = make_inputs(*SIZES, 16, group=2, dtype=dtype)
    undropped = run(*inputs)
    for p in (0.0, 1e-7):
        assert_same_bits(run(*inputs, dropout_p=p, dropout_seed=3), undropped)
    dropped = run(*inputs, dropout_p=1.0, dropout_seed=3)
    assert_same_bits(dropped, undropped, "lse")
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert (dropped[name] == 0).all(), name
    check_attention(*inputs, dropout_p=1.0, dropout_seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.01, 0.5, 0.99])
def test_dropout_beside_rows_that_see_nothing(dtype: torch.dtype, p: float) -> None:
    inputs = make_inputs(2, 4, 50, 40, 16, group=2, dtype=dtype)
    mask = attn_ext.Causal("bottom_right") & attn_ext.KeyLengths([40, 0])
    check_attention(*inputs, mask=mask, dropout_p=p, dropout_seed=3)


# --- What must not be felt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", OPTIONS)
def test_hidden_keys_and_values_are_never_felt(feature: str, dtype: torch.dtype, bad: float) -> None:
    query, key, value = make_inputs(*SIZES, 24, group=2, dtype=dtype)
    lengths = [33, 0]
    masks = {
        "key_lengths": attn_ext.KeyLengths(lengths),
        "boolean": attn_ext.Dense((torch.arange(71) < torch.tensor(lengths)[:, None])[:, None, None]),
        "segments": attn_ext.Segments(
            torch.ones(1, 37, dtype=torch.int64), (torch.arange(71) < torch.tensor(lengths)[:, None]).int()
        ),
    }
    poisoned_key, poisoned_value = key.clone(), value.clone()
    for batch, length in enumerate(lengths):
        poisoned_key[batch, :, length:] = bad
        poisoned_value[batch, :, length:] = bad
    for mask in masks.values():
        expected = run(query, key, value, mask=mask, **OPTIONS[feature])
        actual = run(query, poisoned_key, poisoned_value, mask=mask, **OPTIONS[feature])
        for name in expected:
            assert_unharmed(actual[name], expected[name], dtype)
        for batch, length in enumerate(lengths):
            assert (actual["grad_key"][batch, :, length:] == 0).all()
            assert (actual["grad_value"][batch, :, length:] == 0).all()


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", OPTIONS)
@pytest.mark.parametrize("kind", ["causal", "boolean", "union"])
def test_rows_that_do_not_see_a_bad_key_are_unharmed(
    kind: str, feature: str, dtype: torch.dtype, bad: float
) -> None:
    length, bad_at = 71, 41
    query, key, value = make_inputs(1, 4, length, length, 24, group=2, dtype=dtype)
    mask = {
        "causal": attn_ext.Causal(),
        "boolean": attn_ext.Dense(torch.ones(length, length, dtype=torch.bool).tril()),
        "union": attn_ext.SlidingWindow(9, 0) | attn_ext.Prefix(3),
    }[kind]
    expected = run(query, key, value, mask=mask, **OPTIONS[feature])
    key[:, :, bad_at], value[:, :, bad_at] = bad, bad
    actual = run(query, key, value, mask=mask, **OPTIONS[feature])
    for name in ("out", "lse", "grad_query"):
        assert_unharmed(actual[name][:, :, :bad_at], expected[name][:, :, :bad_at], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", OPTIONS)
def test_nan_in_an_attended_key_propagates(feature: str, dtype: torch.dtype) -> None:
    query, key, value = make_inputs(*SIZES, 16, dtype=dtype)
    key[0, 0, 40, 3] = torch.nan
    options = {**OPTIONS[feature]}
    out, lse = attn_ext.attention(query, key, value, return_lse=True, **options)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_memory_of_an_earlier_call_is_never_felt(dtype: torch.dtype) -> None:
    nans = tuple(torch.full((1, 4, 200, 64), torch.nan, dtype=dtype) for _ in range(3))
    for query_len, kv_len, head_dim in [(1, 1, 16), (7, 5, 24), (33, 50, 40), (70, 191, 64)]:
        inputs = make_inputs(1, 4, query_len, kv_len, head_dim, group=2, dtype=dtype)
        options = {**OPTIONS["all"], "bias": torch.randn(4, query_len, kv_len)}
        expected = run(*inputs, **options)
        run(*nans, **{**options, "bias": torch.full((4, 200, 200), torch.nan)})
        assert_same_bits(run(*inputs, **options), expected)


@pytest.mark.parametrize("softcap", [1e-300, 1e-46, 1e-20, 1e20, 3e38, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softcaps_of_any_size(dtype: torch.dtype, softcap: float) -> None:
    """Also of those that float32 has no number for."""
    inputs = [t.requires_grad_() for t in make_inputs(1, 2, 20, 33, 16, dtype=dtype)]
    out = attn_ext.attention(*inputs, softcap=softcap)
    expected = reference.attention(*inputs, softcap=softcap)
    grads = torch.autograd.grad(out.sum(), inputs)
    expected_grads = torch.autograd.grad(expected.sum(), inputs)
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, wanted.to(dtype))


def test_sinks_do_not_feel_gradients_of_rows_that_see_nothing() -> None:
    query, key, value = make_inputs(1, 2, 40, 33, 16)
    sinks = torch.randn(2, requires_grad=True)
    allowed = torch.ones(1, 1, 40, 33, dtype=torch.bool)
    allowed[:, :, 7] = False
    grad_out = torch.randn(query.shape)
    out = attn_ext.attention(query, key, value, mask=attn_ext.Dense(allowed), sinks=sinks)
    (expected,) = torch.autograd.grad(
        out, sinks, grad_out.index_fill(2, torch.tensor([7]), 0), retain_graph=True
    )
    (actual,) = torch.autograd.grad(out, sinks, grad_out.index_fill(2, torch.tensor([7]), torch.nan))
    assert torch.equal(actual, expected)


def test_a_sum_of_the_lowest_numbers_hides_nothing() -> None:
    inputs = make_inputs(1, 2, 20, 33, 16)
    lowest = torch.full((1, 1, 20, 33), torch.finfo(torch.float32).min)
    twice = attn_ext.attention(*inputs, bias=lowest, mask=attn_ext.Dense(lowest))
    torch.testing.assert_close(twice, attn_ext.attention(*inputs, bias=lowest))
