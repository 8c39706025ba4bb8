"""Inputs, masks' neighbours and gradients that do not lie densely in memory, and where the outputs lie."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest
import torch
from problems import DTYPES, assert_same_bits, make_inputs, run
from torch import Tensor

import attn_ext
from attn_ext.testing import check_attention

pytestmark = pytest.mark.usefixtures("isa")


def heads_last(tensor: Tensor) -> Tensor:
    """(B, H, L, D) whose memory order is (B, L, H, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def heads_outermost(tensor: Tensor) -> Tensor:
    """(B, H, L, D) whose memory order is (H, L, B, D)."""
    return tensor.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def columns_strided(tensor: Tensor) -> Tensor:
    """Every second element of a wider tensor."""
    return torch.stack((tensor, tensor + 1), dim=-1).flatten(-2)[..., ::2]


def columns_first(tensor: Tensor) -> Tensor:
    """(B, H, L, D) whose memory order is (B, H, D, L)."""
    return tensor.mT.contiguous().mT


def sliced(tensor: Tensor) -> Tensor:
    """The middle of a larger tensor: an odd row stride and a pointer aligned to nothing but its element."""
    wide = torch.nn.functional.pad(tensor, (1, 2, 1, 1, 1, 1))
    return wide[:, 1:-1, 1:-1, 1:-2]


def packed(tensor: Tensor) -> Tensor:
    """One third of a projection that holds query, key and value side by side."""
    return torch.stack((tensor, tensor + 1, tensor + 2), dim=3)[:, :, :, 0]


def one_row_for_all(tensor: Tensor) -> Tensor:
    """Rows with stride 0."""
    return tensor[:, :, :1].expand(tensor.shape)


def one_head_for_all(tensor: Tensor) -> Tensor:
    """Batch and heads with stride 0."""
    return tensor[:1, :1].expand(tensor.shape)


LAYOUTS = (
    torch.Tensor.contiguous,
    heads_last,
    heads_outermost,
    columns_strided,
    columns_first,
    sliced,
    packed,
    one_row_for_all,
    one_head_for_all,
)


@pytest.mark.sample(
    72,
    query=LAYOUTS,
    key=LAYOUTS,
    value=LAYOUTS,
    query_len=(2, 17, 33, 70),
    kv_len=(3, 31, 50, 100),
    head_dim=(1, 5, 16, 40, 64),
    dtype=DTYPES,
    causal=(None, "top_left", "bottom_right"),
    group=(1, 2),
)
def test_inputs(case: SimpleNamespace) -> None:
    query, key, value = make_inputs(
        2, 4, case.query_len, case.kv_len, case.head_dim, group=case.group, dtype=case.dtype
    )
    mask = attn_ext.Causal(align=case.causal) if case.causal else None
    check_attention(case.query(query), case.key(key), case.value(value), mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_as_contiguous(layout, dtype: torch.dtype) -> None:
    inputs = tuple(layout(t) for t in make_inputs(2, 4, 40, 75, 24, group=2, dtype=dtype))
    assert_same_bits(run(*inputs), run(*(t.contiguous() for t in inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_out(layout, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 4, 40, 75, 24, value_dim=16, group=2, dtype=dtype)
    grad_out = layout(torch.randn(2, 4, 40, 16, dtype=dtype))
    check_attention(*inputs, grad_out=grad_out)
    assert_same_bits(run(*inputs, grad_out=grad_out), run(*inputs, grad_out=grad_out.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_of_sum(dtype: torch.dtype) -> None:
    """The gradient of a sum is one element with stride 0 everywhere."""
    inputs = make_inputs(2, 2, 20, 30, 16, dtype=dtype)
    leaves = [t.requires_grad_() for t in inputs]
    out, lse = attn_ext.attention(*leaves, return_lse=True)
    gradients = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    expected = run(*inputs, grad_lse=torch.ones_like(lse))
    for name, actual in zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True):
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("grad_layout", ["contiguous", "transposed", "expanded"])
def test_grad_lse(grad_layout: str) -> None:
    inputs = make_inputs(2, 4, 20, 30, 16, group=2)
    grad_lse = {
        "contiguous": torch.randn(2, 4, 20),
        "transposed": torch.randn(20, 4, 2).permute(2, 1, 0),
        "expanded": torch.randn(2, 1, 1).expand(2, 4, 20),
    }[grad_layout]
    assert_same_bits(run(*inputs, grad_lse=grad_lse), run(*inputs, grad_lse=grad_lse.contiguous()))


def expected_strides(shape: tuple[int, ...], model: Tensor) -> tuple[int, ...]:
    """Dense, (B, L, H, D) in memory if the model is so, (B, H, L, D) otherwise."""
    _, heads, length, columns = shape
    if model.size(1) > 1 and model.size(2) > 1 and model.stride(1) < model.stride(2):
        return (length * heads * columns, columns, heads * columns, 1)
    return (heads * length * columns, length * columns, columns, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_lie_like_their_models(layout, dtype: torch.dtype) -> None:
    query, key, value = (layout(t) for t in make_inputs(2, 4, 9, 11, 8, value_dim=6, group=2, dtype=dtype))
    results = run(query, key, value)
    models = {"out": query, "grad_query": query, "grad_key": key, "grad_value": value}
    for name, model in models.items():
        assert results[name].stride() == expected_strides(results[name].shape, model), name
    assert results["lse"].is_contiguous()


def test_transposed_inputs_give_an_output_whose_transpose_is_contiguous() -> None:
    query, key, value = (heads_last(t) for t in make_inputs(2, 4, 9, 11, 8))
    assert attn_ext.attention(query, key, value).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(dtype: torch.dtype) -> None:
    """Rows that lie 2^31 elements apart, in memory that is reserved but, beyond those rows, never touched."""
    stride = 2**31 // 3 + 1
    storage = torch.empty(3 * stride + 64, dtype=dtype)
    rows = torch.as_strided(storage, (1, 1, 4, 16), (0, 0, stride, 1))
    rows.copy_(torch.randn(rows.shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query, key, value = make_inputs(1, 1, 4, 4, 16, dtype=dtype)
    for far in ((rows, key, value), (query, rows, value), (query, key, rows), (rows, rows, rows)):
        check_attention(*far, mask=attn_ext.Causal(align="top_left"))
        assert_same_bits(run(*far), run(*(t.contiguous() for t in far)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


def test_mask_offsets_beyond_32_bits() -> None:
    stride = 2**31 // 3 + 1
    storage = torch.empty(3 * stride + 64, dtype=torch.bool)
    mask = torch.as_strided(storage, (1, 1, 4, 16), (0, 0, stride, 1))
    mask.copy_(torch.rand(mask.shape) < 0.7)
    check_attention(*make_inputs(1, 1, 4, 16, 16), mask=attn_ext.Dense(mask))
