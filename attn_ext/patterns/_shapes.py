"""What patterns are put together from: diagonals, columns and rows of the score matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._blocks import BlockSize, Grid, assemble, check_length, make_grid, pack
from ..block_mask import BlockMask


def token_grid(seq_len: Any, kv_len: Any, block_size: BlockSize) -> Grid:
    """The grid of a pattern for `seq_len` queries and `kv_len` keys, or as many.

    Raises:
        TypeError: a length or size is not an int.
        ValueError: a length is negative, or a size no multiple of 16.
    """
    check_length("seq_len", seq_len)
    return make_grid(seq_len, seq_len if kv_len is None else kv_len, block_size)


def diagonals(grid: Grid, seen: Callable[[Tensor], Tensor], lower: int, upper: int) -> BlockMask:
    """Query q sees key k if lower <= k - q <= upper and seen(k - q).

    All blocks as far from the diagonal look the same, so each distance is looked at once.
    """
    query_block, kv_block = grid.query_block, grid.kv_block
    lower, upper = max(lower, -grid.query_len + 1), min(upper, grid.kv_len - 1)
    # The distances from the first query of a block to its first key: multiples of what divides both sizes.
    step = math.gcd(query_block, kv_block)
    first, last = -(-(lower - kv_block + 1) // step) * step, (upper + query_block - 1) // step * step
    distances = torch.arange(first, max(last + 1, first), step)
    pairs = torch.arange(first - query_block + 1, max(last, first) + kv_block)
    shown = seen(pairs) & (pairs >= lower) & (pairs <= upper)
    # Of the block at distance d, key k and query q are pair d + k - q.
    windows = shown.unfold(0, query_block, 1)
    touched = shown.unfold(0, query_block + kv_block - 1, step)[: distances.numel()].any(1)
    distances = distances[touched]
    keys = torch.arange(kv_block) + (distances - first).unsqueeze(1)
    bits = pack(windows[keys].flip(-1))

    row = torch.arange(grid.query_blocks).unsqueeze(1)
    begin = distances + row * query_block
    inside = (begin % kv_block == 0) & (begin >= 0) & (begin < grid.kv_len)
    tiles = torch.arange(distances.numel()).expand_as(begin)[inside]
    keys = (row * grid.kv_blocks + begin // kv_block)[inside]
    return BlockMask(assemble(grid, 1, 1, keys, tiles, bits), grid.query_len, grid.kv_len)


def columns(grid: Grid, seen: Tensor, within: Callable[[Tensor, Tensor], Tensor] | None = None) -> BlockMask:
    """Every query sees the keys for which `seen`, (Lk,), is true.

    Args:
        within: which blocks to look at, of rows and columns of blocks; all by default.
    """
    seen = _in_blocks(seen, grid.kv_block)
    touched = seen.any(1).nonzero().squeeze(1)
    bits = seen[touched].unsqueeze(-1).expand(-1, -1, grid.query_block)
    row = torch.arange(grid.query_blocks).unsqueeze(1)
    keys = row * grid.kv_blocks + touched
    tiles = torch.arange(touched.numel()).expand_as(keys)
    chosen = torch.ones_like(keys, dtype=torch.bool) if within is None else within(row, touched)
    blocks = assemble(grid, 1, 1, keys[chosen], tiles[chosen], pack(bits))
    return BlockMask(blocks, grid.query_len, grid.kv_len)


def rows(grid: Grid, seeing: Tensor) -> BlockMask:
    """The queries for which `seeing`, (Lq,), is true see every key."""
    seeing = _in_blocks(seeing, grid.query_block)
    touched = seeing.any(1).nonzero().squeeze(1)
    bits = seeing[touched].unsqueeze(1).expand(-1, grid.kv_block, -1)
    keys = touched.unsqueeze(1) * grid.kv_blocks + torch.arange(grid.kv_blocks)
    tiles = torch.arange(touched.numel()).unsqueeze(1).expand_as(keys)
    blocks = assemble(grid, 1, 1, keys.flatten(), tiles.flatten(), pack(bits))
    return BlockMask(blocks, grid.query_len, grid.kv_len)


def _in_blocks(tokens: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, -tokens.numel() % block)).view(-1, block)


def as_indices(name: str, indices: Any) -> Tensor:
    """A sequence of int, or an integer tensor of one dimension, as int64.

    Raises:
        TypeError: it is neither.
        ValueError: a number does not fit in 64 bits.
    """
    if isinstance(indices, Tensor):
        if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(
                f"{name} must be a sequence of int or a 1-D integer tensor, "
                f"got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        return indices.to("cpu", torch.int64)
    if not isinstance(indices, Sequence) or not all(
        isinstance(index, int) and not isinstance(index, bool) for index in indices
    ):
        raise TypeError(f"{name} must be a sequence of int or a 1-D integer tensor, got {indices!r}")
    if any(not -(2**63) <= index < 2**63 for index in indices):
        raise ValueError(f"{name} must fit in 64 bits, got {indices!r}")
    return torch.tensor(indices, dtype=torch.int64)


def check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
