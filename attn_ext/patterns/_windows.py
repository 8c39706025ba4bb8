"""Windows around the diagonal, alone and with tokens that see or are seen from everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._blocks import BlockSize, check_length
from ..block_mask import BlockMask
from ..masks import Causal, Prefix, SlidingWindow
from ._shapes import as_indices, columns, diagonals, rows, token_grid


def sliding_window(
    seq_len: int,
    left: int | None,
    right: int | None = 0,
    *,
    block_size: BlockSize = 64,
    kv_len: int | None = None,
) -> BlockMask:
    """Query i sees keys i - left .. i + right, inclusive; None is no bound.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative or no size of a block.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    window = SlidingWindow(left, right)
    return BlockMask.from_mask(window, grid.query_len, grid.kv_len, block_size=block_size)


def dilated(
    seq_len: int, window: int, dilation: int, *, block_size: BlockSize = 64, kv_len: int | None = None
) -> BlockMask:
    """Query i sees keys i + n * dilation, |n| <= window: a window with gaps (Beltagy et al., 2020).

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative, `dilation` is 0 or `block_size` no size of a block.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    check_length("window", window)
    check_length("dilation", dilation, least=1)
    dilation = min(dilation, max(grid.query_len, grid.kv_len, 1))  # of which no multiple but 0 is in reach
    reach = window * dilation
    return diagonals(grid, lambda distance: distance % dilation == 0, -reach, reach)


def prefix_lm(
    seq_len: int, prefix: int, *, block_size: BlockSize = 64, kv_len: int | None = None
) -> BlockMask:
    """Every query sees the first `prefix` keys, and those up to its own position (Raffel et al., 2020).

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative or no size of a block.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    mask = Causal() | Prefix(prefix)
    return BlockMask.from_mask(mask, grid.query_len, grid.kv_len, block_size=block_size)


def streaming(
    seq_len: int, sinks: int, window: int, *, block_size: BlockSize = 64, kv_len: int | None = None
) -> BlockMask:
    """A query sees the last `window` keys up to its own, and the first `sinks` (Xiao et al., 2024).

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative, `window` is 0 or `block_size` no size of a block.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    check_length("sinks", sinks)
    check_length("window", window, least=1)
    mask = (SlidingWindow(window - 1, 0) | Prefix(sinks)) & Causal()
    return BlockMask.from_mask(mask, grid.query_len, grid.kv_len, block_size=block_size)


def longformer(
    seq_len: int,
    window: int,
    global_tokens: Sequence[int] | Tensor = (),
    *,
    block_size: BlockSize = 64,
    kv_len: int | None = None,
) -> BlockMask:
    """A window of `window` keys on each side, and tokens that see all keys and are seen by all queries.

    Longformer (Beltagy et al., 2020), whose window sizes count both sides.

    Args:
        global_tokens: their positions, a sequence or a tensor (n,) of int.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is negative, no size of a block or, of a position, not in the sequence.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    check_length("window", window)
    tokens = as_indices("global_tokens", global_tokens)
    length = max(grid.query_len, grid.kv_len)
    window = min(window, length)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < length:
        raise ValueError(f"global_tokens must be from 0 to {length - 1}, got {tokens.tolist()}")
    everywhere = torch.zeros(length, dtype=torch.bool)
    everywhere[tokens] = True
    band = diagonals(grid, lambda distance: distance.abs() <= window, -window, window)
    return band | columns(grid, everywhere[: grid.kv_len]) | rows(grid, everywhere[: grid.query_len])
