"""BigBird: windows, global blocks and random ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._blocks import BlockSize, Grid, check_length, full_blocks
from ..block_mask import BlockMask
from ._shapes import as_indices, check_seed, token_grid

_NONE = -1  # in the place of a block


def bigbird(
    seq_len: int,
    window: int = 3,
    global_blocks: Sequence[int] | Tensor = (0, -1),
    random_blocks: int | Tensor = 3,
    seed: int = 0,
    *,
    heads: int = 1,
    block_size: BlockSize = 64,
    kv_len: int | None = None,
) -> BlockMask:
    """BigBird (Zaheer et al., 2020), a pattern of whole blocks; by default that of the published models.

    Every block of queries sees the `window` blocks of keys around its own, the global blocks and some random
    ones; the global blocks of queries see all.

    Args:
        window: blocks, an odd number.
        global_blocks: their indices; negative ones count from the end.
        random_blocks: how many to draw for each head and block of queries, among those that it does not see
            anyway; or which, (H, Qb, r), integers, as another implementation has drawn them.
        seed: of the draw.
        heads: that have random blocks of their own; given by `random_blocks` if it is a tensor.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of range, or a shape does not fit.
    """
    grid = token_grid(seq_len, kv_len, block_size)
    check_length("window", window, least=1)
    if window % 2 == 0:
        raise ValueError(f"window must be an odd number of blocks, got {window}")
    count = min(grid.query_blocks, grid.kv_blocks)
    given = as_indices("global_blocks", global_blocks)
    if given.numel() and not -count <= int(given.min()) <= int(given.max()) < count:
        raise ValueError(f"global_blocks must be from {-count} to {count - 1}, got {given.tolist()}")
    check_seed(seed)

    window = min(window, 2 * max(grid.query_blocks, grid.kv_blocks) + 1)
    row = torch.arange(grid.query_blocks).unsqueeze(1)
    near = row + torch.arange(window) - window // 2
    near = torch.where((near >= 0) & (near < grid.kv_blocks), near, _NONE)
    seen = torch.cat((near, (given % max(grid.kv_blocks, 1)).expand(len(row), -1)), 1)
    if isinstance(random_blocks, Tensor):
        drawn = _check_random_blocks(random_blocks, grid)
    else:
        check_length("random_blocks", random_blocks)
        check_length("heads", heads, least=1)
        generator = torch.Generator().manual_seed(seed)
        drawn = _draw(seen, grid, heads, min(random_blocks, grid.kv_blocks), generator)

    seen = torch.cat((seen.expand(drawn.size(0), -1, -1), drawn), 2)
    first = torch.arange(seen.size(0)).view(-1, 1, 1) * grid.query_blocks
    keys = ((first + row) * grid.kv_blocks + seen)[seen != _NONE]
    everywhere = (first + (given % max(grid.query_blocks, 1)).unsqueeze(1)) * grid.kv_blocks
    everywhere = everywhere + torch.arange(grid.kv_blocks)
    keys = torch.cat((keys, everywhere.flatten())).unique()
    return BlockMask(full_blocks(grid, 1, seen.size(0), keys), grid.query_len, grid.kv_len)


def _check_random_blocks(blocks: Tensor, grid: Grid) -> Tensor:
    if blocks.is_floating_point() or blocks.is_complex() or blocks.dtype == torch.bool:
        raise TypeError(f"random_blocks must be an int or a tensor of integers, got {blocks.dtype}")
    if blocks.dim() != 3 or blocks.size(1) != grid.query_blocks:
        raise ValueError(
            f"random_blocks must be (H, {grid.query_blocks}, r), got shape {tuple(blocks.shape)}"
        )
    if blocks.numel() and not 0 <= int(blocks.min()) <= int(blocks.max()) < grid.kv_blocks:
        raise ValueError(
            f"random_blocks must be from 0 to {grid.kv_blocks - 1}, "
            f"got {int(blocks.min())} to {int(blocks.max())}"
        )
    return blocks.to("cpu", torch.int64)


def _draw(seen: Tensor, grid: Grid, heads: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different blocks that are not `seen` for each head and row, or as many as there are.

    Drawn by Floyd's algorithm (Bentley, 1987) as ranks among the blocks that are not seen.
    """
    seen = seen.sort(1).values
    again = torch.zeros_like(seen, dtype=torch.bool)
    again[:, 1:] = seen[:, 1:] == seen[:, :-1]
    seen = torch.where(again | (seen == _NONE), grid.kv_blocks, seen).sort(1).values
    unseen = grid.kv_blocks - (seen < grid.kv_blocks).sum(1)

    drawn = torch.full((heads, len(seen), count), _NONE)
    for turn in range(count):
        highest = (unseen - count + turn).expand(heads, -1)
        rank = (torch.rand(highest.shape, generator=generator, dtype=torch.float64) * (highest + 1)).long()
        taken = (drawn == rank.unsqueeze(2)).any(2)
        drawn[..., turn] = torch.where(highest < 0, _NONE, torch.where(taken, highest, rank))
    block = drawn
    for skipped in seen.T:
        block = block + (skipped.unsqueeze(1) <= block)
    return torch.where(drawn == _NONE, _NONE, block)
