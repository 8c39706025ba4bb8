"""Which blocks of the score matrix a mask touches, and which it lets through whole.

A mask that is a few ranges of keys for each query covers, in each block of queries, a few intervals of blocks
of keys. They follow from sorting the ends of the ranges: time and memory of the ranges, not of the scores.
Only what is left between the two kinds of blocks is looked at, element by element.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._blocks import (
    ABSENT,
    FULL,
    Blocks,
    Grid,
    canonical_tiles,
    common_sizes,
    count_up,
    expand,
    full_blocks,
    keys_of,
    meet,
    no_bits,
    pack,
    split_keys,
)
from .masks import LoweredMask, as_ranges

_PAIRS_AT_ONCE = 2**21  # of query and key that are looked at, which bounds scratch memory


class _Intervals(NamedTuple):
    """Disjoint intervals of keys of blocks, in rising order."""

    begin: Tensor
    end: Tensor

    def keys(self) -> Tensor:
        return count_up(self.begin, self.end - self.begin)

    def hold(self, keys: Tensor) -> Tensor:
        """Which of the keys, rising, are in one of them."""
        inside = torch.zeros(keys.numel() + 1, dtype=torch.int32, device=keys.device)
        for ends, change in ((self.begin, 1), (self.end, -1)):
            places = torch.searchsorted(keys, ends)
            inside.index_add_(0, places, torch.full_like(places, change, dtype=torch.int32))
        return inside[:-1].cumsum(0) > 0

    def expand(self, size: int, entries: Tensor) -> _Intervals:
        """The intervals of some batch entries of `size` keys, one after the other."""
        entry = self.begin // max(size, 1)
        counts = torch.bincount(entry, minlength=int(entries.max()) + 1)
        begins = (counts.cumsum(0) - counts)[entries]
        counts = counts[entries]
        index = count_up(begins, counts)
        shift = torch.arange(entries.numel(), device=entries.device) - entries
        shift = torch.repeat_interleave(shift * size, counts)
        return _Intervals(self.begin[index] + shift, self.end[index] + shift)


class _Cover(NamedTuple):
    """The blocks that ranges of keys touch, and those that they fill, of `_range_batch` batch entries."""

    touched: _Intervals
    full: _Intervals | None  # None where ranges do not say it all
    elements: LoweredMask  # the same mask in the terms that are quickest to look at


def from_lowered(grid: Grid, lowered: LoweredMask, device: torch.device, rule: bool) -> Blocks:
    """The blocks that a boolean mask touches.

    Args:
        rule: the mask stays as a rule for the elements: all blocks are full, unless it has a dense part.
    """
    batch, heads = sizes_of(lowered)
    cover = _cover(grid, lowered, device)
    blocks = full_blocks(grid, _range_batch(lowered), 1, cover.touched.keys())
    blocks = expand(blocks, grid, batch, heads)
    if rule and cover.full is not None:
        return blocks
    blocks = _restrict(grid, blocks, lowered, cover)
    if rule and lowered.dense is None:
        tiles = torch.full_like(blocks.tiles, FULL)
        blocks = blocks._replace(tiles=tiles, bits=no_bits(grid, device))
    return blocks


def restrict(grid: Grid, blocks: Blocks, lowered: LoweredMask, device: torch.device) -> Blocks:
    """What a boolean mask leaves of the blocks, with its elements in their bits."""
    return _restrict(grid, blocks, lowered, _cover(grid, lowered, device))


def _restrict(grid: Grid, blocks: Blocks, lowered: LoweredMask, cover: _Cover) -> Blocks:
    batch, heads = common_sizes(blocks.offsets.shape[:2], sizes_of(lowered))
    blocks = expand(blocks, grid, batch, heads)
    keys = keys_of(blocks, grid)
    entries = torch.arange(batch, device=keys.device) * (_range_batch(lowered) > 1)
    layout = grid.query_blocks * grid.kv_blocks, entries.repeat_interleave(heads)
    tiles = torch.where(cover.touched.expand(*layout).hold(keys), FULL, ABSENT)
    partial = tiles == FULL
    if cover.full is not None:
        partial &= ~cover.full.expand(*layout).hold(keys)
    partial = partial.nonzero().squeeze(1)
    seen, bits = evaluate(grid, heads, keys[partial], cover.elements.visible_pairs)
    count = blocks.bits.size(0)
    tiles[partial] = torch.where(seen < 0, seen, seen + count)
    own = blocks.tiles.to(torch.int64)
    return meet(grid, batch, heads, keys, own, tiles, torch.cat((blocks.bits, bits)))


def evaluate(
    grid: Grid, heads: int, keys: Tensor, visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The tile of each of some blocks, by what `visible` says of their pairs of query and key.

    Args:
        visible: of batch entry, head, query and key, index tensors that broadcast; called for some blocks at
            a time, or for some keys of one. Beyond the last query or key it is asked about the last.
    """
    query = torch.arange(grid.query_block, device=keys.device)
    key = torch.arange(grid.kv_block, device=keys.device).unsqueeze(1)
    if keys.numel() == 0:
        return keys, no_bits(grid, keys.device)
    tiles, bits, count = [], [], 0
    keys_at_once = key.split(max(_PAIRS_AT_ONCE // grid.query_block, 1))
    for some in keys.split(max(_PAIRS_AT_ONCE // (grid.query_block * grid.kv_block), 1)):
        entry, head, row, column = (place.view(-1, 1, 1) for place in split_keys(some, grid, heads))
        queries = (row * grid.query_block + query).clamp(max=grid.query_len - 1)
        packed = []
        for part in keys_at_once:
            keys_of_block = (column * grid.kv_block + part).clamp(max=grid.kv_len - 1)
            seen = visible(entry, head, queries, keys_of_block)
            packed.append(pack(seen.expand(some.numel(), part.size(0), grid.query_block)))
        numbers = torch.arange(some.numel(), device=keys.device)
        numbers, different = canonical_tiles(grid, some, numbers, torch.cat(packed, 1))
        tiles.append(torch.where(numbers < 0, numbers, numbers + count))
        bits.append(different)
        count += different.size(0)
    return torch.cat(tiles), torch.cat(bits)


def sizes_of(lowered: LoweredMask) -> tuple[int, int]:
    """The batch entries and heads that the mask tells apart."""
    dense = (1, 1) if lowered.dense is None else (lowered.dense.size(0), lowered.dense.size(1))
    return max(_range_batch(lowered), dense[0]), dense[1]


def _range_batch(lowered: LoweredMask) -> int:
    tensors = (lowered.key_ranges, lowered.query_segments, lowered.kv_segments)
    return max((tensor.size(0) for tensor in tensors if tensor is not None), default=1)


def _cover(grid: Grid, lowered: LoweredMask, device: torch.device) -> _Cover:
    """By the mask's ranges, which are not all of it with a dense part or segments that are not contiguous."""
    ranges = None
    if lowered.dense is None:
        with contextlib.suppress(NotImplementedError):  # which says that segments are not contiguous
            ranges = as_ranges(lowered, grid.query_len, grid.kv_len, device)
    exact = ranges is not None
    if ranges is None:
        hull = lowered._replace(query_segments=None, kv_segments=None, dense=None)
        ranges = as_ranges(hull, grid.query_len, grid.kv_len, device)
    ranges = ranges.expand(_range_batch(lowered), grid.query_len, -1, 2)
    begin, end = _merged(ranges[..., 0], ranges[..., 1])
    block = grid.kv_block
    touched = _covered(grid, begin // block, torch.where(begin < end, -(-end // block), 0), 1)
    if not exact:
        return _Cover(touched, None, lowered)
    full_end = torch.where(end == grid.kv_len, grid.kv_blocks, end // block)
    full = _covered(grid, -(-begin // block), full_end, grid.query_block)
    return _Cover(touched, full, LoweredMask(key_ranges=ranges))


def _merged(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges along the last dimension that cover the same and do not overlap, some of them empty."""
    begin, order = begin.sort(-1)
    end = torch.maximum(end.gather(-1, order), begin).cummax(-1).values
    inside = torch.zeros_like(begin, dtype=torch.bool)
    inside[..., 1:] = begin[..., 1:] <= end[..., :-1]
    for index in range(begin.size(-1) - 1, 0, -1):
        end[..., index - 1] = torch.where(inside[..., index], end[..., index], end[..., index - 1])
    return begin, torch.where(inside, begin, end)


def _covered(grid: Grid, begin: Tensor, end: Tensor, queries: int) -> _Intervals:
    """The blocks that at least so many queries of a block of queries have in an interval, or all of these.

    Args:
        begin, end: (B, Lq, n), intervals of blocks of keys; those of one query do not overlap if queries > 1.
    """
    rows = begin.size(0) * grid.query_blocks
    padding = (0, 0, 0, grid.query_blocks * grid.query_block - grid.query_len)
    shape = rows, grid.query_block * begin.size(2)
    begin, end = (torch.nn.functional.pad(x, padding).reshape(shape) for x in (begin, end))
    needed = torch.full((begin.size(0), 1), queries, device=begin.device)
    if grid.query_blocks:
        last = grid.query_len - (grid.query_blocks - 1) * grid.query_block
        needed[grid.query_blocks - 1 :: grid.query_blocks].clamp_(max=last)
    # Sweeping over the ends of the intervals; beginnings come first where both fall together.
    opens = (begin < end).to(torch.int64)
    position, order = torch.cat((begin, end), 1).sort(dim=1, stable=True)
    count = torch.cat((opens, -opens), 1).gather(1, order).cumsum(1)
    enough = torch.nn.functional.pad(count >= needed, (1, 0))
    starts, ends = enough[:, 1:] & ~enough[:, :-1], enough[:, :-1] & ~enough[:, 1:]
    row = torch.arange(rows, device=begin.device).unsqueeze(1) * grid.kv_blocks
    begin, end = (row + position)[starts], (row + position)[ends]
    return _Intervals(begin[begin < end], end[begin < end])
