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
    scale: float | None = None,
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
        scale: factor of the scores, 1 / sqrt(Dk) by default.
        return_lse: also return the log-sum-exp of each row of scores.
        dtype: what everything is converted to and computed in.

    Returns:
        out (B, Hq, Lq, Dv), or (out, lse) with lse (B, Hq, Lq); both of `dtype`.
    """
    weights, lse, visible = _softmax_scores(query, key, mask, scale, dtype)
    out = _weighted_sum(weights, _repeat_heads(value.to(dtype), query.size(1)), visible)
    return (out, lse) if return_lse else out


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Any = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The softmax of the scores, (B, Hq, Lq, Lk), all 0 in a fully masked row; arguments as `attention`."""
    return _softmax_scores(query, key, mask, scale, dtype)[0]


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
    scores = _scores(query, key, visible) * _scale(scale, query) + bias
    return _weighted_sum(_softmax(scores, visible)[0], value, visible)


def _softmax_scores(
    query: Tensor, key: Tensor, mask: Any, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax, the log-sum-exp and the pairs that are visible, for 4-D tensors and any kind of mask."""
    batch, heads, query_len, _ = query.shape
    if mask is not None and not isinstance(mask, Tensor):
        mask = mask.to_dense(batch, heads, query_len, key.size(2), device=query.device)
    visible, bias = _split_mask(mask, query_len, key.size(2), query.device, dtype)
    query, key = query.to(dtype), _repeat_heads(key.to(dtype), heads)
    scores = _scores(query, key, visible) * _scale(scale, query) + bias
    return *_softmax(scores, visible), visible


def _scale(scale: float | None, query: Tensor) -> float:
    return 1 / math.sqrt(query.size(-1)) if scale is None else scale


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """(..., Hkv, L, D) -> (..., heads, L, D): one key head for each query head."""
    group = heads // max(tensor.size(-3), 1)
    return tensor[..., torch.arange(heads, device=tensor.device) // max(group, 1), :, :]


def _split_mask(
    mask: Tensor | None, query_len: int, kv_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which pairs are visible, broadcastable to (..., Lq, Lk), and what is added to the scores of those."""
    everything = torch.ones(query_len, kv_len, dtype=torch.bool, device=device)
    nothing_added = torch.zeros((), dtype=dtype, device=device)
    if mask is None:
        return everything, nothing_added
    if mask.dtype == torch.bool:
        return mask & everything, nothing_added
    allowed = mask != -math.inf
    return allowed & everything, torch.where(allowed, mask, 0).to(dtype)


def _scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """query @ key^T.  A hidden pair must not be formed where 0 * NaN, in the gradient, would make it felt."""
    if _all_finite(query, key):
        return query @ key.mT
    keys_seen = torch.where(visible.unsqueeze(-1), key.unsqueeze(-3), 0)  # (..., Lq, Lk, D)
    return torch.einsum("...id,...ijd->...ij", query, keys_seen)


def _weighted_sum(weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """weights @ value, with the same care."""
    if _all_finite(weights, value):
        return weights @ value
    values_seen = torch.where(visible.unsqueeze(-1), value.unsqueeze(-3), 0)  # (..., Lq, Lk, D)
    return torch.einsum("...ij,...ijd->...id", weights, values_seen)


def _softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the visible keys of each row."""
    scores = torch.where(visible, scores, -math.inf)
    # One more key, always hidden, gives a maximum to rows of length 0.
    maximum = torch.nn.functional.pad(scores.detach(), (0, 1), value=-math.inf).amax(-1, keepdim=True)
    maximum = torch.where(maximum == -math.inf, 0, maximum)
    exponentials = torch.where(visible, torch.exp(scores - maximum), 0)
    total = exponentials.sum(-1, keepdim=True)
    dead = total == 0
    total = torch.where(dead, 1, total)
    lse = torch.where(dead, -math.inf, maximum + torch.log(total))
    return exponentials / total, lse.squeeze(-1)


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)
