"""The layouts of DeepSpeed's sparsity configurations, as block masks.

Each function takes the parameters of a configuration and the length, and shows the blocks of its
`make_layout(seq_len)`. Layouts are of whole blocks, `attention="unidirectional"` too: `& attn_ext.Causal()`
makes it causal to the token. Where DeepSpeed draws from Python's `random`, `seed` is for `random.seed(seed)`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .._blocks import check_length, count_up, full_blocks, make_grid
from .._validation import _check_bool
from ..block_mask import BlockMask
from ._shapes import as_indices, check_seed

__all__ = ["bigbird", "bslongformer", "fixed", "local_sliding_window", "variable"]


def fixed(
    seq_len: int,
    num_heads: int,
    *,
    block: int = 16,
    different_layout_per_head: bool = False,
    num_local_blocks: int = 4,
    num_global_blocks: int = 1,
    attention: str = "bidirectional",
    horizontal_global_attention: bool = False,
    num_different_global_patterns: int = 1,
) -> BlockMask:
    """`FixedSparsityConfig`: windows side by side, and blocks in each that all, or all later, blocks see.

    Raises:
        TypeError: a number is not an int, or a flag not a bool.
        ValueError: `seq_len` is no multiple of `block`, or parameters do not fit each other.
    """
    _check_bool("different_layout_per_head", different_layout_per_head)
    count = _num_blocks(seq_len, num_heads, block)
    one_way = _is_unidirectional(attention, horizontal_global_attention)
    check_length("num_local_blocks", num_local_blocks, least=1)
    check_length("num_global_blocks", num_global_blocks, least=1)
    check_length("num_different_global_patterns", num_different_global_patterns, least=1)
    if num_local_blocks % num_global_blocks:
        raise ValueError(
            f"num_local_blocks must be a multiple of num_global_blocks, {num_global_blocks}, "
            f"got {num_local_blocks}"
        )
    most = num_local_blocks // num_global_blocks if different_layout_per_head else 1
    if num_different_global_patterns > most:
        raise ValueError(
            f"num_different_global_patterns must be at most {most} for these blocks and heads, "
            f"got {num_different_global_patterns}"
        )

    row = torch.arange(count)
    begin = row // num_local_blocks * num_local_blocks
    local = _spans(begin, row + 1 if one_way else (begin + num_local_blocks).clamp(max=count))
    layouts = []
    for head in range(num_heads if different_layout_per_head else 1):
        offset = num_local_blocks - (1 + head % num_different_global_patterns) * num_global_blocks
        starts = torch.arange(count // num_local_blocks) * num_local_blocks + offset
        if count % num_local_blocks:  # the last window is cut short, and its blocks may move back to fit
            last = min(count - count % num_local_blocks + offset, count - num_global_blocks)
            last = max(last + count, 0) if last < 0 else last
            starts = torch.cat((starts, torch.tensor([last])))
        starts = starts.repeat_interleave(num_global_blocks)
        columns = starts + torch.arange(starts.numel()) % num_global_blocks
        starts, columns = starts[columns < count], columns[columns < count]
        parts = [local, _columns(columns, starts if one_way else torch.zeros_like(starts), count)]
        if horizontal_global_attention:
            parts.append(_rows(columns, count))
        layouts.append(torch.cat(parts))
    return _layout_mask(seq_len, block, layouts)


def variable(
    seq_len: int,
    num_heads: int,
    *,
    block: int = 16,
    different_layout_per_head: bool = False,
    num_random_blocks: int = 0,
    local_window_blocks: Sequence[int] = (4,),
    global_block_indices: Sequence[int] = (0,),
    global_block_end_indices: Sequence[int] | None = None,
    attention: str = "bidirectional",
    horizontal_global_attention: bool = False,
    seed: int = 0,
) -> BlockMask:
    """`VariableSparsityConfig`: windows of given sizes, given global blocks and random ones.

    Raises:
        TypeError: a number is not an int, or a flag not a bool.
        ValueError: `seq_len` is no multiple of `block`, or parameters do not fit each other.
    """
    _check_bool("different_layout_per_head", different_layout_per_head)
    count = _num_blocks(seq_len, num_heads, block)
    one_way = _is_unidirectional(attention, horizontal_global_attention)
    windows = as_indices("local_window_blocks", local_window_blocks)
    if not windows.numel() or int(windows.min()) < 1:
        raise ValueError(f"local_window_blocks must be one or more numbers from 1, got {windows.tolist()}")
    starts, columns = _global_blocks(global_block_indices, global_block_end_indices, count)

    # The last size goes on to the end.
    more = torch.arange(int(windows.sum()), max(count, int(windows.sum())), int(windows[-1]))
    begins = torch.cat((windows.cumsum(0) - windows, more))
    ends = torch.cat((begins[1:], begins.new_tensor([count]))).clamp(max=count)
    row = torch.arange(count)
    window = torch.searchsorted(begins, row, right=True) - 1
    local = _spans(begins[window], row + 1 if one_way else ends[window])
    shared = [local, _columns(columns, starts if one_way else torch.zeros_like(starts), count)]
    if horizontal_global_attention:
        shared.append(_rows(columns, count))
    check_seed(seed)
    generator = random.Random(seed)
    heads = num_heads if different_layout_per_head else 1
    layouts = [
        torch.cat((*shared, _random_blocks(num_random_blocks, count, False, generator))) for _ in range(heads)
    ]
    return _layout_mask(seq_len, block, layouts)


def bigbird(
    seq_len: int,
    num_heads: int,
    *,
    block: int = 16,
    different_layout_per_head: bool = False,
    num_random_blocks: int = 1,
    num_sliding_window_blocks: int = 3,
    num_global_blocks: int = 1,
    attention: str = "bidirectional",
    seed: int = 0,
) -> BlockMask:
    """`BigBirdSparsityConfig`: a window, the first blocks as global ones, and random ones.

    Raises:
        TypeError: a number is not an int, or a flag not a bool.
        ValueError: `seq_len` is no multiple of `block`, or has not enough blocks.
    """
    _check_bool("different_layout_per_head", different_layout_per_head)
    count = _num_blocks(seq_len, num_heads, block)
    one_way = _is_unidirectional(attention)
    check_length("num_global_blocks", num_global_blocks)
    _check_enough("num_global_blocks", num_global_blocks, count)
    columns = torch.arange(num_global_blocks)
    shared = [
        _sliding_window(num_sliding_window_blocks, count),
        _columns(columns, torch.zeros_like(columns), count),
        _rows(columns, count),
    ]
    check_seed(seed)
    generator = random.Random(seed)
    heads = num_heads if different_layout_per_head else 1
    layouts = [
        torch.cat((*shared, _random_blocks(num_random_blocks, count, one_way, generator)))
        for _ in range(heads)
    ]
    return _layout_mask(seq_len, block, layouts, one_way)


def bslongformer(
    seq_len: int,
    num_heads: int,
    *,
    block: int = 16,
    different_layout_per_head: bool = False,
    num_sliding_window_blocks: int = 3,
    global_block_indices: Sequence[int] = (0,),
    global_block_end_indices: Sequence[int] | None = None,
    attention: str = "bidirectional",
) -> BlockMask:
    """`BSLongformerSparsityConfig`: a window, and given global blocks; the same for all heads.

    Raises:
        TypeError: a number is not an int, or a flag not a bool.
        ValueError: `seq_len` is no multiple of `block`, or has not enough blocks.
    """
    _check_bool("different_layout_per_head", different_layout_per_head)
    count = _num_blocks(seq_len, num_heads, block)
    one_way = _is_unidirectional(attention)
    starts, columns = _global_blocks(global_block_indices, global_block_end_indices, count)
    layout = torch.cat(
        (
            _sliding_window(num_sliding_window_blocks, count),
            _columns(columns, torch.zeros_like(starts), count),
            _rows(columns, count),
        )
    )
    return _layout_mask(seq_len, block, [layout] * (num_heads if different_layout_per_head else 1), one_way)


def local_sliding_window(
    seq_len: int,
    num_heads: int,
    *,
    block: int = 16,
    num_sliding_window_blocks: int = 3,
    attention: str = "unidirectional",
) -> BlockMask:
    """`LocalSlidingWindowSparsityConfig`: a window, the same for all heads.

    Raises:
        TypeError: a number is not an int, or a flag not a bool.
        ValueError: `seq_len` is no multiple of `block`, or has not enough blocks.
    """
    count = _num_blocks(seq_len, num_heads, block)
    one_way = _is_unidirectional(attention)
    return _layout_mask(seq_len, block, [_sliding_window(num_sliding_window_blocks, count)], one_way)


def _num_blocks(seq_len: int, num_heads: int, block: int) -> int:
    check_length("seq_len", seq_len)
    check_length("num_heads", num_heads, least=1)
    check_length("block", block, least=1)
    grid = make_grid(seq_len, seq_len, block)
    if seq_len % block:
        raise ValueError(f"seq_len must be a multiple of block, {block}, got {seq_len}")
    return grid.query_blocks


def _is_unidirectional(attention: str, horizontal_global_attention: bool = False) -> bool:
    _check_bool("horizontal_global_attention", horizontal_global_attention)
    if attention not in ("unidirectional", "bidirectional"):
        raise ValueError(f"attention must be 'unidirectional' or 'bidirectional', got {attention!r}")
    if attention == "unidirectional" and horizontal_global_attention:
        raise ValueError("horizontal_global_attention must be False when attention is 'unidirectional'")
    return attention == "unidirectional"


def _check_enough(name: str, blocks: int, count: int) -> None:
    if blocks > count:
        raise ValueError(f"{name} must be at most the number of blocks, {count}, got {blocks}")


def _global_blocks(
    indices: Sequence[int], end_indices: Sequence[int] | None, count: int
) -> tuple[Tensor, Tensor]:
    """The blocks that are global, and of each the first block of the range that it is in."""
    begin = as_indices("global_block_indices", indices)
    end = begin + 1 if end_indices is None else as_indices("global_block_end_indices", end_indices)
    if begin.numel() and int(begin.min()) < 0:
        raise ValueError(f"global_block_indices must not be negative, got {begin.tolist()}")
    if begin.shape != end.shape or bool((begin >= end).any()):
        raise ValueError(
            "global_block_end_indices must be one for each of global_block_indices and larger, "
            f"got {end.tolist()} for {begin.tolist()}"
        )
    begin, end = begin[begin < count], end[begin < count].clamp(max=count)
    return begin.repeat_interleave(end - begin), count_up(begin, end - begin)


def _spans(begin: Tensor, end: Tensor) -> Tensor:
    """Block row r sees columns begin[r] .. end[r] - 1."""
    return count_up(torch.arange(begin.numel()) * begin.numel() + begin, end - begin)


def _sliding_window(num_blocks: int, count: int) -> Tensor:
    check_length("num_sliding_window_blocks", num_blocks)
    _check_enough("num_sliding_window_blocks", num_blocks, count)
    row = torch.arange(count)
    return _spans((row - num_blocks // 2).clamp(min=0), (row + num_blocks // 2 + 1).clamp(max=count))


def _columns(columns: Tensor, first_rows: Tensor, count: int) -> Tensor:
    """Each column, from a row on."""
    row = torch.arange(count).unsqueeze(1)
    return (row * count + columns)[row >= first_rows]


def _rows(rows: Tensor, count: int) -> Tensor:
    return (rows.unsqueeze(1) * count + torch.arange(count)).flatten()


def _random_blocks(num_blocks: int, count: int, one_way: bool, generator: random.Random) -> Tensor:
    """As DeepSpeed draws them, row after row, each from all blocks or those up to its own."""
    check_length("num_random_blocks", num_blocks)
    _check_enough("num_random_blocks", num_blocks, 1 if one_way and count else count)
    drawn = [generator.sample(range(row + 1 if one_way else count), num_blocks) for row in range(count)]
    columns = torch.tensor(drawn, dtype=torch.int64).view(count, num_blocks)
    return (torch.arange(count).unsqueeze(1) * count + columns).flatten()


def _layout_mask(seq_len: int, block: int, layouts: list[Tensor], one_way: bool = False) -> BlockMask:
    """Of the blocks that each head sees, or all heads; only those not after its own if one_way."""
    grid = make_grid(seq_len, seq_len, block)
    count = grid.query_blocks
    keys = torch.cat([layout + head * count**2 for head, layout in enumerate(layouts)]).unique()
    if one_way:
        keys = keys[keys % max(count, 1) <= keys // max(count, 1) % max(count, 1)]
    return BlockMask(full_blocks(grid, 1, len(layouts), keys), seq_len, seq_len)
