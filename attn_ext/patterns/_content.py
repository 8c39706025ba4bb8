"""Blocks that are chosen by scores: of the queries and keys themselves, or of anything else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._blocks import BlockSize, as_block_size, check_length
from .._validation import _check_bool
from ..block_mask import BlockMask
from ..masks import Causal, Mask


def from_scores(
    scores: Tensor,
    *,
    k: int | None = None,
    threshold: float | None = None,
    query_len: int | None = None,
    kv_len: int | None = None,
    block_size: BlockSize = 64,
    rule: Mask | None = None,
) -> BlockMask:
    """The blocks with the best scores in their row, or with scores that are good enough.

    Args:
        scores: (Qb, Kb), (H, Qb, Kb) or (B or 1, H or 1, Qb, Kb), floating point; blocks of score -inf are
            never seen.
        k: blocks for each block of queries, or as many as there are; or
        threshold: the least score.
        query_len, kv_len, block_size, rule: as for `BlockMask.from_map`.

    Raises:
        TypeError: `scores` is not a floating-point tensor, or another argument is of another type.
        ValueError: a score or `threshold` is NaN, a number or shape does not fit, or not just one of `k` and
            `threshold` is given.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a floating-point tensor, got {got}")
    if not 2 <= scores.dim() <= 4:
        raise ValueError(
            f"scores must be (Qb, Kb), (H, Qb, Kb) or (B, H, Qb, Kb), got shape {tuple(scores.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN")
    if (k is None) == (threshold is None):
        raise ValueError(f"either k or threshold must be given, got k={k} and threshold={threshold}")
    scores = scores.detach()
    if k is None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a float, got {type(threshold).__name__}")
        if math.isnan(threshold):
            raise ValueError("threshold must not be NaN")
        chosen = scores >= threshold
    else:
        check_length("k", k)
        chosen = _best(scores, k)
    return BlockMask.from_map(
        chosen & (scores != -math.inf), query_len=query_len, kv_len=kv_len, block_size=block_size, rule=rule
    )


def topk_blocks(
    query: Tensor, key: Tensor, k: int, *, causal: bool = False, block_size: BlockSize = 64
) -> BlockMask:
    """The `k` blocks of keys whose mean is closest to that of a block of queries, by their dot product.

    Args:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D), with H a multiple of Hkv.
        k: blocks for each block of queries, or as many as there are.
        causal: with Lq == Lk; the rule is `Causal()`, and blocks of keys that overlap the block of queries
            are always chosen, even if they are more than `k`; what is left of `k` goes to the closest of the
            blocks before them.

    Raises:
        TypeError: an argument is of another type, or dtypes differ.
        ValueError: shapes or numbers do not fit, or a product is infinite or NaN.
    """
    _check_bool("causal", causal)
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(tensor)}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, L, D), got shape {tuple(tensor.shape)}")
    if key.dtype != query.dtype:
        raise TypeError(f"key must have the dtype of query, {query.dtype}, got {key.dtype}")
    heads, kv_heads = query.size(1), key.size(1)
    same = (key.size(0), key.size(3)) == (query.size(0), query.size(3))
    if not same or 0 in query.shape[:2] or not kv_heads or heads % kv_heads:
        raise ValueError(
            "query and key must have the same batch size and head_dim, and query a multiple of the heads of "
            f"key, none of them 0, got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    query_len, kv_len = query.size(2), key.size(2)
    if causal and query_len != kv_len:
        raise ValueError(f"query and key must be as long when causal, got {query_len} and {kv_len}")
    check_length("k", k, least=1)
    query_block, kv_block = as_block_size(block_size)
    query_means = _block_means(query, query_block).unflatten(1, (kv_heads, -1))
    key_means = _block_means(key, kv_block).unsqueeze(2)
    scores = (query_means @ key_means.mT).flatten(1, 2)
    if not bool(scores.isfinite().all()):
        raise ValueError("query and key must be finite, and the products of their blocks' means")
    chosen = _best_of_the_past(scores, k, query_block, kv_block) if causal else _best(scores, k)
    return BlockMask.from_map(
        chosen,
        query_len=query_len,
        kv_len=kv_len,
        block_size=block_size,
        rule=Causal() if causal else None,
    )


def _best(scores: Tensor, k: int, places: Tensor | None = None) -> Tensor:
    """Where the `k` largest of each row are, or of these the first `places`, (rows, 1)."""
    best = scores.topk(min(k, scores.size(-1)), dim=-1).indices
    rank = torch.arange(best.size(-1), device=scores.device)
    taken = (rank < (k if places is None else places)).expand_as(best)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, taken)


def _best_of_the_past(scores: Tensor, k: int, query_block: int, kv_block: int) -> Tensor:
    """Blocks of keys that overlap the block of queries, and before them the best for the rest of `k`."""
    begin = torch.arange(scores.size(-2), device=scores.device).unsqueeze(1) * query_block
    column = torch.arange(scores.size(-1), device=scores.device) * kv_block
    earlier = column + kv_block <= begin
    overlapping = ~earlier & (column < begin + query_block)
    best = _best(scores.masked_fill(~earlier, -math.inf), k, k - overlapping.sum(1, keepdim=True))
    return overlapping | (earlier & best)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _block_means(tensor: Tensor, block: int) -> Tensor:
    """(B, H, L, D) -> (B, H, blocks, D), in fp32 or fp64; the last block may be shorter than the others."""
    tensor = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    length = tensor.size(2)
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, -length % block))
    sums = padded.unflatten(2, (-1, block)).sum(3)
    counts = (length - torch.arange(sums.size(2), device=tensor.device) * block).clamp(max=block)
    return sums / counts.unsqueeze(1)
