"""Gradients: against finite differences, for subsets of the inputs, and how exact they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import DTYPES, make_inputs, run

import attn_ext
from attn_ext import reference

pytestmark = pytest.mark.usefixtures("isa")


def gradcheck_masks(batch: int, heads: int, query_len: int, kv_len: int) -> dict[str, object]:
    allowed = torch.rand(batch, heads, query_len, kv_len) < 0.7
    allowed[:, :, 0] = False
    bias = torch.randn(1, heads, query_len, kv_len, dtype=torch.float64)
    lengths = torch.tensor([0, kv_len - 2][:batch])
    return {
        "none": None,
        "top_left": attn_ext.Causal(align="top_left"),
        "bottom_right": attn_ext.Causal(align="bottom_right"),
        "key_lengths": attn_ext.KeyLengths(lengths),
        "boolean": attn_ext.Dense(allowed),
        "additive": attn_ext.Dense(bias),
        "all": attn_ext.Causal(align="top_left") & attn_ext.KeyLengths(lengths) & attn_ext.Dense(bias),
    }


@pytest.mark.parametrize(
    "kind", ["none", "top_left", "bottom_right", "key_lengths", "boolean", "additive", "all"]
)
@pytest.mark.parametrize(("query_len", "kv_len", "group"), [(5, 4, 1), (3, 6, 2)])
def test_gradcheck(kind: str, query_len: int, kv_len: int, group: int) -> None:
    inputs = make_inputs(2, 2, query_len, kv_len, 3, value_dim=2, group=group, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in inputs)
    mask = gradcheck_masks(2, 2, query_len, kv_len)[kind]

    def outputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attn_ext.attention(*inputs, mask=mask, scale=0.8, return_lse=True)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("kind", ["none", "bottom_right", "boolean"])
def test_gradient_of_lse_alone(kind: str) -> None:
    inputs = make_inputs(2, 2, 20, 40, 16, dtype=torch.float64)
    mask = gradcheck_masks(2, 2, 20, 40)[kind]
    leaves = [t.requires_grad_() for t in inputs]
    lse = attn_ext.attention(*leaves, mask=mask, return_lse=True)[1]
    expected = reference.attention(*leaves, mask=mask, return_lse=True)[1]
    grad = torch.randn(lse.shape, dtype=torch.float64)
    actual = torch.autograd.grad(lse, leaves[:2], grad)
    for a, e in zip(actual, torch.autograd.grad(expected, leaves[:2], grad), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_some_inputs(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 4, 20, 40, 16, group=2, dtype=dtype)
    grad_out = torch.randn(2, 4, 20, 16, dtype=dtype)
    everything = run(*inputs, grad_out=grad_out)
    names = ("grad_query", "grad_key", "grad_value")
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        out = attn_ext.attention(*leaves)
        assert out.requires_grad == any(wanted)
        if out.requires_grad:
            out.backward(grad_out)
        for leaf, name, want in zip(leaves, names, wanted, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                assert torch.equal(leaf.grad, everything[name]), name


def test_gradients_accumulate_over_two_uses() -> None:
    inputs = make_inputs(1, 2, 20, 40, 16)
    once = run(*inputs)
    leaves = [t.requires_grad_() for t in inputs]
    (attn_ext.attention(*leaves).sum() + attn_ext.attention(*leaves).sum()).backward()
    for leaf, name in zip(leaves, ("grad_query", "grad_key", "grad_value"), strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once[name])


def test_one_tensor_as_query_key_and_value() -> None:
    x = torch.randn(1, 2, 30, 16, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(attn_ext.attention(x, x, x).square().sum(), x)
    (expected,) = torch.autograd.grad(reference.attention(x, x, x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_no_graph_without_gradients() -> None:
    inputs = make_inputs(1, 2, 20, 40, 16)
    assert attn_ext.attention(*inputs).grad_fn is None
    leaves = [t.requires_grad_() for t in inputs]
    with torch.no_grad():
        quiet = attn_ext.attention(*leaves)
    assert quiet.grad_fn is None
    assert torch.equal(quiet, attn_ext.attention(*leaves))


@pytest.mark.parametrize("changed", range(3))
def test_changing_a_saved_input_is_an_error(changed: int) -> None:
    leaves = [t.requires_grad_() for t in make_inputs(1, 2, 20, 40, 16)]
    inputs = [t * 1 for t in leaves]
    out = attn_ext.attention(*inputs)
    with torch.no_grad():
        inputs[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changing_the_saved_output_is_an_error() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(1, 2, 20, 40, 16)]
    out = attn_ext.attention(*leaves)
    total = out.sum()
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_half_precision_gradients_are_nearly_as_exact_as_their_dtype(
    dtype: torch.dtype, causal: bool, group: int
) -> None:
    """At most twice the error of rounding the exact result: nothing accumulates in half precision."""
    inputs = make_inputs(1, 4, 256, 300, 64, group=group, dtype=dtype)
    mask = attn_ext.Causal(align="bottom_right") if causal else None
    grad_out = torch.randn(1, 4, 256, 64, dtype=dtype)
    actual = run(*inputs, mask=mask, grad_out=grad_out)
    leaves = [t.double().requires_grad_() for t in inputs]
    out = reference.attention(*leaves, mask=mask)
    expected = (out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()))
    for name, exact in zip(("out", "grad_query", "grad_key", "grad_value"), expected, strict=True):
        error, rounding = relative_error(actual[name], exact), relative_error(exact.to(dtype), exact)
        assert error <= 2 * rounding, f"{name}: {error:.2e}, rounding alone {rounding:.2e}"
