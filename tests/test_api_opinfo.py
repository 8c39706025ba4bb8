"""Torch's own samples of scaled_dot_product_attention, and more: forward, derivatives, errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")

(OPINFO,) = (op for op in invocations.op_db if op.name == "nn.functional.scaled_dot_product_attention")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# (query, key, value), and options: groups of heads, and values wider or narrower than keys.
OWN = {
    "gqa": (((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), {"enable_gqa": True}),
    "gqa and Ev": (((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 7)), {"enable_gqa": True, "is_causal": True}),
    "mqa": (((2, 3, 3, 4), (2, 1, 5, 4), (2, 1, 5, 2)), {"enable_gqa": True, "scale": 0.3}),
    "wide values": (((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 9)), {"is_causal": True}),
    "narrow values": (((2, 3, 4), (2, 5, 4), (2, 5, 1)), {"scale": -1.0}),
    "float mask": (((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)), {"attn_mask": (2, 1, 3, 5)}),
    "gqa and float mask": (
        ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)),
        {"attn_mask": (4, 1, 5), "enable_gqa": True},
    ),
}


def make_own(
    shapes: tuple, options: dict[str, Any], dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any]]:
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.randn(options["attn_mask"], dtype=dtype, requires_grad=True)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], options


def all_samples(dtype: torch.dtype) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=True):
        yield [sample.input, *sample.args], dict(sample.kwargs)
    for shapes, options in OWN.values():
        yield make_own(shapes, options, dtype)


def differentiable(tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    mask = options.get("attn_mask")
    return [*tensors, *([mask] if mask is not None and mask.requires_grad else [])]


@pytest.fixture(autouse=True)
def math_attention() -> Iterator[None]:
    """Of torch's attentions the one that has all derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_torch_has_samples() -> None:
    samples = list(OPINFO.sample_inputs("cpu", torch.float64, requires_grad=True))
    assert len(samples) > 10
    assert any(sample.kwargs.get("dropout_p") for sample in samples)
    assert any("attn_mask" in sample.kwargs for sample in samples)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient(dtype: torch.dtype) -> None:
    """As near to the result in float64 as torch's."""
    for tensors, options in all_samples(dtype):
        if options.get("dropout_p"):
            continue
        grad_out = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], dtype=torch.float64)
        query, key, value = (tensor.detach().abs().max() for tensor in tensors)
        magnitude = float(grad_out.abs().max() * value * max(query, key))  # of what gradients are sums of
        actual, plain, expected = (
            step(function, tensors, options, grad_out, dtype)
            for function, dtype in (
                (attn_ext.scaled_dot_product_attention, dtype),
                (F.scaled_dot_product_attention, dtype),
                (F.scaled_dot_product_attention, torch.float64),
            )
        )
        for ours, torchs, exact in zip(actual, plain, expected, strict=True):
            assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
            if dtype == torch.float64:
                torch.testing.assert_close(ours, exact)
                continue
            rounding = torch.finfo(dtype).eps * (exact.abs().max() + magnitude)
            assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + rounding


def step(
    function: Any, tensors: list[Tensor], options: dict[str, Any], grad_out: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, of inputs of this dtype."""
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    if options.get("attn_mask") is not None:
        options = {**options, "attn_mask": options["attn_mask"].detach().to(dtype).requires_grad_()}
    out = function(*tensors, **options)
    grad_out = grad_out.expand(out.shape).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, differentiable(tensors, options), grad_out)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_reproducible(dtype: torch.dtype) -> None:
    for tensors, options in all_samples(dtype):
        if not options.get("dropout_p"):
            continue
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            out = attn_ext.scaled_dot_product_attention(*tensors, **options)
            results.append((out, *torch.autograd.grad(out.sum(), tensors)))
        expected = F.scaled_dot_product_attention(*tensors, **options)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
        assert not torch.equal(results[0][0], results[2][0])


def bound(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A function of tensors alone; dropout has the same seed in each call."""

    def function(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        torch.manual_seed(7)
        changed = {**options, "attn_mask": mask[0]} if mask else options
        return attn_ext.scaled_dot_product_attention(query, key, value, **changed)

    return function, differentiable(tensors, options)


def test_gradcheck_of_torchs_samples() -> None:
    for tensors, options in all_samples(torch.float64):
        function, inputs = bound(tensors, options)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)


def test_gradgradcheck_of_torchs_samples() -> None:
    for tensors, options in all_samples(torch.float64):
        function, inputs = bound(tensors, options)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", OWN)
def test_gradgradcheck_of_small_samples(name: str) -> None:
    """Every element of the Jacobian."""
    shapes, options = OWN[name]
    small = tuple((1, *shape[1:-2], min(shape[-2], 3), min(shape[-1], 2)) for shape in shapes)
    if "attn_mask" in options:
        options = {**options, "attn_mask": (1, 3)}
    function, inputs = bound(*make_own(small, options, torch.float64))
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def t(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


ERRORS = {
    "dtypes": ((t(2, 3, 4), t(2, 5, 4).double(), t(2, 5, 4)), {}),
    "integers": ((t(2, 3, 4).int(), t(2, 5, 4).int(), t(2, 5, 4).int()), {}),
    "head_dim": ((t(2, 3, 4), t(2, 5, 8), t(2, 5, 4)), {}),
    "length of value": ((t(2, 3, 4), t(2, 5, 4), t(2, 6, 4)), {}),
    "batch": ((t(2, 2, 3, 4), t(3, 2, 5, 4), t(3, 2, 5, 4)), {}),
    "heads": ((t(2, 4, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 4)), {}),
    "heads with enable_gqa": ((t(2, 3, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 4)), {"enable_gqa": True}),
    "one dimension": ((t(4), t(4), t(4)), {}),
    "mask shape": ((t(2, 3, 4), t(2, 5, 4), t(2, 5, 4)), {"attn_mask": t(3, 6)}),
    "mask dtype": ((t(2, 3, 4), t(2, 5, 4), t(2, 5, 4)), {"attn_mask": t(3, 5).int()}),
    "mask and is_causal": ((t(2, 3, 4), t(2, 5, 4), t(2, 5, 4)), {"attn_mask": t(3, 5), "is_causal": True}),
    "dropout_p": ((t(2, 3, 4), t(2, 5, 4), t(2, 5, 4)), {"dropout_p": 1.5}),
    "no tensor": ((t(2, 3, 4), t(2, 5, 4), [1.0]), {}),
    "devices": ((t(2, 3, 4), t(2, 5, 4, device="meta"), t(2, 5, 4)), {}),
}


@pytest.mark.parametrize(("tensors", "options"), ERRORS.values(), ids=ERRORS)
def test_errors(tensors: tuple, options: dict[str, Any]) -> None:
    """What torch refuses is refused."""
    errors = (TypeError, ValueError, RuntimeError)
    with pytest.raises(errors):
        F.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises((TypeError, ValueError)):
        attn_ext.scaled_dot_product_attention(*tensors, **options)


def test_error_inputs_of_torch() -> None:
    """Of which this version has none, perhaps."""
    for error in OPINFO.error_inputs("cpu") if OPINFO.error_inputs_func else ():
        sample = error.sample_input
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            attn_ext.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
