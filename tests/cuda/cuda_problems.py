"""Problems for the CUDA kernels, and what they are with tensors on another device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from problems import make_options

from attn_ext.block_mask import BlockMask
from attn_ext.masks import Conjunction, Dense, Disjunction, Mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def convert(options: dict[str, Any], function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Options of `attn_ext.attention` with other tensors."""

    def converted(option: Any) -> Any:
        if isinstance(option, torch.Tensor):
            return function(option)
        return convert_mask(option, function) if isinstance(option, Mask) else option

    return {name: converted(option) for name, option in options.items()}


def convert_mask(mask: Mask, function: Callable[[torch.Tensor], torch.Tensor]) -> Mask:
    """A mask with other dense parts; those that are made of numbers follow the query by themselves."""
    if isinstance(mask, Dense):
        return Dense(function(mask.tensor))
    if isinstance(mask, (Conjunction, Disjunction)):
        return type(mask)(tuple(convert_mask(part, function) for part in mask.masks))
    if isinstance(mask, BlockMask) and mask.rule is not None:
        return dataclasses.replace(mask, rule=convert_mask(mask.rule, function))
    return mask


def make_cuda_options(
    names: tuple[str, ...], batch: int, heads: int, query_len: int, kv_len: int
) -> dict[str, Any]:
    """`make_options`, with no bias of float64, which CUDA does not take, and none that requires grad."""

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float() if tensor.dtype == torch.float64 else tensor.detach()

    return convert(make_options(names, batch, heads, query_len, kv_len), narrow)
