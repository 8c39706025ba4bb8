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
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import attn_ext
from attn_ext import _C, reference
from attn_ext.block_mask import BlockMask
from attn_ext.masks import Conjunction, Dense, Mask, add_biases

__all__ = ["assert_within_rule", "available_isas", "check_attention", "dropout_mask", "use_isa"]

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


def dropout_mask(
    seed: int | Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    query_len: int,
    kv_len: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What dropout multiplies the weights by: 0, or 1 / (1 - p) with p rounded to a multiple of 2^-16.

    Args:
        seed, dropout_p: as for `attn_ext.attention`.

    Returns:
        (batch, heads, query_len, kv_len), of `dtype`.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64)
    kept = torch.ops.attn_ext.dropout_mask(seed, dropout_p, batch, heads, 0, query_len, kv_len)
    return reference.dropout_factors(kept, dropout_p, dtype)


def assert_within_rule(
    actual: Tensor, expected: Tensor, plain: Tensor, factor: float, name: str = "result", least: float = 0.0
) -> None:
    """Asserts |actual - expected| <= factor * |plain - expected| + 2 * |(expected + 0.3 - 0.3) - expected|.

    Each |.| is the largest element, and the last term is evaluated in the dtype of `plain`.  The error of
    `plain` counts as at least that dtype's unit roundoff at the largest expected number, and at least as
    `least`: plain PyTorch can be exact by luck, as for a single key.

    Args:
        actual: what is tested.
        expected: the same shape, in float64; may hold infinities, which `actual` must match exactly.
        plain: the same shape, by plain PyTorch operations in the dtype under test; where it is not finite (it
            overflows earlier than a fused kernel) it grants no tolerance.
        factor: how much worse than plain PyTorch the result may be.
        name: names the result in the message.
        least: an error that nobody can be sure to avoid.

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
    plain_error = max(_finite_max((plain.double() - expected).abs()), unit_roundoff, least)
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
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    grad: bool = True,
    lse: bool = True,
    grad_out: Tensor | None = None,
    attention: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Asserts that `attn_ext.attention` agrees with the float64 reference, forward and backward.

    Args:
        query, key, value, mask, bias, scale, softcap, alibi_slopes, sinks, dropout_p: as for
            `attn_ext.attention`.  Strides are kept.  Keys and values that no query sees may be anything.
        dropout_seed: likewise, but never drawn: with dropout there must be one.
        grad: check the gradients of query, key, value, bias, sinks, and of the tensors of floating-point
            `Dense` masks that require grad.
        lse: check the log-sum-exp and, with `grad`, let a gradient flow through it.
        grad_out: (B, Hq, Lq, Dv), the gradient of the output; random by default.
        attention: what is called in the place of `attn_ext.attention`, and must agree.

    Raises:
        AssertionError: naming the first result that is out of bounds.
    """
    added = {} if mask is None else _added_by(mask)
    leaves = {"query": query, "key": key, "value": value, "bias": bias, "sinks": sinks}
    leaves = {name: t.detach().requires_grad_(grad) for name, t in leaves.items() if t is not None}
    given = {**leaves, **added}
    doubles = {
        name: t.detach().double().requires_grad_(t.requires_grad and grad) for name, t in given.items()
    }
    double_mask = None if mask is None else _replace_added(mask, iter([doubles[name] for name in added]))
    call = {"scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "return_lse": True}
    factors = None
    if dropout_p:
        factors = dropout_mask(dropout_seed, dropout_p, *query.shape[:3], key.size(2))
    outputs = {
        "actual": (attention or attn_ext.attention)(
            *(leaves[name] for name in ("query", "key", "value")),
            **{name: leaves.get(name) for name in ("bias", "sinks")},
            **{"mask": mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, **call},
        ),
        "expected": reference.attention(
            *(doubles[name] for name in ("query", "key", "value")),
            **{name: doubles.get(name) for name in ("bias", "sinks")},
            **{"mask": double_mask, "dropout": factors, **call},
        ),
    }
    out, statistics = outputs["actual"]
    if grad_out is None:
        grad_out = torch.randn(out.shape, dtype=query.dtype)
    grad_lse = torch.randn(statistics.shape) if lse else None
    results = {side: dict(zip(("out", "lse"), pair, strict=True)) for side, pair in outputs.items()}
    if grad:
        differentiated = [name for name, t in doubles.items() if t.requires_grad]
        names = [f"grad_{name}" for name in differentiated]
        for side, tensors in (("actual", given), ("expected", doubles)):
            inputs = [tensors[name] for name in differentiated]
            gradients = _gradients(outputs[side], inputs, grad_out, grad_lse)
            results[side] |= zip(names, gradients, strict=True)

    problem = _problem(query, key, value, mask, bias, scale, softcap, alibi_slopes, sinks)
    problem = problem._replace(dropout=factors, grad_out=grad_out, grad_lse=grad_lse)
    plain = _plain_attention(problem)
    bounds = least = _error_bounds(problem, outputs["expected"][1], query.dtype)
    if query.dtype.itemsize == 2:  # no result can be relied on to be more exact than in float32
        least = _error_bounds(problem, outputs["expected"][1], torch.float32)
    for name, expected in results["expected"].items():
        if name != "lse" or lse:
            factor = BACKWARD_FACTOR if name.startswith("grad") else FORWARD_FACTOR
            dtype = given[name.removeprefix("grad_")].dtype if name.startswith("grad") else query.dtype
            if name == "lse":
                dtype = torch.promote_types(dtype, torch.float32)
            actual = results["actual"][name]
            assert actual.dtype == dtype, f"{name}: {actual.dtype}, not {dtype}"
            _assert_close(name, actual, expected, plain.get(name), factor, bounds[name], least[name])


def _assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    plain: Tensor | None,
    factor: float,
    bound: float,
    least: float,
) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    rounded = expected.to(actual.dtype)
    expected = torch.where(rounded.isfinite(), expected, rounded.double())
    if actual.dtype.itemsize == 2 and plain is not None:
        assert_within_rule(actual, expected, plain, factor, name, least)
    finite = _assert_same_infinities(actual.double(), expected, name)
    error = torch.where(finite, actual.double() - expected, 0)
    norm = float(torch.linalg.vector_norm(error))
    assert norm <= bound, (
        f"{name}: error norm {norm:.3e} exceeds {bound:.3e}; {_describe_worst(error.abs(), actual, expected)}"
    )


class _Problem(NamedTuple):
    """What a call of `attention` computes, with every operand spelled out."""

    query: Tensor
    key: Tensor  # finite
    value: Tensor  # finite
    visible: Tensor  # (B, H, Lq, Lk)
    added: dict[str, Tensor]  # the bias and the floating-point masks, 4-D, as they are given
    shapes: dict[str, torch.Size]  # theirs
    scale: float
    softcap: float
    alibi: Tensor | None  # (B or 1, H, Lq, Lk), float64
    sinks: Tensor | None
    dropout: Tensor | None = None  # factors of the weights
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None

    @property
    def group(self) -> int:
        return self.query.size(1) // max(self.key.size(1), 1)

    def sum_to_added(self, name: str, grad_scores: Tensor) -> Tensor:
        """The gradient of one of `added`."""
        return grad_scores.sum_to_size(self.added[name].shape).reshape(self.shapes[name])


@torch.no_grad()
def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> _Problem:
    scores = (*query.shape[:3], key.size(2))
    visible = torch.ones(scores, dtype=torch.bool)
    if mask is not None:
        dense = mask.to_dense(*scores, device=query.device)
        visible = dense if dense.dtype == torch.bool else dense != -math.inf
    added = {} if mask is None else _added_by(mask)
    if bias is not None:
        added["bias"] = bias
        visible = visible & (bias != -math.inf)
    group = query.size(1) // max(key.size(1), 1)
    if group:
        seen = _sum_group(visible.sum(2, keepdim=True), group).mT != 0  # (B, Hkv, Lk, 1), by any query
        key, value = torch.where(seen, key, 0), torch.where(seen, value, 0)
    query_len, kv_len = scores[2:]
    return _Problem(
        query,
        key,
        value,
        visible,
        {name: t.detach()[(None,) * (4 - t.dim())] for name, t in added.items()},
        {name: t.shape for name, t in added.items()},
        1 / math.sqrt(query.size(-1)) if scale is None else scale,
        softcap or 0.0,
        None
        if alibi_slopes is None
        else reference.alibi(alibi_slopes.double(), query_len, kv_len, 0, query_len),
        sinks,
    )


@torch.no_grad()
def _plain_attention(problem: _Problem) -> dict[str, Tensor]:
    """Outputs and gradients by plain PyTorch operations in the dtype of the inputs.

    The gradients follow Dao et al. 2022, "FlashAttention", algorithm 4: like the kernels they start from the
    rounded output.  Gradients of what is added to the scores are there for half precision only, and not if
    they sum over all rows or columns: how exact plain operations are would be a matter of luck.
    """
    query, scale, softcap, group = problem.query, problem.scale, problem.softcap, problem.group
    dtype, kv_len = query.dtype, problem.key.size(2)
    limits = torch.finfo(dtype)
    key, value = (t.repeat_interleave(group, dim=1) for t in (problem.key, problem.value))
    scores = query @ key.mT * scale
    slope = 1
    if softcap:
        t = torch.tanh(scores / softcap)
        scores, slope = softcap * t, 1 - t * t
    if problem.added:  # in float32, or what their dtypes promote to
        added = functools.reduce(add_biases, problem.added.values())
        scores = scores + added.double().clamp(limits.min, limits.max).to(dtype)
    if problem.alibi is not None:
        scores = scores + problem.alibi.to(dtype)
    scores = torch.where(problem.visible, scores, -math.inf)
    if problem.sinks is not None:
        sinks = problem.sinks.to(dtype).view(-1, 1, 1).expand(*query.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = torch.where(dead, 0, scores)
    weights = torch.where(dead, 0, torch.softmax(scores, dim=-1))[..., :kv_len]
    lse = torch.where(dead, -math.inf, torch.logsumexp(scores, dim=-1, keepdim=True))
    factors = 1 if problem.dropout is None else problem.dropout.to(dtype)
    out = (weights * factors) @ value

    delta = (problem.grad_out * out).sum(-1)
    if problem.grad_lse is not None:
        delta = delta - problem.grad_lse.to(dtype)
    grad_scores = weights * (factors * (problem.grad_out @ value.mT) - delta.unsqueeze(-1))
    grad_products = grad_scores * slope
    results = {
        "out": out,
        "lse": lse.squeeze(-1),
        "grad_query": grad_products @ key * scale,
        "grad_key": _sum_group(grad_products.mT @ query, group) * scale,
        "grad_value": _sum_group((weights * factors).mT @ problem.grad_out, group),
    }
    for name, added in problem.added.items():
        if dtype.itemsize == 2 and added.shape[2:] == grad_scores.shape[2:]:
            results[f"grad_{name}"] = problem.sum_to_added(name, grad_scores).to(added.dtype)
    return results


def _gradients(
    outputs: tuple[Tensor, Tensor], inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    out, lse = outputs
    if grad_lse is None:
        return torch.autograd.grad(out, inputs, grad_out.to(out.dtype))
    return torch.autograd.grad((out, lse), inputs, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))


@torch.no_grad()
def _error_bounds(problem: _Problem, lse: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """For each result, the roundings on its way times the norm of its sums of absolute values.

    `lse` is that of the reference, `dtype` that of weights, outputs and gradients.
    """
    group, scale = problem.group, abs(problem.scale)
    precision, accumulation = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    ratio = accumulation.eps / precision.eps
    query, key, value, grad_out = (
        t.double() for t in (problem.query, problem.key, problem.value, problem.grad_out)
    )
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    products = query @ key.mT * problem.scale
    query, key, value, grad_out = query.abs(), key.abs(), value.abs(), grad_out.abs()
    grad_lse = torch.zeros_like(lse) if problem.grad_lse is None else problem.grad_lse.double().abs()

    # A score has an error relative to its absolute terms, here in unit roundoffs of the inputs' dtype; exp
    # makes it a relative error of the weight.
    scores, errors = products, query @ key.mT * scale * ratio
    slope = torch.ones_like(errors)
    if problem.softcap:
        t = torch.tanh(products / problem.softcap)
        scores = problem.softcap * t
        errors = errors + scores.abs() * ratio
        # 1 - t^2 has the errors of its terms and, times its own derivative, that of t.
        slope = 1 - t * t + (1 + t * t) * ratio + 2 * t.abs() * errors / problem.softcap
    if problem.alibi is not None:
        scores = scores + problem.alibi
        errors = errors + problem.alibi.abs() * ratio
    if problem.added:
        errors = _with_added(problem.added, scores, errors, precision, accumulation)
    live = lse.unsqueeze(-1) != -math.inf
    total_added = sum(t.double() for t in problem.added.values()) if problem.added else 0
    scores = torch.where(problem.visible, scores + total_added, -math.inf)
    logits = scores - torch.where(live, lse.unsqueeze(-1), 0)
    weights = torch.where(problem.visible & live, torch.exp(logits), 0)
    magnitude = torch.where(weights == 0, 0, weights * (1 + errors))
    total = magnitude.sum(-1, keepdim=True)
    if problem.sinks is not None:
        sinks = problem.sinks.double().view(-1, 1, 1)
        sink_weights = torch.where(live, torch.exp(sinks - lse.unsqueeze(-1)), 0)
        sink_magnitude = torch.where(sink_weights == 0, 0, sink_weights * (1 + sinks.abs() * ratio))
        total = total + sink_magnitude
        sink_magnitude = sink_magnitude + sink_weights * total
    magnitude = magnitude + weights * total

    factors = 1 if problem.dropout is None else problem.dropout.double()
    out = (magnitude * factors) @ value
    delta = (grad_out * out).sum(-1, keepdim=True) + grad_lse.unsqueeze(-1)
    grad_scores = magnitude * (factors * (grad_out @ value.mT) + delta)
    grad_products = grad_scores * slope
    sums = {
        "out": out,
        "lse": total.squeeze(-1) + torch.where(lse == -math.inf, 0, lse.abs()),
        "grad_query": grad_products @ key * scale,
        "grad_key": _sum_group(grad_products.mT @ query, group) * scale,
        "grad_value": _sum_group((magnitude * factors).mT @ grad_out, group),
    }
    # Below the smallest normal number precision is absolute, and each term of a sum loses it anew.  The
    # bfloat16 products of x86 treat subnormal numbers as 0.
    terms = max(query.size(2), key.size(2))
    flushed = precision.tiny if dtype == torch.bfloat16 else precision.eps * precision.tiny
    underflow = flushed + terms * accumulation.eps * accumulation.tiny
    bounds = {name: _bound(t, ROUNDINGS * precision.eps / 2, underflow) for name, t in sums.items()}

    # What is not of the inputs' dtype is rounded to its own at the end, and in between if what is added to
    # the scores is a sum.
    def rounded(t: Tensor, own: torch.dtype, count: int) -> float:
        limits = torch.finfo(own)
        per_element = grad_scores.numel() / max(t.numel(), 1)
        return _bound(
            t,
            ROUNDINGS * precision.eps / 2 + count * limits.eps / 2,
            per_element * (underflow + count * limits.eps * limits.tiny),
        )

    for name, added in problem.added.items():
        summed = problem.sum_to_added(name, grad_scores)
        bounds[f"grad_{name}"] = rounded(summed, added.dtype, min(len(problem.added), 2))
    if problem.sinks is not None:
        summed = (sink_magnitude * delta).sum((0, 2, 3))
        bounds["grad_sinks"] = rounded(summed, problem.sinks.dtype, 1)
    return bounds


def _bound(sums: Tensor, roundoffs: float, underflow: float) -> float:
    return roundoffs * float(torch.linalg.vector_norm(sums)) + underflow * math.sqrt(sums.numel())


def _with_added(
    added: dict[str, Tensor],
    scores: Tensor,
    errors: Tensor,
    precision: torch.finfo,
    accumulation: torch.finfo,
) -> Tensor:
    """The errors of scores to which something is added, in unit roundoffs of `precision`."""
    absolute = sum(torch.where(t == -math.inf, 0, t.double().abs()) for t in added.values())
    result = errors + absolute * (accumulation.eps / precision.eps)
    if len(added) > 1:  # and the sum is rounded
        promoted = functools.reduce(torch.promote_types, (t.dtype for t in added.values()), torch.float32)
        return result + absolute * (torch.finfo(promoted).eps / precision.eps)
    # A number that swallows the score in float64 does so in any dtype.  Scores are then equal or, if
    # neighbouring numbers are far enough apart for exp, one weighs nothing: either way without error.
    swallowed = (absolute * torch.finfo(torch.float64).eps > 4 * scores.abs()) & (
        absolute * accumulation.eps > -4 * math.log(accumulation.tiny)
    )
    return torch.where(swallowed, 0, result)


def _added_by(mask: Mask) -> dict[str, Tensor]:
    """The tensors of the floating-point parts of a mask."""
    tensors = [part.tensor for part in mask.parts if _is_added(part)]
    return {f"mask{index or ''}": tensor for index, tensor in enumerate(tensors)}


def _is_added(mask: Mask) -> bool:
    return isinstance(mask, Dense) and mask.tensor.dtype != torch.bool


def _replace_added(mask: Mask, tensors: Iterator[Tensor]) -> Mask:
    """The mask with other tensors in its floating-point parts."""
    if isinstance(mask, Conjunction):
        return Conjunction(tuple(_replace_added(part, tensors) for part in mask.masks))
    if isinstance(mask, BlockMask) and mask.rule is not None:
        return dataclasses.replace(mask, rule=_replace_added(mask.rule, tensors))
    return Dense(next(tensors)) if _is_added(mask) else mask


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
