"""How results are judged: one tolerance rule for outputs and gradients, and control over the instruction set.

Neither of the two bounds contains a hand-picked tolerance.

1. Half precision keeps the rule of the flash-attention test-suite (Dao-AILab/flash-attention): the error
   against a float64 reference is at most `factor` times the error that plain PyTorch operations make in the
   same dtype, plus the rounding of the comparison itself.
2. For every dtype, the Frobenius norm of the error is bounded by a few unit roundoffs times the norm of the
   sums of the absolute values of all terms (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3).
   It holds whatever cancels, and needs no luck: in float32 the error of either side is that of an order of
   summation, about which the ratio of two maxima says nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import attn_ext
from attn_ext import _C, reference

__all__ = ["assert_within_rule", "available_isas", "check_attention", "use_isa"]

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
ROUNDINGS = 4  # on the way to each result: of the score, the weight, their sum and the product


def available_isas() -> tuple[str, ...]:
    """The instruction sets that are compiled in and that this machine can run, in the order of preference."""
    return tuple(name for name in _C.isa_names() if _C.isa_supported(name))


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of the instruction set `name` inside the `with` block.

    The choice is process-wide: calls of other threads see it too.

    Raises:
        ValueError: if `name` is unknown, or this machine cannot run it.
    """
    previous = _C.isa_current()
    _C.isa_select(name)
    try:
        yield
    finally:
        _C.isa_select(previous)


def assert_within_rule(
    actual: Tensor, expected: Tensor, plain: Tensor, factor: float, name: str = "result"
) -> None:
    """Asserts |actual - expected| <= factor * |plain - expected| + 2 * |(expected + 0.3 - 0.3) - expected|.

    Each |.| is the largest element, and the last term is evaluated in the dtype of `plain`.  The error of
    `plain` counts as at least that dtype's unit roundoff at the largest expected number: plain PyTorch can be
    exact by luck, as for a single key.

    Args:
        actual: what is tested.
        expected: the same shape, in float64; may hold infinities, which `actual` must match exactly.
        plain: the same shape, by plain PyTorch operations in the dtype under test; where it is not finite (it
            overflows earlier than a fused kernel) it grants no tolerance.
        factor: how much worse than plain PyTorch the result may be.
        name: names the result in the message.

    Raises:
        AssertionError: with both errors and the worst element.
    """
    actual, plain = actual.double(), plain.detach()
    finite = _assert_same_infinities(actual, expected, name)
    dtype = plain.dtype
    error = torch.where(finite, actual - expected, 0).abs()
    rounded = expected.to(dtype)
    rounding = _finite_max(((rounded + 0.3 - 0.3).double() - rounded.double()).abs())
    unit_roundoff = torch.finfo(dtype).eps / 2 * _finite_max(expected.abs())
    plain_error = max(_finite_max((plain.double() - expected).abs()), unit_roundoff)
    tolerance = factor * plain_error + 2 * rounding
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= tolerance, (
        f"{name}: error {worst:.3e} exceeds {tolerance:.3e} = {factor} * {plain_error:.3e} (plain {dtype}) "
        f"+ 2 * {rounding:.3e}; {_describe_worst(error, actual, expected)}"
    )


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any = None,
    scale: float | None = None,
    grad: bool = True,
    lse: bool = True,
    grad_out: Tensor | None = None,
) -> None:
    """Asserts that `attn_ext.attention` agrees with the float64 reference, forward and backward.

    Args:
        query, key, value, mask, scale: as for `attn_ext.attention`.  Strides are kept.
        grad: check the gradients of query, key and value.
        lse: check the log-sum-exp and, with `grad`, let a gradient flow through it.
        grad_out: (B, Hq, Lq, Dv), the gradient of the output; random by default.

    Raises:
        AssertionError: naming the first result that is out of bounds.
    """
    inputs = tuple(t.detach().requires_grad_(grad) for t in (query, key, value))
    call = {"mask": mask, "scale": scale, "return_lse": True}
    outputs = {
        "actual": attn_ext.attention(*inputs, **call),
        "expected": reference.attention(*inputs, **call),
    }
    out, statistics = outputs["actual"]
    if grad_out is None:
        grad_out = torch.randn(out.shape, dtype=query.dtype)
    grad_lse = torch.randn(statistics.shape) if lse else None
    results = {side: dict(zip(("out", "lse"), pair, strict=True)) for side, pair in outputs.items()}
    if grad:
        for side, pair in outputs.items():
            gradients = _gradients(pair, inputs, grad_out, grad_lse)
            results[side] |= zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True)

    problem = (query, key, value, mask, scale, grad_out, grad_lse)
    plain, bounds = _plain_attention(*problem), _error_bounds(*problem)
    for name, expected in results["expected"].items():
        if name != "lse" or lse:
            factor = BACKWARD_FACTOR if name.startswith("grad") else FORWARD_FACTOR
            _assert_close(name, results["actual"][name], expected, plain[name], factor, bounds[name])


def _assert_close(
    name: str, actual: Tensor, expected: Tensor, plain: Tensor, factor: float, bound: float
) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    dtype = torch.promote_types(plain.dtype, torch.float32) if name == "lse" else plain.dtype
    assert actual.dtype == dtype, f"{name}: {actual.dtype}, not {dtype}"
    if actual.dtype.itemsize == 2:
        assert_within_rule(actual, expected, plain, factor, name)
    finite = _assert_same_infinities(actual.double(), expected, name)
    error = torch.where(finite, actual.double() - expected, 0)
    norm = float(torch.linalg.vector_norm(error))
    assert norm <= bound, (
        f"{name}: error norm {norm:.3e} exceeds {bound:.3e}; {_describe_worst(error.abs(), actual, expected)}"
    )


@torch.no_grad()
def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> dict[str, Tensor]:
    """Outputs and gradients by plain PyTorch operations in the dtype of the inputs.

    The gradients follow Dao et al. 2022, "FlashAttention", algorithm 4: like the kernels they start from the
    rounded output.
    """
    heads, head_dim, dtype = query.size(1), query.size(3), query.dtype
    group = heads // max(key.size(1), 1)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query @ key.mT * scale
    mask = _dense_mask(mask, query, key)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = torch.where(dead, 0, scores)
    weights = torch.where(dead, 0, torch.softmax(scores, dim=-1))
    lse = torch.where(dead, -math.inf, torch.logsumexp(scores, dim=-1, keepdim=True))
    out = weights @ value

    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    grad_scores = weights * (grad_out @ value.mT - delta.unsqueeze(-1))
    return {
        "out": out,
        "lse": lse.squeeze(-1),
        "grad_query": grad_scores @ key * scale,
        "grad_key": _sum_group(grad_scores.mT @ query, group) * scale,
        "grad_value": _sum_group(weights.mT @ grad_out, group),
    }


def _dense_mask(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None or isinstance(mask, Tensor):
        return mask
    return mask.to_dense(query.size(0), query.size(1), query.size(2), key.size(2), device=query.device)


def _gradients(
    outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    out, lse = outputs
    if grad_lse is None:
        return torch.autograd.grad(out, inputs, grad_out.to(out.dtype))
    return torch.autograd.grad((out, lse), inputs, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))


@torch.no_grad()
def _error_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> dict[str, float]:
    """For each result, the roundings on its way times the norm of its sums of absolute values."""
    dtype = query.dtype
    precision, accumulation = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    group = query.size(1) // max(key.size(1), 1)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    weights = reference.attention_weights(query, key, mask=mask, scale=scale)
    lse = reference.attention(query, key, value, mask=mask, scale=scale, return_lse=True)[1]
    query, key, value, grad_out = (t.double().abs() for t in (query, key, value, grad_out))
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.double().abs()

    # A score has an error relative to its absolute terms; exp makes it a relative error of the weight.
    scores = query @ key.mT * abs(scale)
    mask = _dense_mask(mask, query, key)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + torch.where(mask == -math.inf, 0, mask.double().abs())
    magnitude = weights * (1 + scores * (accumulation.eps / precision.eps))
    total = magnitude.sum(-1, keepdim=True)
    magnitude = magnitude + weights * total

    out = magnitude @ value
    delta = (grad_out * out).sum(-1) + grad_lse
    grad_scores = magnitude * (grad_out @ value.mT + delta.unsqueeze(-1))
    sums = {
        "out": out,
        "lse": total.squeeze(-1) + torch.where(lse == -math.inf, 0, lse.abs()),
        "grad_query": grad_scores @ key * abs(scale),
        "grad_key": _sum_group(grad_scores.mT @ query, group) * abs(scale),
        "grad_value": _sum_group(magnitude.mT @ grad_out, group),
    }
    # Below the smallest normal number precision is absolute, and each term of a sum loses it anew.  The
    # bfloat16 products of x86 treat subnormal numbers as 0.
    terms = max(query.size(2), key.size(2))
    flushed = precision.tiny if dtype == torch.bfloat16 else precision.eps * precision.tiny
    underflow = flushed + terms * accumulation.eps * accumulation.tiny
    unit_roundoff = precision.eps / 2
    return {
        name: ROUNDINGS * unit_roundoff * float(torch.linalg.vector_norm(t))
        + underflow * math.sqrt(t.numel())
        for name, t in sums.items()
    }


def _sum_group(tensor: Tensor, group: int) -> Tensor:
    """(B, Hq, L, D) -> (B, Hkv, L, D): the sum over the query heads that share a key head."""
    return tensor.unflatten(1, (-1, group)).sum(2) if group else tensor


def _assert_same_infinities(actual: Tensor, expected: Tensor, name: str) -> Tensor:
    """Returns where `expected` is finite."""
    finite = expected.isfinite()
    same = torch.where(finite, True, actual == expected)
    assert bool(same.all()), f"{name}: not infinite where the reference is, in {int((~same).sum())} places"
    return finite


def _finite_max(tensor: Tensor) -> float:
    tensor = tensor[tensor.isfinite()]
    return float(tensor.max()) if tensor.numel() else 0.0


def _describe_worst(error: Tensor, actual: Tensor, expected: Tensor) -> str:
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"worst at {index}: {float(actual[index])!r}, expected {float(expected[index])!r}"
