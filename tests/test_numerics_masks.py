"""Masks of every kind, dense ones of every dtype, shape and stride, alone and combined."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


# --- Prefixes, segments, unions -----------------------------------------------------------------------------
# Masks and, beside them, what they mean: functions of the batch entry, the query and the key.

BATCH = 3


class Meaning:
    """A mask and the pairs it should allow; `&` and `|` act on both."""

    def __init__(self, mask: attn_ext.Mask, allowed: Tensor) -> None:
        self.mask, self.allowed = mask, allowed  # (BATCH, Lq, Lk)

    def __and__(self, other: Meaning) -> Meaning:
        return Meaning(self.mask & other.mask, self.allowed & other.allowed)

    def __or__(self, other: Meaning) -> Meaning:
        return Meaning(self.mask | other.mask, self.allowed | other.allowed)


def indices(query_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    entry, query, key = torch.arange(BATCH), torch.arange(query_len), torch.arange(kv_len)
    return torch.broadcast_tensors(entry[:, None, None], query[:, None], key)


def meanings(query_len: int, kv_len: int) -> dict[str, Meaning]:
    b, i, j = indices(query_len, kv_len)
    position = i + kv_len - query_len
    lengths = torch.tensor([kv_len, kv_len // 3, 0])
    sorted_queries, sorted_keys = torch.arange(query_len) * 4 // query_len, torch.arange(kv_len) * 4 // kv_len
    queries, keys = torch.randint(-2, 3, (BATCH, query_len)), torch.randint(-2, 3, (BATCH, kv_len))
    some = torch.rand(BATCH, query_len, kv_len) < 0.3
    return {
        "causal": Meaning(attn_ext.Causal(), j <= i),
        "causal_end": Meaning(attn_ext.Causal("bottom_right"), j <= position),
        "window": Meaning(attn_ext.SlidingWindow(8, 0), (i - 8 <= j) & (j <= i)),
        "window_end": Meaning(
            attn_ext.SlidingWindow(20, 3, "bottom_right"), (position - 20 <= j) & (j <= position + 3)
        ),
        "prefix_0": Meaning(attn_ext.Prefix(0), j < 0),
        "prefix_5": Meaning(attn_ext.Prefix(5), j < 5),
        "prefix_90": Meaning(attn_ext.Prefix(90), j < 90),
        "prefix_all": Meaning(attn_ext.Prefix(2**40), j >= 0),
        "lengths": Meaning(attn_ext.KeyLengths(lengths), j < lengths[b]),
        "documents": Meaning(
            attn_ext.Segments(sorted_queries, sorted_keys), sorted_queries[i] == sorted_keys[j]
        ),
        "segments": Meaning(attn_ext.Segments(queries, keys), queries[b, i] == keys[b, j]),
        "dense": Meaning(attn_ext.Dense(some[:, None]), some),
    }


EXPRESSIONS = (
    *("prefix_0", "prefix_5", "prefix_90", "prefix_all", "documents", "segments"),
    "causal | prefix_5",
    "causal_end | prefix_90",
    "window | prefix_5",
    "window | prefix_0",
    "window_end | window",
    "prefix_5 | prefix_90",
    "causal | prefix_all",
    "window | prefix_5 | window_end",
    "window | prefix_5 | window_end | documents",
    "window & causal | prefix_5",
    "(causal | prefix_90) & lengths",
    "(window | prefix_5) & causal_end",
    "(window | prefix_5) & (window_end | prefix_90)",
    "(window | prefix_5) & segments",
    "(window | prefix_5) & segments & documents & lengths",
    "(causal & documents) | prefix_5",
    "((window | prefix_5) & lengths) | (causal & documents)",
    "((window | prefix_5) & causal_end) | lengths & documents",
    "segments & documents & causal",
    "segments & prefix_90",
    "segments & dense",
    "dense | causal",
    "dense | segments | window",
    "dense & lengths | documents",
    "(dense | window) & (causal | prefix_5) & segments",
)


@pytest.mark.sample(
    2 * len(EXPRESSIONS),
    expression=EXPRESSIONS,
    query_len=(1, 7, 40, 64, 100, 131, 300),
    kv_len=(5, 33, 97, 128, 200, 300, 450),
    dtype=DTYPES,
    group=(1, 2, 4),
    head_dim=(8, 20, 64),
)
def test_expressions(case: SimpleNamespace) -> None:
    meaning = eval(case.expression, {}, meanings(case.query_len, case.kv_len))
    dense = meaning.mask.to_dense(BATCH, 4, case.query_len, case.kv_len)
    assert torch.equal(dense, meaning.allowed.unsqueeze(1).expand_as(dense))
    inputs = make_inputs(
        *(BATCH, 4, case.query_len, case.kv_len, case.head_dim), group=case.group, dtype=case.dtype
    )
    check_attention(*inputs, mask=meaning.mask)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_equal_boolean_masks(expression: str) -> None:
    """Also as to what is outside: no number of a hidden key is read into a result."""
    meaning = eval(expression, {}, meanings(131, 200))
    boolean = attn_ext.Dense(meaning.allowed.unsqueeze(1))
    query, key, value = make_inputs(BATCH, 2, 131, 200, 16)
    expected = run(query, key, value, mask=boolean)
    for name, actual in run(query, key, value, mask=meaning.mask).items():
        torch.testing.assert_close(actual, expected[name])
    unseen = ~meaning.allowed.any(1)[:, None, :, None]
    key, value = (torch.where(unseen, torch.nan, t) for t in (key, value))
    for name, actual in run(query, key, value, mask=meaning.mask).items():
        torch.testing.assert_close(actual, expected[name])


SEGMENTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "sorted": lambda: (torch.arange(60) // 13, torch.arange(150) // 30),
    "unsorted": lambda: (torch.randint(5, (60,)), torch.randint(5, (150,))),
    "negative": lambda: (torch.randint(-3, 3, (60,)), torch.randint(-3, 3, (150,))),
    "limits": lambda: (
        torch.tensor([-(2**31), 2**31 - 1, 0]).repeat(20),
        torch.tensor([2**31 - 1, -(2**31)]).repeat(75),
    ),
    "disjoint": lambda: (torch.zeros(60).int(), torch.ones(150).int()),
    "each_its_own": lambda: (torch.arange(60), torch.arange(150)),
    "per_entry": lambda: (torch.randint(3, (2, 60)), torch.randint(3, (2, 150))),
    "per_entry_queries": lambda: (torch.randint(3, (2, 60)), torch.randint(3, (150,))),
    "per_entry_keys": lambda: (torch.randint(3, (1, 60)), torch.randint(3, (2, 150))),
    "small_integers": lambda: (torch.randint(3, (60,)).to(torch.int8), torch.randint(3, (150,)).short()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(name: str, dtype: torch.dtype) -> None:
    query_ids, kv_ids = SEGMENTS[name]()
    mask = attn_ext.Segments(query_ids, kv_ids)
    expected = query_ids.unsqueeze(-1) == kv_ids.unsqueeze(-2)
    expected = expected.view(-1, 1, 60, 150).expand(2, 4, 60, 150)
    assert torch.equal(mask.to_dense(2, 4, 60, 150), expected)
    check_attention(*make_inputs(2, 4, 60, 150, 20, group=2, dtype=dtype), mask=mask)


def test_segments_of_queries_and_keys_alike() -> None:
    ids = torch.randint(3, (2, 70))
    one, both = attn_ext.Segments(ids), attn_ext.Segments(ids, ids)
    inputs = make_inputs(2, 2, 70, 70, 16)
    assert torch.equal(attn_ext.attention(*inputs, mask=one), attn_ext.attention(*inputs, mask=both))


@pytest.mark.parametrize(("query_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_segments_of_nothing(query_len: int, kv_len: int) -> None:
    mask = attn_ext.Segments(*(torch.zeros(n, dtype=torch.int32) for n in (query_len, kv_len)))
    check_attention(*make_inputs(2, 2, query_len, kv_len, 8), mask=mask | attn_ext.Prefix(3))
    check_attention(*make_inputs(2, 2, query_len, kv_len, 8), mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_equal_each_alone(dtype: torch.dtype) -> None:
    lengths = (40, 1, 100, 64, 7)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = make_inputs(1, 4, sum(lengths), sum(lengths), 16, group=2, dtype=dtype)
    packed = run(*inputs, mask=attn_ext.Segments(ids) & attn_ext.Causal())
    begin = 0
    for length in lengths:
        alone = run(*(t[:, :, begin : begin + length] for t in inputs), mask=attn_ext.Causal())
        for name, expected in alone.items():
            actual = packed[name][:, :, begin : begin + length]
            tolerance = None if dtype.itemsize > 2 else 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        begin += length


def process_time(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


@pytest.mark.parametrize("backward", [False, True])
def test_tiles_that_nothing_sees_are_skipped(backward: bool) -> None:
    length = 4096
    inputs = make_inputs(1, 1, length, length, 32)
    ids = torch.arange(length) * 8 // length
    masks = {
        "full": None,
        "window": attn_ext.SlidingWindow(256, 0) | attn_ext.Prefix(4),
        "documents": attn_ext.Segments(ids),
        "causal documents": attn_ext.Segments(ids) & attn_ext.Causal(),
        "union of documents": attn_ext.Segments(ids) | attn_ext.Prefix(4),
    }
    function = run if backward else attn_ext.attention
    times: dict[str, list[float]] = {name: [] for name in masks}
    for _ in range(3):
        for name, mask in masks.items():
            times[name].append(process_time(lambda mask=mask: function(*inputs, mask=mask)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        assert name == "full" or median < 0.5 * medians["full"], medians
