"""Causal masks, windows, key lengths and dense masks of every dtype, shape and stride, alone and together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from problems import DTYPES, LENGTHS, make_inputs, run
from torch import Tensor

import attn_ext
from attn_ext import reference
from attn_ext.testing import assert_within_rule, check_attention

pytestmark = pytest.mark.usefixtures("isa")

ALIGNMENTS = ("top_left", "bottom_right")
MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_LAYOUTS = ("contiguous", "columns_first", "strided_columns", "offset", "expanded")


def make_mask(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """A random mask that hides a quarter of the pairs; `layout` says how its elements lie in memory."""
    if layout == "columns_first":
        return make_mask((*shape[:-2], shape[-1], shape[-2]), dtype).mT
    if layout == "strided_columns":
        return make_mask((*shape[:-1], 3 * shape[-1]), dtype)[..., ::3]
    if layout == "offset":
        return make_mask((*shape[:-2], shape[-2] + 1, shape[-1] + 3), dtype)[..., 1:, 3:]
    if layout == "expanded":
        return make_mask((1,) * (len(shape) - 1) + shape[-1:], dtype).expand(shape)
    allowed = torch.rand(shape) < 0.75
    if dtype == torch.bool:
        return allowed
    return torch.where(allowed, torch.randn(shape), -torch.inf).to(dtype)


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.sample(
    60,
    query_len=LENGTHS,
    kv_len=LENGTHS,
    head_dim=(3, 16, 33, 64),
    dtype=DTYPES,
    batch=(1, 2),
)
def test_causal(case: SimpleNamespace, align: str) -> None:
    inputs = make_inputs(case.batch, 2, case.query_len, case.kv_len, case.head_dim, group=2, dtype=case.dtype)
    check_attention(*inputs, mask=attn_ext.Causal(align=align))


def test_causal_alignments_differ_as_documented() -> None:
    query, key, value = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 4, 4), torch.eye(4).view(1, 1, 4, 4)
    top_left = attn_ext.attention(query, key, value, mask=attn_ext.Causal(align="top_left"))
    bottom_right = attn_ext.attention(query, key, value, mask=attn_ext.Causal(align="bottom_right"))
    assert top_left[0, 0].tolist() == [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    torch.testing.assert_close(bottom_right[0, 0], torch.tensor([[1, 1, 1, 0], [0.75] * 4]) / 3)


def test_causal_rows_before_the_first_key_are_empty() -> None:
    results = run(*make_inputs(1, 2, 50, 20, 16), mask=attn_ext.Causal(align="bottom_right"))
    for name in ("out", "grad_query"):
        assert (results[name][:, :, :30] == 0).all(), name
        assert (results[name][:, :, 31:] != 0).any(), name
    assert (results["lse"][:, :, :30] == -torch.inf).all()
    assert results["lse"][:, :, 30:].isfinite().all()


@pytest.mark.sample(
    96,
    query_len=LENGTHS,
    kv_len=LENGTHS,
    left=(None, 0, 1, 16, 63, 200, 10_000),
    right=(None, 0, 0, 3, 40, 1000),
    align=ALIGNMENTS,
    head_dim=(3, 16, 33, 64),
    dtype=DTYPES,
    group=(1, 2),
)
def test_sliding_window(case: SimpleNamespace) -> None:
    mask = attn_ext.SlidingWindow(case.left, case.right, case.align)
    inputs = make_inputs(1, 2, case.query_len, case.kv_len, case.head_dim, group=case.group, dtype=case.dtype)
    check_attention(*inputs, mask=mask)


@pytest.mark.sample(
    48,
    query_len=(1, 16, 40, 77, 200),
    kv_len=(40, 97, 130, 300),
    left=(None, 0, 7, 64),
    right=(None, 0, 5, 64),
    align=ALIGNMENTS,
    other=("causal", "bottom_right", "key_lengths", "dense", "window", "all"),
    dtype=DTYPES,
)
def test_sliding_window_combinations(case: SimpleNamespace) -> None:
    others = {
        "causal": attn_ext.Causal(),
        "bottom_right": attn_ext.Causal("bottom_right"),
        "key_lengths": attn_ext.KeyLengths([5, 40, 0]),
        "dense": attn_ext.Dense(make_mask((3, 1, case.query_len, case.kv_len), torch.bool)),
        "window": attn_ext.SlidingWindow(30, 30),  # beside the bottom-right ones, so that rows are empty
    }
    mask = attn_ext.SlidingWindow(case.left, case.right, case.align)
    for other in others if case.other == "all" else (case.other,):
        mask = mask & others[other]
    check_attention(*make_inputs(3, 2, case.query_len, case.kv_len, 20, group=2, dtype=case.dtype), mask=mask)


@pytest.mark.sample(
    48,
    kv_len=LENGTHS[1:],
    query_len=(1, 4, 17, 33, 64, 130),
    dtype=DTYPES,
    group=(1, 2, 3),
    causal=(None, *ALIGNMENTS),
)
def test_key_lengths(case: SimpleNamespace) -> None:
    lengths = torch.tensor([0, case.kv_len, 1, case.kv_len // 2])
    mask = attn_ext.KeyLengths(lengths)
    if case.causal:
        mask = mask & attn_ext.Causal(align=case.causal)
    inputs = make_inputs(4, case.group, case.query_len, case.kv_len, 24, group=case.group, dtype=case.dtype)
    check_attention(*inputs, mask=mask)


def test_key_lengths_equal_slicing() -> None:
    query, key, value = make_inputs(1, 2, 21, 90, 16)
    masked = run(query, key, value, mask=attn_ext.KeyLengths(torch.tensor([37])))
    sliced = run(query, key[:, :, :37], value[:, :, :37])
    for name in ("out", "lse", "grad_query"):
        torch.testing.assert_close(masked[name], sliced[name])
    for name in ("grad_key", "grad_value"):
        assert (masked[name][:, :, 37:] == 0).all(), name
        torch.testing.assert_close(masked[name][:, :, :37], sliced[name])


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("full", range(16))
def test_dense_mask_broadcasts(mask_dtype: torch.dtype, full: int) -> None:
    sizes = (2, 4, 35, 70)
    shape = tuple(n if full >> axis & 1 else 1 for axis, n in enumerate(sizes))
    dtype = DTYPES[full % len(DTYPES)]
    mask = make_mask(shape, mask_dtype)
    check_attention(*make_inputs(*sizes, 20, group=2, dtype=dtype), mask=attn_ext.Dense(mask))


@pytest.mark.sample(
    60,
    layout=MASK_LAYOUTS,
    mask_dtype=MASK_DTYPES,
    dtype=DTYPES,
    query_len=LENGTHS[1:33],
    kv_len=LENGTHS[1:33],
    group=(1, 2, 4),
)
def test_dense_mask_strides(case: SimpleNamespace) -> None:
    mask = make_mask((2, 4, case.query_len, case.kv_len), case.mask_dtype, case.layout)
    inputs = make_inputs(2, 4, case.query_len, case.kv_len, 16, group=case.group, dtype=case.dtype)
    check_attention(*inputs, mask=attn_ext.Dense(mask))


@pytest.mark.sample(
    60,
    mask_dtype=MASK_DTYPES,
    causal=(None, *ALIGNMENTS),
    lengths=(None, (5, 40, 0)),
    query_len=(1, 16, 40, 77),
    kv_len=(40, 97, 130),
    dtype=DTYPES,
    group=(1, 2),
)
def test_combinations(case: SimpleNamespace) -> None:
    mask = attn_ext.Dense(make_mask((3, 1, case.query_len, case.kv_len), case.mask_dtype))
    if case.causal:
        mask = mask & attn_ext.Causal(align=case.causal)
    if case.lengths:
        mask = attn_ext.KeyLengths(torch.tensor(case.lengths)) & mask
    inputs = make_inputs(3, 2, case.query_len, case.kv_len, 20, group=case.group, dtype=case.dtype)
    check_attention(*inputs, mask=mask, scale=0.4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_dense_masks(dtype: torch.dtype) -> None:
    hidden, added = make_mask((1, 1, 30, 50), torch.bool), make_mask((1, 2, 1, 50), torch.float32)
    mask = attn_ext.Dense(hidden) & attn_ext.Dense(added)
    check_attention(*make_inputs(1, 2, 30, 50, 16, dtype=dtype), mask=mask)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_mask_of_the_drop_in(mask_dtype: torch.dtype, dims: int) -> None:
    query, key, value = make_inputs(2, 3, 20, 33, 16)
    mask = make_mask((2, 3, 20, 33)[-dims:], mask_dtype)
    out = attn_ext.scaled_dot_product_attention(query, key, value, mask)
    expected = reference.scaled_dot_product_attention(query, key, value, mask)
    plain = reference.scaled_dot_product_attention(query, key, value, mask, dtype=query.dtype)
    assert_within_rule(out, expected, plain, 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_additive_zero_and_boolean_true_change_nothing(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, 30, 70, 32, dtype=dtype)
    plain = run(*inputs)
    for mask in (torch.ones(1, 1, 30, 70, dtype=torch.bool), torch.zeros(1, 1, 1, 70)):
        masked = run(*inputs, mask=attn_ext.Dense(mask))
        for name, expected in plain.items():
            torch.testing.assert_close(masked[name], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_additive_minus_infinity_equals_boolean_false(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, 30, 70, 32, dtype=dtype)
    allowed = make_mask((1, 2, 30, 70), torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    boolean = run(*inputs, mask=attn_ext.Dense(allowed))
    for name, actual in run(*inputs, mask=attn_ext.Dense(additive)).items():
        torch.testing.assert_close(actual, boolean[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
def test_a_first_row_unlike_the_others(dtype: torch.dtype, first: bool) -> None:
    """The rows of a tile are not judged by the first of them."""
    allowed = torch.rand(1, 1, 40, 70) < 0.5
    allowed[:, :, 0] = first
    inputs = make_inputs(1, 2, 40, 70, 16, dtype=dtype)
    check_attention(*inputs, mask=attn_ext.Dense(allowed))
    one_different = torch.full_like(allowed, first)
    one_different[:, :, 23, 31] = not first
    check_attention(*inputs, mask=attn_ext.Dense(one_different))


def test_any_nonzero_byte_is_true() -> None:
    allowed = torch.randint(0, 3, (1, 1, 40, 70), dtype=torch.uint8)
    inputs = make_inputs(1, 2, 40, 70, 16)
    actual = attn_ext.attention(*inputs, mask=attn_ext.Dense(allowed.view(torch.bool)))
    assert torch.equal(actual, attn_ext.attention(*inputs, mask=attn_ext.Dense(allowed != 0)))
