"""Derivatives beyond the first in reverse mode: forward mode, and both modes over the backward.

All of them are directional derivatives. With x = (query, key, value, bias, sinks), the backward is the
gradient of L(x) = <grad_out, out> + <grad_lse, lse>; the Hessian of L being symmetric, its vector-Jacobian
product in direction x' is the derivative of the gradient along x', and what goes to grad_out and grad_lse is
the derivative of (out, lse) along x'. So one formula serves. For a few rows of queries at a time, Z being the
factors of dropout, u and w grad_out and grad_lse:

    A = scale q k^T    t = tanh(A / softcap)    S = softcap t + ...    J = dS/dA = 1 - t^2
    P = softmax(S)     O = (P Z) v
    X = Z (u v^T)      D = rowsum(P X) - w      E = P (X - D)          F = J E
    dq = scale F k     dk = scale F^T q         dv = (P Z)^T u         dbias = E        dsinks = -P_sink D

It is written in operators of torch, through which every transform composes; the rows are so few that their
scores take little memory, and all of it is O(L). Computed in float64 for float64 inputs, else in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._blocks import Blocks
from ._ops import Options, dropout_mask
from ._validation import unsupported
from .masks import LoweredMask

_SLICE_ELEMENTS = 1 << 20  # scores that are there at once


class Inputs(NamedTuple):
    """What a derivative is taken of, or along: None is 0, or absent."""

    query: Any = None
    key: Any = None
    value: Any = None
    bias: Any = None
    sinks: Any = None
    grad_out: Any = None
    grad_lse: Any = None


_HAS_ROWS = ("query", "grad_out", "grad_lse")  # and bias, if it is not the same for all queries


def attention_jvp(inputs: Inputs, options: Options, tangents: Inputs) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse).  `options` are the rest of the operator's arguments."""
    out, lse, _ = _differentiate(inputs, options, tangents)
    return out, lse


def backward_jvp(inputs: Inputs, options: Options, tangents: Inputs) -> list[Tensor]:
    """Tangents of the gradients of query, key, value, bias and sinks; None where there is no such input."""
    return _differentiate(inputs, options, tangents)[2]


def backward_vjp(inputs: Inputs, options: Options, cotangents: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients of grad_out, grad_lse, query, key, value, bias and sinks, given those of the last five."""
    out, lse, gradients = _differentiate(inputs, options, cotangents)
    return out, lse, *gradients


def _differentiate(
    inputs: Inputs, options: Options, tangents: Inputs
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Derivatives along `tangents` of out, lse and, if there is a grad_out, of the gradients."""
    query, key = inputs.query, inputs.key
    dtype = torch.promote_types(query.dtype, torch.float32)
    bias_has_rows = inputs.bias is not None and inputs.bias.size(2) != 1
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    rowed: tuple[list[Tensor], list[Tensor]] = ([], [])
    sums: list[Tensor | None] = [None] * 5
    for rows in _slices(query, key):

        def narrow(values: Inputs, rows: tuple[int, int] = rows) -> Inputs:
            return Inputs(
                *(
                    None
                    if value is None
                    else _cast(_narrow(value, rows), dtype)
                    if name in _HAS_ROWS or (name == "bias" and bias_has_rows)
                    else _cast(value, dtype)
                    for name, value in zip(Inputs._fields, values, strict=True)
                )
            )

        out, lse, gradients = _differentiate_rows(
            narrow(inputs), narrow(tangents), options, *_settings(inputs, options, rows, dtype)
        )
        _append(outs, out)
        _append(lses, lse)
        gradient = total = None
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if index == 0 or (index == 3 and bias_has_rows):
                _append(rowed[index // 3], gradient)
            else:
                total = sums[index]
                sums[index] = gradient if total is None else total + gradient
        del out, lse, gradients, gradient, total  # before there are scores again
    for index, parts in ((0, rowed[0]), (3, rowed[1])):
        if parts:
            sums[index] = torch.cat(parts, dim=2)
    types = (query.dtype, query.dtype, query.dtype, dtype, torch.float64)
    gradients = [None if total is None else total.to(to) for total, to in zip(sums, types, strict=True)]
    return torch.cat(outs, dim=2).to(query.dtype), torch.cat(lses, dim=2), gradients


def _append(parts: list[Tensor], part: Tensor) -> None:
    """Adds rows, joining parts of equal size: many small results among the scores would scatter the heap."""
    parts.append(part.clone())
    while len(parts) > 1 and parts[-2].size(2) <= parts[-1].size(2):
        parts[-2:] = [torch.cat(parts[-2:], dim=2)]


def _slices(query: Tensor, key: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of queries; one without queries if there are none."""
    batch, heads, query_len, _ = query.shape
    rows = max(1, _SLICE_ELEMENTS // max(1, batch * heads * key.size(2)))
    for begin in range(0, max(query_len, 1), rows):
        yield begin, min(begin + rows, query_len)


def _narrow(tensor: Tensor, rows: tuple[int, int]) -> Tensor:
    return tensor.narrow(2, rows[0], rows[1] - rows[0])


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the computation; finite numbers stay finite, as a bias of the lowest float64 must."""
    if tensor.dtype.itemsize <= dtype.itemsize:
        return tensor.to(dtype)
    limits = torch.finfo(dtype)
    return torch.where(tensor.isfinite(), tensor.clamp(limits.min, limits.max), tensor).to(dtype)


def _settings(
    inputs: Inputs, options: Options, rows: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Which pairs of these rows are visible, what ALiBi adds, and the factors of dropout."""
    batch, heads, query_len, _ = inputs.query.shape
    kv_len = inputs.key.size(2)
    lowered = LoweredMask(
        dense=options.mask,
        key_ranges=options.key_ranges,
        query_segments=options.query_segments,
        kv_segments=options.kv_segments,
        band_lower=options.band_lower,
        band_upper=options.band_upper,
        blocks=None if options.block_offsets is None else Blocks(*options[9:13]),
    )
    visible = lowered.visible(*rows, kv_len, inputs.query.device)
    added = dropout = None
    if options.alibi_slopes is not None:
        slopes, positions = options.alibi_slopes.to(dtype), options.alibi_positions
        if positions is None:
            positions = torch.arange(query_len, device=slopes.device) + (kv_len - query_len)
        if slopes.size(2) != 1:
            slopes = _narrow(slopes, rows)
        added = reference.alibi_at(slopes, positions[slice(*rows)], kv_len)
    if options.dropout_p > 0:
        try:
            kept = dropout_mask(options.dropout_seed, options.dropout_p, batch, heads, *rows, kv_len)
        except RuntimeError as error:
            raise (unsupported(error) or error) from None
        dropout = reference.dropout_factors(kept, options.dropout_p, dtype)
    return visible, added, dropout


def _differentiate_rows(
    x: Inputs, dx: Inputs, options: Options, visible: Tensor, added: Tensor | None, dropout: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The derivatives of the module's formula; a name with d is the derivative of what it is without."""
    query, kv_heads = x.query, x.key.size(1)
    group = query.size(1) // max(1, kv_heads)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (x.key, x.value))
    dquery = dx.query
    dkey, dvalue = (
        None if tensor is None else tensor.repeat_interleave(group, dim=1) for tensor in (dx.key, dx.value)
    )
    softcap = min(max(options.softcap, 2.0**-100), 2.0**100) if options.softcap else 0.0  # as the kernels do
    weights, lse, t = reference.softmax_scores(
        query, key, visible, options.scale, x.bias, softcap, added, x.sinks
    )
    dead = lse == -torch.inf
    z = 1 if dropout is None else dropout

    da = options.scale * (_product(dquery, key.mT) + _product(query, _t(dkey)))
    slope = 1 if t is None else 1 - t * t
    ds = slope * da
    if dx.bias is not None:
        ds = ds + torch.where(x.bias == -torch.inf, 0, dx.bias)
    dlse = (weights * ds).sum(-1, keepdim=True)
    if x.sinks is not None:
        sinks = x.sinks.view(-1, 1, 1)
        weight_sink = torch.exp(sinks - torch.where(dead, 0, lse))  # dead rows have none
        dsinks = 0 if dx.sinks is None else dx.sinks.view(-1, 1, 1)
        dlse = dlse + weight_sink * dsinks
        dweight_sink = weight_sink * (dsinks - dlse)
    dweights = weights * (ds - dlse)
    dout = (dweights * z) @ value + _product(weights * z, dvalue)
    dlse_of_rows = dlse.expand(*lse.shape).squeeze(-1)
    if x.grad_out is None:
        return dout, dlse_of_rows, ()

    # Rows with nothing to attend to have no gradient, whatever comes in.
    u, du = (None if tensor is None else torch.where(dead, 0, tensor) for tensor in (x.grad_out, dx.grad_out))
    w, dw = (
        0 if tensor is None else torch.where(dead, 0, tensor.unsqueeze(-1))
        for tensor in (x.grad_lse, dx.grad_lse)
    )
    xs = z * (u @ value.mT)
    dxs = z * (_product(du, value.mT) + _product(u, _t(dvalue)))
    d = (weights * xs).sum(-1, keepdim=True) - w
    dd = (dweights * xs + weights * dxs).sum(-1, keepdim=True) - dw
    e = weights * (xs - d)
    de = dweights * (xs - d) + weights * (dxs - dd)
    f, df = slope * e, slope * de
    if t is not None:
        df = df - 2 * t * slope * da * e / softcap
    grad_query = options.scale * (df @ key + _product(f, dkey))
    grad_key = options.scale * (df.mT @ query + _product(f.mT, dquery))
    grad_value = (dweights * z).mT @ u + _product((weights * z).mT, du)
    grad_bias = None if x.bias is None else de.sum_to_size(x.bias.shape)
    grad_sinks = None
    if x.sinks is not None:
        grad_sinks = -(dweight_sink * d + weight_sink * dd).sum((0, 2, 3))

    def per_kv_head(tensor: Tensor) -> Tensor:
        if group == 1:
            return tensor
        batch, _, *rest = tensor.shape
        if group == 0:  # no query head at all
            return tensor.new_zeros(batch, kv_heads, *rest)
        return tensor.reshape(batch, kv_heads, group, *rest).sum(2)

    return (
        dout,
        dlse_of_rows,
        (grad_query, per_kv_head(grad_key), per_kv_head(grad_value), grad_bias, grad_sinks),
    )


def _product(a: Tensor | None, b: Tensor | None) -> Any:
    return 0 if a is None or b is None else a @ b


def _t(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.mT
