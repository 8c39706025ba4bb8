"""Attention written out with its L x L score matrix: slow, readable, and what the kernels must compute.

Everything runs in `dtype` (float64 unless told otherwise) and differentiates by plain autograd.  The
semantics are those of the package: a row with nothing to attend to gives output 0, log-sum-exp -inf and
gradient 0, and a NaN or Inf in a key or value that a query may not attend to never reaches that query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["attention", "attention_weights", "scaled_dot_product_attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attn_ext.attention`, computed in `dtype`.

    Args:
        query: (B, Hq, Lq, Dk).
        key: (B, Hkv, Lk, Dk), with Hq a multiple of Hkv: query head h reads key head h // (Hq // Hkv).
        value: (B, Hkv, Lk, Dv).
        mask: None, a mask object of `attn_ext`, or a tensor broadcastable to (B, Hq, Lq, Lk): boolean (True =
            attend) or floating point (added to the scaled scores; -inf = may not attend).
        bias: floating point, broadcastable to (B, Hq, Lq, Lk), added as well.
        scale: factor of the scores, 1 / sqrt(Dk) by default.
        softcap: the scaled scores s become softcap * tanh(s / softcap).
        alibi_slopes: (Hq,) or (B, Hq): slope * |i + Lk - Lq - j| is subtracted.
        sinks: (Hq,): one more score in each row, whose value is 0.
        dropout: (B, Hq, Lq, Lk), what the weights are multiplied by (`attn_ext.testing.dropout_mask`).
        return_lse: also return the log-sum-exp of each row of scores.
        dtype: what everything is converted to and computed in.

    Returns:
        out (B, Hq, Lq, Dv), or (out, lse) with lse (B, Hq, Lq); both of `dtype`.
    """
    settings = _settings(query, key, mask, bias, scale, softcap, alibi_slopes, sinks, dtype)
    if dropout is not None:
        settings["dropout"] = dropout.to(dtype)
    out, lse, _ = attend(query.to(dtype), key.to(dtype), value.to(dtype), guard=True, **settings)
    return (out, lse) if return_lse else out


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Any = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The softmax of the scores, (B, Hq, Lq, Lk), all 0 in a fully masked row; arguments as `attention`."""
    settings = _settings(query, key, mask, bias, scale, softcap, alibi_slopes, sinks, dtype)
    no_values = key[..., :0].to(dtype)
    return attend(query.to(dtype), key.to(dtype), no_values, guard=True, **settings)[2]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: Tensor | None = None,
    guard: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula: out, lse and weights, in the dtype of query, of which all tensors but visible are.

    Args:
        visible: which pairs are, broadcastable to (B, Hq, Lq, Lk); those whose bias is -inf are not either.
        bias, added: added to the scores, in this order, after the softcap.
        guard: keep NaN and infinity in hidden keys and values away from what does not see them, which takes
            memory of (Lq, Lk, D), and a look at the numbers.
    """
    heads = query.size(1)
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    if bias is not None:
        visible = visible & (bias != -math.inf)
    guard = guard and not _all_finite(query, key, value)
    weights, lse, _ = softmax_scores(query, key, visible, scale, bias, softcap, added, sinks, guard)
    dropped = weights if dropout is None else weights * dropout
    out = _guarded_sum(dropped, value, visible) if guard else dropped @ value
    return out, lse.squeeze(-1), weights


def softmax_scores(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
    guard: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weights, lse (B, H, Lq, 1) and tanh(scores / softcap) or None; key has one head for each of query's."""
    scores = (_guarded_scores(query, key, visible) if guard else query @ key.mT) * scale
    t = None
    if softcap:
        t = torch.tanh(scores / softcap)
        scores = softcap * t
    if bias is not None:
        allowed = bias != -math.inf
        visible = visible & allowed
        scores = scores + torch.where(allowed, bias, 0)
    if added is not None:
        scores = scores + added
    return *_softmax(scores, visible, sinks), t


def alibi(slopes: Tensor, query_len: int, kv_len: int, query_begin: int, query_end: int) -> Tensor:
    """What ALiBi adds to the scores of some queries, (B or 1, H, rows, Lk), of slopes (H,) or (B, H)."""
    positions = torch.arange(query_begin, query_end, device=slopes.device) + (kv_len - query_len)
    return alibi_at(slopes.reshape(-1, slopes.size(-1), 1), positions, kv_len)


def alibi_at(slopes: Tensor, positions: Tensor, kv_len: int) -> Tensor:
    """The same of queries at these places among the keys, (rows,), with slopes (B or 1, H, rows or 1)."""
    distance = (positions.unsqueeze(1) - torch.arange(kv_len, device=positions.device)).abs()
    return -slopes.unsqueeze(-1) * distance


def dropout_factors(kept: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """What weights are multiplied by: 0, or 1 / (1 - p) with p rounded to a multiple of 2^-16."""
    one = 1 << 16
    threshold = int((1 - dropout_p) * one + 0.5)
    return kept.to(dtype) * (one / threshold if threshold else 0.0)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed in `dtype`, without dropout.

    Shapes are (..., H, L, D) with broadcast leading dimensions; `is_causal` is aligned top-left.

    Raises:
        NotImplementedError: for a `dropout_p` other than 0.
    """
    if dropout_p:
        raise NotImplementedError(f"the reference has no dropout, got dropout_p={dropout_p}")
    query, key, value = (t.to(dtype) for t in (query, key, value))
    if enable_gqa:
        key, value = (_repeat_heads(t, query.size(-3)) for t in (key, value))
    mask = attn_mask
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attn_mask must be None when is_causal is true")
        mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    visible, bias = _split_mask(mask, query.size(-2), key.size(-2), query.device, dtype)
    guard = not _all_finite(query, key, value)
    scores = (_guarded_scores(query, key, visible) if guard else query @ key.mT) * _scale(scale, query)
    weights, _ = _softmax(scores if bias is None else scores + bias, visible)
    return _guarded_sum(weights, value, visible) if guard else weights @ value


def _settings(
    query: Tensor,
    key: Tensor,
    mask: Any,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The arguments of `attend`, for any kind of mask."""
    batch, heads, query_len, _ = query.shape
    kv_len = key.size(2)
    if mask is not None and not isinstance(mask, Tensor):
        mask = mask.to_dense(batch, heads, query_len, kv_len, device=query.device)
    visible, mask_bias = _split_mask(mask, query_len, kv_len, query.device, dtype)
    if bias is not None:
        bias = bias.to(dtype)
        mask_bias = bias if mask_bias is None else mask_bias + bias
    return {
        "visible": visible,
        "bias": mask_bias,
        "scale": _scale(scale, query),
        "softcap": softcap or 0.0,
        "added": None
        if alibi_slopes is None
        else alibi(alibi_slopes.to(dtype), query_len, kv_len, 0, query_len),
        "sinks": None if sinks is None else sinks.to(dtype),
    }


def _scale(scale: float | None, query: Tensor) -> float:
    return 1 / math.sqrt(query.size(-1)) if scale is None else scale


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """(..., Hkv, L, D) -> (..., heads, L, D): one key head for each query head."""
    group = heads // max(tensor.size(-3), 1)
    return tensor[..., torch.arange(heads, device=tensor.device) // max(group, 1), :, :]


def _split_mask(
    mask: Tensor | None, query_len: int, kv_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Which pairs are visible, broadcastable to (..., Lq, Lk), and what is added to the scores of those."""
    everything = torch.ones(query_len, kv_len, dtype=torch.bool, device=device)
    if mask is None:
        return everything, None
    if mask.dtype == torch.bool:
        return mask & everything, None
    allowed = mask != -math.inf
    return allowed & everything, torch.where(allowed, mask, 0).to(dtype)


def _guarded_scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """query @ key^T.  A hidden pair must not be formed where 0 * NaN, in the gradient, would make it felt."""
    keys_seen = torch.where(visible.unsqueeze(-1), key.unsqueeze(-3), 0)  # (..., Lq, Lk, D)
    return torch.einsum("...id,...ijd->...ij", query, keys_seen)


def _guarded_sum(weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """weights @ value, with the same care."""
    values_seen = torch.where(visible.unsqueeze(-1), value.unsqueeze(-3), 0)  # (..., Lq, Lk, D)
    return torch.einsum("...ij,...ijd->...id", weights, values_seen)


def _softmax(scores: Tensor, visible: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp, (..., Lq, 1), over the visible keys of each row, and its sink."""
    scores = torch.where(visible, scores, -math.inf)
    # One more key, always hidden, gives a maximum to rows of length 0.
    maximum = torch.nn.functional.pad(scores.detach(), (0, 1), value=-math.inf).amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.view(-1, 1, 1)
        maximum = torch.maximum(maximum, sinks.detach())
    maximum = torch.where(maximum == -math.inf, 0, maximum)
    exponentials = torch.where(visible, torch.exp(scores - maximum), 0)
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - maximum)
    dead = total == 0
    total = torch.where(dead, 1, total)
    lse = torch.where(dead, -math.inf, maximum + torch.log(total))
    return exponentials / total, lse


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)
