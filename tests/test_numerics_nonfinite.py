"""NaN, Inf and extreme magnitudes: where they must not be felt, and where they must."""

from __future__ import annotations

import pytest
import torch
from problems import DTYPES, assert_same_bits, make_inputs, run
from torch import Tensor

import attn_ext
from attn_ext import reference
from attn_ext.testing import assert_within_rule, check_attention

pytestmark = pytest.mark.usefixtures("isa")

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
BAD_VALUES = (torch.nan, torch.inf, -torch.inf)


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)


def as_blocks(allowed: Tensor) -> attn_ext.BlockMask:
    return attn_ext.BlockMask.from_mask(attn_ext.Dense(allowed), *allowed.shape[-2:], block_size=(32, 16))


def hiding_masks(lengths: list[int], query_len: int, kv_len: int) -> dict[str, object]:
    """Masks that all hide, from every query of batch element b, the keys from lengths[b] on."""
    allowed = (torch.arange(kv_len) < torch.tensor(lengths).unsqueeze(-1)).view(len(lengths), 1, 1, kv_len)
    return {
        "key_lengths": attn_ext.KeyLengths(torch.tensor(lengths)),
        "boolean": attn_ext.Dense(allowed),
        "boolean_full": attn_ext.Dense(allowed.expand(-1, -1, query_len, -1).contiguous()),
        "additive": attn_ext.Dense(additive(allowed)),
        "blocks": as_blocks(allowed.expand(-1, -1, query_len, -1)),
    }


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["key_lengths", "boolean", "boolean_full", "additive", "blocks"])
def test_hidden_keys_and_values_are_never_felt(kind: str, dtype: torch.dtype, bad: float) -> None:
    lengths, query_len, kv_len = [33, 100, 0], 37, 131
    query, key, value = make_inputs(3, 4, query_len, kv_len, 24, group=2, dtype=dtype)
    poisoned_key, poisoned_value = key.clone(), value.clone()
    for batch, length in enumerate(lengths):
        poisoned_key[batch, :, length:] = bad
        poisoned_value[batch, :, length:] = bad
    mask = hiding_masks(lengths, query_len, kv_len)[kind]
    actual = run(query, poisoned_key, poisoned_value, mask=mask)
    assert_same_bits(actual, run(query, key, value, mask=mask))
    for batch, length in enumerate(lengths):
        assert (actual["grad_key"][batch, :, length:] == 0).all()
        assert (actual["grad_value"][batch, :, length:] == 0).all()


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_hidden_from_all_by_the_causal_mask_are_never_felt(dtype: torch.dtype, bad: float) -> None:
    query, key, value = make_inputs(2, 2, 45, 90, 24, dtype=dtype)
    mask = attn_ext.Causal(align="top_left")
    expected = run(query, key, value, mask=mask)
    key[:, :, 45:], value[:, :, 45:] = bad, bad
    assert_same_bits(run(query, key, value, mask=mask), expected)


@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "blocks"])
def test_rows_that_do_not_see_a_bad_key_are_unharmed(
    kind: str, dtype: torch.dtype, bad: float, where: str
) -> None:
    """The bad key is hidden from some rows of a tile and seen by others; also as seen by their gradients."""
    length, bad_at = 75, 41
    query, key, value = make_inputs(1, 2, length, length, 24, dtype=dtype)
    allowed = torch.ones(length, length, dtype=torch.bool).tril().view(1, 1, length, length)
    mask = {
        "causal": attn_ext.Causal(align="top_left"),
        "boolean": attn_ext.Dense(allowed),
        "additive": attn_ext.Dense(additive(allowed)),
        "blocks": as_blocks(allowed),
    }[kind]
    expected = run(query, key, value, mask=mask)
    if where != "value":
        key[:, :, bad_at] = bad
    if where != "key":
        value[:, :, bad_at] = bad
    actual = run(query, key, value, mask=mask)
    for name in ("out", "lse", "grad_query"):
        assert torch.equal(actual[name][:, :, :bad_at], expected[name][:, :, :bad_at]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "causal", "key_lengths", "boolean", "additive", "blocks"])
def test_scratch_memory_of_an_earlier_call_is_never_felt(kind: str, dtype: torch.dtype) -> None:
    """What lies beyond the last row of a tile is whatever the call before left there: NaN, here."""
    nans = tuple(torch.full((1, 2, 300, 64), torch.nan, dtype=dtype) for _ in range(3))
    for query_len, kv_len, head_dim in [(1, 1, 16), (7, 5, 24), (33, 50, 40), (70, 191, 64)]:
        inputs = make_inputs(1, 2, query_len, kv_len, head_dim, group=2, dtype=dtype)
        allowed = torch.rand(1, 2, query_len, kv_len) < 0.75
        mask = {
            "none": None,
            "causal": attn_ext.Causal(align="top_left"),
            "key_lengths": attn_ext.KeyLengths([kv_len // 2]),
            "boolean": attn_ext.Dense(allowed),
            "additive": attn_ext.Dense(additive(allowed)),
            "blocks": as_blocks(allowed),
        }[kind]
        expected = run(*inputs, mask=mask)
        run(*nans)
        assert_same_bits(run(*inputs, mask=mask), expected)
        assert all(expected[name].isfinite().all() for name in expected if name != "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_len", [1, 20, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_in_an_attended_key_propagates(dtype: torch.dtype, kv_len: int, masked: bool) -> None:
    query, key, value = make_inputs(1, 2, 20, kv_len, 16, dtype=dtype)
    key[0, 0, kv_len // 2, 3] = torch.nan
    mask = attn_ext.Causal(align="bottom_right") if masked else None
    out, lse = attn_ext.attention(query, key, value, mask=mask, return_lse=True)
    assert out[0, 0, -1].isnan().all()
    assert lse[0, 0, -1].isnan()
    assert out[0, 1].isfinite().all()
    grads = run(query, key, value, mask=mask)
    assert grads["grad_query"][0, 0, -1].isnan().all()
    assert grads["grad_query"][0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_query_stays_in_its_row(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 2, 20, 50, 16, dtype=dtype)
    expected = attn_ext.attention(query, key, value)
    query[0, 0, 7, 2] = torch.nan
    out = attn_ext.attention(query, key, value)
    assert out[0, 0, 7].isnan().all()
    out[0, 0, 7] = expected[0, 0, 7]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_an_attended_value_stays_in_its_column(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 1, 20, 50, 16, dtype=dtype)
    expected = attn_ext.attention(query, key, value)
    value[0, 0, 9, 4] = torch.nan
    out = attn_ext.attention(query, key, value)
    assert out[..., 4].isnan().all()
    out[..., 4] = expected[..., 4]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["boolean", "additive", "key_lengths", "blocks"])
def test_fully_masked_rows(kind: str, dtype: torch.dtype) -> None:
    query, key, value = make_inputs(2, 2, 40, 60, 16, dtype=dtype)
    if kind == "key_lengths":
        dead = torch.tensor([True, False]).view(2, 1, 1).expand(2, 2, 40)
        mask = attn_ext.KeyLengths(torch.tensor([0, 60]))
    else:
        dead = torch.rand(2, 2, 40) < 0.3
        allowed = ~dead.unsqueeze(-1).expand(2, 2, 40, 60)
        mask = {
            "boolean": attn_ext.Dense(allowed),
            "additive": attn_ext.Dense(additive(allowed)),
            "blocks": as_blocks(allowed),
        }[kind]
    results = run(query, key, value, mask=mask, grad_lse=torch.randn(2, 2, 40))
    assert (results["out"][dead] == 0).all()
    assert (results["lse"][dead] == -torch.inf).all()
    assert (results["grad_query"][dead] == 0).all()
    check_attention(query, key, value, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_grad_out_of_a_fully_masked_row_is_never_felt(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 1, 40, 20, 16, dtype=dtype)
    mask = attn_ext.Causal(align="bottom_right")
    grad_out, grad_lse = torch.randn(1, 1, 40, 16, dtype=dtype), torch.randn(1, 1, 40)
    expected = run(query, key, value, mask=mask, grad_out=grad_out, grad_lse=grad_lse)
    grad_out[:, :, :20], grad_lse[:, :, :20] = torch.nan, torch.inf
    assert_same_bits(run(query, key, value, mask=mask, grad_out=grad_out, grad_lse=grad_lse), expected)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("kv_len", [7, 130])
def test_rows_masked_by_a_large_finite_bias(dtype: torch.dtype, bias: float, kv_len: int) -> None:
    """The bias absorbs the scores: the weights become equal, and the gradients must know it."""
    inputs = make_inputs(1, 2, 37, kv_len, 16, dtype=dtype)
    mask = torch.zeros(1, 1, 37, kv_len)
    mask[:, :, 5:20] = bias
    mask[:, :, 20:, : kv_len // 2] = bias
    grad_out = torch.randn(1, 2, 37, 16, dtype=dtype)
    actual = run(*inputs, mask=attn_ext.Dense(mask), grad_out=grad_out)
    # In float64 it takes a larger bias to absorb a score, in float16 there is none as large.
    absorbing = torch.where(mask < 0, -1e30, 0).double()
    expected = explicit_results(inputs, absorbing, grad_out, torch.float64)
    plain = explicit_results(inputs, mask.clamp(min=torch.finfo(dtype).min), grad_out, dtype)
    for name, exact in expected.items():
        if dtype == torch.float32:
            torch.testing.assert_close(actual[name], exact.float())
        else:
            assert_within_rule(actual[name], exact, plain[name], 2.0 if name == "out" else 3.0, name)


def explicit_results(
    inputs: tuple[Tensor, ...], mask: Tensor, grad_out: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients by the reference, in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = reference.attention(*leaves, mask=mask, dtype=dtype)
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype))
    return dict(zip(("out", "grad_query", "grad_key", "grad_value"), (out.detach(), *grads), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_a_large_bias_of_a_whole_row_shifts_only_lse(dtype: torch.dtype, offset: float) -> None:
    mask = torch.zeros(1, 1, 37, 1)
    mask[:, :, 5:20] = offset
    check_attention(*make_inputs(1, 2, 37, 130, 16, dtype=dtype), mask=attn_ext.Dense(mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_scores(dtype: torch.dtype, magnitude: float, causal: bool) -> None:
    mask = attn_ext.Causal(align="bottom_right") if causal else None
    check_attention(*make_inputs(1, 2, 40, 130, 16, dtype=dtype), mask=mask, scale=magnitude)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_huge_equal_scores(dtype: torch.dtype, offset: float) -> None:
    """Where the log-sum-exp absorbs log(Lk), the weights of the backward pass must still sum to 1."""
    query = torch.full((1, 1, 20, 4), 2.0, dtype=dtype)
    key = torch.full((1, 1, 70, 4), 1.0, dtype=dtype)
    value = torch.randn(1, 1, 70, 8, dtype=dtype)
    results = run(query, key, value, scale=offset)
    mean = value.double().mean(2, keepdim=True)
    torch.testing.assert_close(results["out"].double(), mean.expand(1, 1, 20, 8), rtol=0.01, atol=0.01)
    expected = torch.full((1, 1, 70, 8), 20 / 70, dtype=dtype)
    torch.testing.assert_close(results["grad_value"], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_near_the_largest_number(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 1, 20, 70, 16, dtype=dtype)
    value = torch.where(value > 0, 1, -1).to(dtype) * (torch.finfo(dtype).max * 0.9)
    out = attn_ext.attention(query, key, value)
    unit = attn_ext.attention(query, key, value / torch.finfo(dtype).max)
    assert out.isfinite().all()
    torch.testing.assert_close(out / torch.finfo(dtype).max, unit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_inputs(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    query, key, value = make_inputs(1, 1, 20, 70, 16, dtype=dtype)
    check_attention(query * tiny, key, value)
    check_attention(query, key * tiny, value)
    # Sums are kept 2^20 below the output, lest they overflow: the smallest values lose precision.
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    check_attention(query, key, value * max(tiny, accumulated * 2**30))
    value = value * tiny
    error = attn_ext.attention(query, key, value).double() - reference.attention(query, key, value)
    assert error.abs().max() <= 2 * tiny


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dead", [1, 100, 600, 1030])
@pytest.mark.parametrize("kind", ["boolean", "additive", "blocks"])
def test_dead_keys_before_live_ones(dtype: torch.dtype, dead: int, kind: str) -> None:
    """Whole tiles without a visible key: the running maximum is still -inf when the first live key comes."""
    query, key, value = make_inputs(1, 1, 20, 1100, 16, dtype=dtype)
    allowed = (torch.arange(1100) >= dead).expand(1, 1, 20, 1100).contiguous()
    mask = {
        "boolean": attn_ext.Dense(allowed),
        "additive": attn_ext.Dense(additive(allowed)),
        "blocks": as_blocks(allowed),
    }[kind]
    check_attention(query, key, value, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_grow_along_the_keys(dtype: torch.dtype) -> None:
    """Every tile raises the maximum: all earlier sums are rescaled again and again."""
    query, key, value = make_inputs(1, 1, 20, 700, 16, dtype=dtype)
    ramp = torch.linspace(-40, 40, 700, dtype=torch.float32).view(1, 1, 1, 700)
    check_attention(query, key, value, mask=attn_ext.Dense(ramp))
    check_attention(query, key, value, mask=attn_ext.Dense(ramp.flip(-1)))


@pytest.mark.parametrize("query_len", range(1, 9))
@pytest.mark.parametrize("masked", [False, True])
def test_a_visible_key_of_weight_zero_may_be_infinite(query_len: int, masked: bool) -> None:
    """However many lanes of a vector the queries leave idle."""
    query = -torch.rand(1, 1, query_len, 8) - 0.1
    key, value = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    key[..., 0, :] = 0
    key[..., 0, 0] = torch.inf
    mask = attn_ext.KeyLengths([4]) if masked else None
    results = run(query, key, value, mask=mask)
    without = run(query, key[:, :, 1:], value[:, :, 1:], mask=attn_ext.KeyLengths([3]) if masked else None)
    torch.testing.assert_close(results["out"], without["out"])
    for name in ("grad_key", "grad_value"):
        assert (results[name][:, :, 0] == 0).all(), name
        torch.testing.assert_close(results[name][:, :, 1:], without[name])


@pytest.mark.parametrize("query_len", [1, 8, 20])
@pytest.mark.parametrize("kv_len", [12, 13, 16, 17])
def test_nan_of_weight_zero_does_not_depend_on_the_length(query_len: int, kv_len: int) -> None:
    query = torch.ones(1, 1, query_len, 16)
    key, value = torch.zeros(1, 1, kv_len, 16), torch.ones(1, 1, kv_len, 16)
    key[..., 0, 0], key[..., 1, 0], value[..., 0, :] = -100, 100, torch.nan
    assert attn_ext.attention(query, key, value, scale=1).isnan().all()


def test_a_bad_key_beside_queries_that_see_nothing_of_its_range() -> None:
    """With several ranges of keys, some queries of a tile have no part in one: nothing of them is read."""
    query, key, value = make_inputs(1, 1, 1200, 1200, 16)
    key[:, :, 450] = torch.nan
    torch.set_num_threads(2)
    results = run(query, key, value, mask=attn_ext.Causal())
    for name in ("out", "grad_query"):
        assert results[name][:, :, :450].isfinite().all(), name
        assert results[name][:, :, 450:].isnan().all(), name
