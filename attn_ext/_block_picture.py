"""How much of a block mask is seen where."""

from __future__ import annotations

import torch
from torch import Tensor

from ._blocks import FULL, Blocks, Grid, edges_of, inside_edges, keys_of

_TEXT_ROWS, _TEXT_COLUMNS = 16, 32
_SHADES = " ░▒▓█"


def as_text(grid: Grid, blocks: Blocks) -> list[str]:
    """A small picture of the first head of the first batch entry; a cell is solid if all of it is seen."""
    rows, columns = min(grid.query_blocks, _TEXT_ROWS), min(grid.kv_blocks, _TEXT_COLUMNS)
    seen = shares(grid, blocks, 0, 0, rows, columns)
    levels = (seen * (len(_SHADES) - 2)).ceil().to(torch.int64)
    levels[seen == 1] = len(_SHADES) - 1
    return ["".join(_SHADES[level] for level in row) for row in levels.tolist()]


def shares(grid: Grid, blocks: Blocks, entry: int, head: int, rows: int, columns: int) -> Tensor:
    """The share of the pairs that is seen in each cell of a picture of one head, (rows, columns)."""
    offsets = blocks.offsets[entry, head]
    begin, end = int(offsets[0]), int(offsets[-1])
    entries = (tensor[begin:end] for tensor in (blocks.indices, blocks.tiles))
    one = Blocks((offsets - begin)[None, None], *entries, blocks.bits)
    row = torch.repeat_interleave(torch.arange(grid.query_blocks, device=offsets.device), offsets.diff())
    cell = row * rows // max(grid.query_blocks, 1) * columns
    cell = cell + one.indices.to(torch.int64) * columns // max(grid.kv_blocks, 1)
    seen = torch.zeros(rows * columns, dtype=torch.int64, device=offsets.device)
    seen.index_add_(0, cell, _visible_counts(grid, one))
    heights = _elements_of_cells(grid.query_len, grid.query_block, rows, offsets.device)
    widths = _elements_of_cells(grid.kv_len, grid.kv_block, columns, offsets.device)
    return seen.view(rows, columns) / (heights.unsqueeze(1) * widths).clamp(min=1)


def _elements_of_cells(length: int, block: int, cells: int, device: torch.device) -> Tensor:
    """How many of `length` elements fall in each cell, if whole blocks do."""
    element = torch.arange(length, device=device)
    return torch.bincount(element // block * cells // max(-(-length // block), 1), minlength=cells)


def _visible_counts(grid: Grid, blocks: Blocks) -> Tensor:
    """How many pairs of query and key each listed block lets see, (n,), int64."""
    # A full block has no tile: what lies within the grid is what it shows.
    tiles = torch.cat((inside_edges(grid, blocks.bits.device), blocks.bits))
    ones = tiles - (tiles >> 1 & 0x55)  # in each pair of bits, then in four, then in eight
    ones = (ones & 0x33) + (ones >> 2 & 0x33)
    areas = ((ones + (ones >> 4)) & 0x0F).sum((1, 2))
    edges = edges_of(grid, keys_of(blocks, grid))
    return areas[torch.where(blocks.tiles == FULL, edges, blocks.tiles.to(torch.int64) + 4)]
