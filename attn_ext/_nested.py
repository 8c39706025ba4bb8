"""Nested (jagged) tensors, whose sequences are packed already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .masks import Causal
from .varlen import attention_varlen


def scaled_dot_product_attention_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` of (B, H, j, D) each, where lengths j of key are those of value.

    Returns:
        (B, Hq, j, Dv), with the lengths of query.
    """
    if attn_mask is not None:
        raise ValueError("attn_mask must be None for nested tensors: use attn_ext.attention_varlen")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    (q, q_offsets), (k, k_offsets), (v, v_offsets) = (
        _unpack(name, tensor) for name, tensor in (("query", query), ("key", key), ("value", value))
    )
    if v_offsets is not k_offsets and not torch.equal(v_offsets, k_offsets):
        raise ValueError("value must have the lengths of key")
    if q_offsets.shape != k_offsets.shape:
        raise ValueError(
            f"key must have the batch size of query, {query.shape[0]}, got shape {tuple(key.shape)}"
        )
    if not enable_gqa and not q.shape[1] == k.shape[1] == v.shape[1]:
        raise ValueError(
            "query, key and value must have as many heads, without enable_gqa, got "
            f"{q.shape[1]}, {k.shape[1]} and {v.shape[1]}"
        )
    mask = Causal() if is_causal else None
    out = attention_varlen(q, k, v, q_offsets, k_offsets, mask=mask, dropout_p=dropout_p, scale=scale)
    return torch.nested.nested_tensor_from_jagged(out, q_offsets).transpose(1, 2)


def _unpack(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens (T, H, D), and where each sequence begins and the last ends, (B + 1,)."""
    if tensor.layout != torch.jagged:
        raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, got {tensor.layout}")
    if tensor.dim() != 4 or tensor._ragged_idx != 2:  # no public name says which dimension is ragged
        raise ValueError(
            f"{name} must be (B, H, j, D), of different lengths j, got shape {tuple(tensor.shape)}"
        )
    tensor = tensor.transpose(1, 2)
    if tensor.lengths() is not None:  # there are gaps between the sequences
        tensor = tensor.contiguous()
    return tensor.values(), tensor.offsets()
