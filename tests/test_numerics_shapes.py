"""Every length, head dimension, head count and dtype, without a mask and with the plain causal one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from problems import DTYPES, GROUPS, HEAD_DIMS, LENGTHS, SMALL_HEAD_DIMS, make_inputs, run

import attn_ext
from attn_ext.testing import check_attention

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.sample(
    160,
    query_len=LENGTHS,
    kv_len=LENGTHS,
    head_dim=SMALL_HEAD_DIMS,
    dtype=DTYPES,
    heads=(1, 2),
    causal=(None, "top_left", "bottom_right"),
)
def test_lengths(case: SimpleNamespace) -> None:
    inputs = make_inputs(1, case.heads, case.query_len, case.kv_len, case.head_dim, dtype=case.dtype)
    check_attention(*inputs, mask=attn_ext.Causal(align=case.causal) if case.causal else None)


@pytest.mark.sample(
    108,
    head_dim=HEAD_DIMS,
    value_dim=HEAD_DIMS,
    query_len=(1, 3, 17, 32, 67),
    kv_len=(2, 12, 50, 97, 131),
    dtype=DTYPES,
)
def test_head_dims(case: SimpleNamespace) -> None:
    sizes = (1, 2, case.query_len, case.kv_len, case.head_dim)
    check_attention(*make_inputs(*sizes, value_dim=case.value_dim, dtype=case.dtype))


@pytest.mark.sample(
    48,
    group=GROUPS,
    kv_heads=(1, 2, 3),
    batch=(1, 2, 3),
    query_len=(1, 2, 9, 33, 70),
    kv_len=(1, 10, 40, 100, 200),
    head_dim=(4, 16, 40, 64),
    causal=(True, False),
    dtype=DTYPES,
)
def test_grouped_heads(case: SimpleNamespace) -> None:
    inputs = make_inputs(
        case.batch,
        case.kv_heads * case.group,
        case.query_len,
        case.kv_len,
        case.head_dim,
        group=case.group,
        dtype=case.dtype,
    )
    check_attention(*inputs, mask=attn_ext.Causal(align="bottom_right") if case.causal else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, 700, 1100, 64, dtype=dtype)
    check_attention(*inputs)
    check_attention(*inputs, mask=attn_ext.Causal(align="bottom_right"))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 0.05, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_scales(scale: float, dtype: torch.dtype, causal: bool) -> None:
    mask = attn_ext.Causal(align="top_left") if causal else None
    check_attention(*make_inputs(1, 2, 45, 70, 24, dtype=dtype), mask=mask, scale=scale)


def test_scale_of_the_default() -> None:
    query, key, value = make_inputs(1, 1, 20, 30, 20)
    default = attn_ext.attention(query, key, value)
    assert torch.equal(default, attn_ext.attention(query, key, value, scale=20**-0.5))
    assert not torch.allclose(default, attn_ext.attention(query, key, value, scale=1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "query_len", "kv_len"),
    [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0), (0, 0, 0, 0)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_empty(dtype: torch.dtype, batch: int, heads: int, query_len: int, kv_len: int, causal: bool) -> None:
    mask = attn_ext.Causal(align="bottom_right") if causal else None
    inputs = make_inputs(batch, heads, query_len, kv_len, 8, value_dim=5, dtype=dtype)
    results = run(*inputs, mask=mask)
    assert results["out"].shape == (batch, heads, query_len, 5)
    assert results["lse"].shape == (batch, heads, query_len)
    assert (results["out"] == 0).all()
    assert (results["lse"] == -torch.inf).all()
    for name in ("grad_query", "grad_key", "grad_value"):
        assert (results[name] == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_dtype(dtype: torch.dtype) -> None:
    _, lse = attn_ext.attention(*make_inputs(1, 1, 4, 4, 8, dtype=dtype), return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_returns_its_value(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(2, 3, 19, 1, 32, dtype=dtype)
    assert torch.equal(attn_ext.attention(query, key, value), value.expand(2, 3, 19, 32))


def test_keys_without_queries_have_gradient_zero() -> None:
    """No query head is a multiple of two key heads, too."""
    query = torch.randn(1, 0, 5, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(2))
    junk = [torch.full((1, 2, 50, 8), 7.0) for _ in range(8)]
    del junk  # what the allocator hands out next
    grads = torch.autograd.grad(attn_ext.attention(query, key, value).sum(), (query, key, value))
    assert all((grad == 0).all() for grad in grads)
