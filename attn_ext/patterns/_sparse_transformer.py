"""The factorised patterns of the Sparse Transformer (Child et al., 2019), each as the union of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from .._blocks import BlockSize, check_length
from ..block_mask import BlockMask
from ..masks import Causal, Segments
from ._shapes import columns, diagonals, token_grid


def strided(seq_len: int, stride: int, *, block_size: BlockSize = 64, kv_len: int | None = None) -> BlockMask:
    """Query i sees the `stride` keys before its own, its own, and every `stride`-th before that.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative, `stride` is 0 or `block_size` no size of a block.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    check_length("stride", stride, least=1)
    stride = min(stride, max(grid.query_len, 1))  # from where on every key of the past is seen
    return diagonals(
        grid, lambda distance: (distance >= -stride) | (distance % stride == 0), -grid.query_len, 0
    )


def fixed(
    seq_len: int, stride: int, c: int = 8, *, block_size: BlockSize = 64, kv_len: int | None = None
) -> BlockMask:
    """Query i sees, up to its own position, the keys of its segment and the last `c` of every segment.

    Args:
        stride: tokens of a segment.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative, `stride` or `c` is 0, `c` is more than `stride`, or `block_size` is
            no size of a block.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    check_length("stride", stride, least=1)
    check_length("c", c, least=1)
    if c > stride:
        raise ValueError(f"c must be at most stride, {stride}, got {c}")
    stride = min(stride, max(grid.query_len, grid.kv_len, 1))  # from where on there is one segment
    c = min(c, stride)
    query, key = torch.arange(grid.query_len), torch.arange(grid.kv_len)
    segments = Segments(query // stride, key // stride) & Causal()

    def earlier(row: Tensor, column: Tensor) -> Tensor:
        return (column + 1) * grid.kv_block <= row * grid.query_block

    def near(row: Tensor, column: Tensor) -> Tensor:
        return ~earlier(row, column) & (column * grid.kv_block < (row + 1) * grid.query_block)

    # Only the blocks on the diagonal are looked at for what is causal in them.
    summary = key % stride >= stride - c
    diagonal = (columns(grid, summary, near) | segments) & Causal()
    return columns(grid, summary, earlier) | diagonal.without_rule()
