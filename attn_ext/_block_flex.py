"""Block masks as those of `torch.nn.attention.flex_attention`, and back.

Its module is loaded where it is needed, as the compiler comes with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._block_cover import evaluate, sizes_of
from ._blocks import (
    ABSENT,
    FULL,
    Blocks,
    Grid,
    assemble,
    bits_at,
    common_sizes,
    expand,
    make_grid,
    tile_map,
)
from .masks import LoweredMask


def from_flex(flex_block_mask: Any) -> tuple[Grid, Blocks]:
    """The lists of both kinds of blocks, and the bits that the mask_mod has in the partial ones."""
    from torch.nn.attention import flex_attention

    if not isinstance(flex_block_mask, flex_attention.BlockMask):
        raise TypeError(
            "flex_block_mask must be a torch.nn.attention.flex_attention.BlockMask, "
            f"got {type(flex_block_mask).__name__}"
        )
    flex = flex_block_mask
    if flex.kv_indices.dim() != 4:
        raise ValueError(
            "flex_block_mask must have kv_indices of shape (B, H, query blocks, key blocks), "
            f"got {tuple(flex.kv_indices.shape)}"
        )
    batch, heads = flex.kv_indices.shape[:2]
    grid = make_grid(*flex.seq_lengths, tuple(flex.BLOCK_SIZE))

    def visible(entry: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Under flex's own vmap, as a mask_mod may count on indices that are numbers.
        entry, head, query, key = entry.flatten(), head.flatten(), query.flatten(1), key.flatten(1)

        def element(_: Tensor, block: Tensor, k: Tensor, q: Tensor) -> Tensor:
            return flex.mask_mod(entry[block], head[block], query[block, q], key[block, k])

        sizes = 1, entry.numel(), key.size(1), grid.query_block
        return flex_attention.create_mask(element, *sizes, device=entry.device).squeeze(0)

    keys = _listed_keys(flex.kv_num_blocks, flex.kv_indices, grid)
    tiles, bits = evaluate(grid, heads, keys, visible)
    if flex.full_kv_num_blocks is not None:
        full = _listed_keys(flex.full_kv_num_blocks, flex.full_kv_indices, grid)
        keys, order = torch.cat((keys, full)).sort()
        tiles = torch.cat((tiles, torch.full_like(full, FULL)))[order]
    return grid, assemble(grid, batch, heads, keys, tiles, bits)


def to_flex(grid: Grid, blocks: Blocks, rule: LoweredMask | None) -> Any:
    """Its mask_mod looks bits and rule up; with a rule, all blocks are partial.

    Raises:
        ValueError: blocks and rule are of different numbers of batch entries or heads.
    """
    from torch.nn.attention import flex_attention

    if rule is not None:
        blocks = expand(blocks, grid, *common_sizes(blocks.offsets.shape[:2], sizes_of(rule)))
    tiles = tile_map(blocks, 0, grid.query_blocks, grid.kv_blocks)
    batch, heads = tiles.shape[:2]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        tile = tiles[b * (batch > 1), h * (heads > 1), q // grid.query_block, k // grid.kv_block]
        seen = bits_at(blocks.bits, tile, q % grid.query_block, k % grid.kv_block)
        return seen if rule is None else seen & rule.visible_pairs(b, h, q, k)

    full = (tiles == FULL) & (rule is None)
    return flex_attention.BlockMask.from_kv_blocks(
        *_as_lists((tiles != ABSENT) & ~full),
        *_as_lists(full),
        BLOCK_SIZE=(grid.query_block, grid.kv_block),
        mask_mod=mask_mod,
        seq_lengths=(grid.query_len, grid.kv_len),
    )


def _listed_keys(counts: Tensor, indices: Tensor, grid: Grid) -> Tensor:
    row = torch.arange(counts.numel(), device=counts.device).view(*counts.shape, 1)
    listed = torch.arange(indices.size(-1), device=counts.device) < counts.unsqueeze(-1)
    return (row * grid.kv_blocks + indices)[listed].sort().values


def _as_lists(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are in each row, and their indices, before those of all others."""
    order = torch.argsort(block_map.to(torch.uint8), dim=-1, descending=True, stable=True)
    return block_map.sum(-1, dtype=torch.int32), order.to(torch.int32)
