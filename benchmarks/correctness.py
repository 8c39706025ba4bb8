"""Is a contender's answer right?  Compared with the float64 reference before anything is timed."""

from __future__ import annotations

import torch
from torch import Tensor

import attn_ext
from attn_ext import Mask, reference

from .cases import Case

# Above this many scores only the first and the last group of heads are compared, for the reference is slow.
_ALL_HEADS_SCORES = 2**25

# Every rounding to the inputs' dtype costs a fraction of an epsilon, and independent ones add up as their
# root: sixteen leave room for a peer that accumulates in that dtype, none for a wrong mask, scale or head.
_EPSILONS = 16

_ROWWISE = 2  # the output and the gradient of query have a row for each query


class WrongResultError(RuntimeError):
    """The contender computed something else."""


class Judge:
    """Knows the right results of one case.

    Args:
        inputs: those of the case.
        mask: in the place of the case's own.
        rows: compare these queries alone, so that no L x L matrix is needed; all by default.

    Attributes:
        inputs: what the results are to be computed from; grad_out is 0 outside of `rows`, so that the
            gradients of keys and values come from them.
    """

    def __init__(
        self,
        case: Case,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        mask: Mask | None = None,
        rows: slice | None = None,
    ) -> None:
        self.rows = slice(0, case.query_length) if rows is None else rows
        *tensors, grad_out = inputs
        if rows is not None:
            kept = torch.zeros_like(grad_out)
            kept[:, :, rows] = grad_out[:, :, rows]
            grad_out = kept
        self.inputs = (*tensors, grad_out)
        self.visible = _visible(case, mask, self.rows)
        self.bound = _EPSILONS * torch.finfo(case.torch_dtype).eps
        self.shapes = [inputs[0].shape, *(tensor.shape for tensor in inputs[:3])]
        self.groups = _groups_to_compare(case)
        self.case = case
        self.expected = [self._solve(batch, key_head) for batch, key_head in self.groups]

    def error(self, results: tuple[Tensor, ...]) -> float:
        """The largest relative error, in the Frobenius norm, of the output and of each gradient.

        Raises:
            WrongResultError: it exceeds the bound, or a shape or dtype is wrong.
        """
        for result, shape in zip(results, self.shapes, strict=False):
            if result.shape != shape or result.dtype != self.case.torch_dtype:
                raise WrongResultError(
                    f"returned {tuple(result.shape)} {result.dtype}, expected {tuple(shape)}"
                )
        worst = 0.0
        for index, result in enumerate(results):
            difference = norm = 0.0
            for (batch, key_head), expected in zip(self.groups, self.expected, strict=True):
                part = self._heads(result, batch, key_head).double()
                if index < _ROWWISE:
                    part = part[:, self.rows]
                difference += float((part - expected[index]).square().sum())
                norm += float(expected[index].square().sum())
            # A gradient that is exactly zero (one key only) is compared in absolute terms.
            error = difference**0.5 / max(norm**0.5, 1.0)
            if not error <= self.bound:  # also when it is NaN
                name = ("output", "grad_query", "grad_key", "grad_value")[index]
                raise WrongResultError(
                    f"{name} is off by {error:.1e} of its norm, more than {self.bound:.1e}"
                )
            worst = max(worst, error)
        return worst

    def _solve(self, batch: int, key_head: int) -> list[Tensor]:
        """The output and, when the case asks for them, the gradients of one group of heads."""
        query, key, value, grad_out = (
            self._heads(tensor, batch, key_head).double()[None] for tensor in self.inputs
        )
        query, grad_out = query[:, :, self.rows], grad_out[:, :, self.rows]
        training = self.case.direction == "training"
        leaves = [tensor.requires_grad_(training) for tensor in (query, key, value)]
        mask = None if self.visible is None else self._heads(self.visible, batch, key_head)[None]
        out = reference.attention(*leaves, mask=mask)
        gradients = torch.autograd.grad(out, leaves, grad_out) if training else ()
        return [tensor.detach()[0] for tensor in (out, *gradients)]

    def _heads(self, tensor: Tensor, batch: int, key_head: int) -> Tensor:
        """(B, H, L, D) -> (heads, L, D): key head ``key_head``, or the query heads that read it."""
        group = tensor.size(1) // self.case.key_heads
        return tensor.detach()[batch, key_head * group : (key_head + 1) * group]


def _visible(case: Case, mask: Mask | None, rows: slice) -> Tensor | None:
    """Which keys those queries see, (B, H, rows, Lk), or None for all."""
    mask = attn_ext.Causal() if mask is None and case.causal else mask
    if mask is None:
        return None
    lowered = mask.lower(case.query_length, case.key_length, torch.device("cpu"))
    return lowered.visible(rows.start, rows.stop, case.key_length).expand(case.batch, case.heads, -1, -1)


def _groups_to_compare(case: Case) -> list[tuple[int, int]]:
    if case.batch * case.heads * case.query_length * case.key_length <= _ALL_HEADS_SCORES:
        return [(batch, head) for batch in range(case.batch) for head in range(case.key_heads)]
    return sorted({(0, 0), (case.batch - 1, case.key_heads - 1)})
