"""One attention out of two over different keys: the rule by which partial softmaxes add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .masks import FLOAT_DTYPES

__all__ = ["merge"]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from attention over each: flash-decoding, cascade, ring.

    With p = exp(lse_a - lse), out = p * out_a + (1 - p) * out_b and lse = log(exp(lse_a) + exp(lse_b)): the
    online softmax (Milakov and Gimelshein, 2018) of whole parts. Associative up to rounding. A part without
    keys, lse -inf and out 0, leaves the other as it is. Differentiable any number of times in all arguments.

    Args:
        out_a, out_b: (B, H, L, D), float32, float64, float16 or bfloat16, as `attention` returns them.
        lse_a, lse_b: (B, H, L), float32 or float64, natural logarithms.

    Returns:
        out (B, H, L, D), of the dtype and in the memory order of out_a; lse (B, H, L). Computed in float64 if
        any argument is float64, else in float32, which is the dtype of lse. Rows that neither part has keys
        for have out 0, lse -inf and gradient 0.

    Raises:
        TypeError: an argument is not a tensor of these dtypes.
        ValueError: shapes do not fit, or devices differ.
    """
    _check(out_a, lse_a, out_b, lse_b)
    double = torch.float64 in (out_a.dtype, lse_a.dtype, out_b.dtype, lse_b.dtype)
    dtype = torch.float64 if double else torch.float32
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)

    # Any shift gives the same results; this one lets nothing overflow, and -inf - -inf never be formed.
    shift = torch.maximum(lse_a, lse_b).detach()
    shift = torch.where(shift == -torch.inf, 0, shift)
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    dead = total == 0
    total = torch.where(dead, 1, total)
    lse = torch.where(dead, -torch.inf, shift + torch.log(total))

    share_a, share_b = (weight_a / total).unsqueeze(-1), (weight_b / total).unsqueeze(-1)
    out = out_a.to(dtype) * share_a + out_b.to(dtype) * share_b
    return out.to(out_a.dtype), lse


def _check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> None:
    arguments = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    for name in ("out_a", "out_b"):
        if arguments[name].dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, float16 or bfloat16, got {arguments[name].dtype}"
            )
    for name in ("lse_a", "lse_b"):
        if arguments[name].dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {arguments[name].dtype}")
    if out_a.dim() != 4:
        raise ValueError(f"out_a must be (B, H, L, D), got shape {tuple(out_a.shape)}")
    for name, shape in (("lse_a", out_a.shape[:3]), ("out_b", out_a.shape), ("lse_b", out_a.shape[:3])):
        if arguments[name].shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)} to go with out_a, got shape {tuple(arguments[name].shape)}"
            )
    for name, tensor in arguments.items():
        if tensor.device != out_a.device:
            raise ValueError(f"{name} must be on the device of out_a, {out_a.device}, got {tensor.device}")
