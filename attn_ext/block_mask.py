"""Masks by blocks: which blocks of keys each block of queries sees, whole or by bits for their elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _block_cover, _block_flex, _block_picture
from ._blocks import (
    ABSENT,
    Blocks,
    BlockSize,
    Grid,
    TransposedBlocks,
    as_block_size,
    assemble,
    check_blocks,
    check_fields,
    check_length,
    full_blocks,
    intersection,
    make_grid,
    pack,
    tile_map,
    transpose,
    union,
)
from ._packing import Packing
from .masks import LoweredMask, Mask, _same_tensor

__all__ = ["BlockMask"]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(Mask):
    """A mask that lists, for each block of queries, the blocks of keys it sees; the kernels visit no other.

    A listed block is full or holds one bit for each pair of query and key; equal bits are kept once. On top
    of the blocks, a rule may hide more. Made by the `from_` methods and by `attn_ext.patterns`.

    `block_mask & other` hides what either does: another block mask is intersected, any other mask becomes
    part of the rule. `block_mask | other` shows what either does, in bits, without a rule.

    Args:
        blocks: the lists, as the kernels read them.
        query_len, kv_len: the lengths that the mask is for; the last blocks may reach beyond them.
        rule: any other mask, or None.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: `blocks` breaks a rule of its format, or does not fit the lengths.
    """

    blocks: Blocks
    query_len: int
    kv_len: int
    rule: Mask | None = None

    absorbs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Blocks):
            raise TypeError(f"blocks must be attn_ext.block_mask.Blocks, got {type(self.blocks).__name__}")
        for name in ("query_len", "kv_len"):
            check_length(name, getattr(self, name))
        _check_rule(self.rule)
        check_fields(self.blocks)
        as_block_size(self.block_size)
        check_blocks(self.blocks, self._grid)

    @classmethod
    def from_map(
        cls,
        block_map: Tensor,
        *,
        query_len: int | None = None,
        kv_len: int | None = None,
        block_size: BlockSize = 64,
        rule: Mask | None = None,
    ) -> BlockMask:
        """Full blocks where a tensor is true.

        Args:
            block_map: (Qb, Kb), (H, Qb, Kb) or (B or 1, H or 1, Qb, Kb), bool, of Qb blocks of queries and Kb
                blocks of keys.
            query_len, kv_len: as many as the blocks hold by default, else such that the last block is begun.
            block_size: queries and keys of a block, multiples of 16, or one number for both.

        Raises:
            TypeError: `block_map` is not a bool tensor.
            ValueError: a shape, length or block size does not fit.
        """
        if not isinstance(block_map, Tensor):
            raise TypeError(f"block_map must be a torch.Tensor, got {type(block_map).__name__}")
        if block_map.dtype != torch.bool:
            raise TypeError(f"block_map must be bool (True = attend), got {block_map.dtype}")
        if not 2 <= block_map.dim() <= 4:
            raise ValueError(
                "block_map must be (Qb, Kb), (H, Qb, Kb) or (B, H, Qb, Kb), "
                f"got shape {tuple(block_map.shape)}"
            )
        block_map = block_map[(None,) * (4 - block_map.dim())]
        batch, heads, *counts = block_map.shape
        if 0 in (batch, heads):
            raise ValueError(
                "block_map must have at least one batch entry and one head, "
                f"got shape {tuple(block_map.shape)}"
            )
        grid = _grid_of_counts(counts, query_len, kv_len, block_size)
        keys = block_map.flatten().nonzero().squeeze(1)
        return cls(full_blocks(grid, batch, heads, keys), grid.query_len, grid.kv_len, rule)

    @classmethod
    def from_sparse(
        cls,
        tensor: Tensor,
        *,
        query_len: int | None = None,
        kv_len: int | None = None,
        block_size: BlockSize | None = None,
        rule: Mask | None = None,
    ) -> BlockMask:
        """The blocks that a sparse tensor of torch stores.

        Args:
            tensor: (Lq, Lk) in layout torch.sparse_bsr, whose blocks are the blocks and whose values other
                than zero are the visible pairs; or (Qb, Kb) in layout torch.sparse_csr, whose values other
                than zero are the visible blocks. In front, either may have heads, or batch and heads.
            query_len, kv_len: as in `from_map`.
            block_size: as in `from_map`, 64 by default; torch.sparse_bsr has its own.

        Raises:
            TypeError: `tensor` is not a tensor of these layouts.
            ValueError: a shape, length or block size does not fit.
        """
        layout = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        if layout not in (torch.sparse_bsr, torch.sparse_csr):
            raise TypeError(f"tensor must be in layout torch.sparse_bsr or torch.sparse_csr, got {layout}")
        if tensor.dim() > 4 or tensor.dense_dim():
            raise ValueError(
                f"tensor must have 2 to 4 sparse dimensions, got shape {tuple(tensor.shape)} "
                f"with {tensor.dense_dim()} dense ones"
            )
        crow, columns, values = tensor.crow_indices(), tensor.col_indices(), tensor.values()
        counts = [crow.size(-1) - 1, tensor.size(-1)]
        if layout == torch.sparse_bsr:
            own = tuple(values.shape[-2:])
            counts[1] //= own[1]
            if block_size is not None and as_block_size(block_size) != as_block_size(own):
                raise ValueError(f"block_size must be that of tensor, {own}, or None, got {block_size}")
            block_size = own
        grid = _grid_of_counts(counts, query_len, kv_len, 64 if block_size is None else block_size)
        batch, heads = (1, 1, *tensor.shape[:-2])[-2:]

        crow = crow.reshape(-1, counts[0] + 1).to(torch.int64)
        row = torch.arange(crow.size(0) * counts[0], device=crow.device)
        keys = torch.repeat_interleave(row * counts[1], crow.diff(dim=1).flatten()) + columns.flatten()
        keys, order = keys.sort()
        if layout == torch.sparse_csr:
            blocks = full_blocks(grid, batch, heads, keys[values.flatten()[order] != 0])
            return cls(blocks, grid.query_len, grid.kv_len, rule)
        bits = pack((values.reshape(-1, *own) != 0).mT)
        return cls(assemble(grid, batch, heads, keys, order, bits), grid.query_len, grid.kv_len, rule)

    @classmethod
    def from_predicate(
        cls,
        visible: MaskMod,
        query_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: BlockSize = 64,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The pairs for which a function is true; every pair is asked about, some blocks at a time.

        Args:
            visible: takes index tensors that broadcast, (batch entry, head, query, key), and returns a bool
                tensor, element by element: a mask_mod of flex_attention that needs no vmap.
            batch, heads: 1 if the function does not look at them.

        Raises:
            TypeError: `visible` is no function, or returns something else.
            ValueError: a length, number or block size is negative, or no size of a block; or what `visible`
                returns does not broadcast to its arguments.
        """
        if not callable(visible):
            raise TypeError(f"visible must be a function, got {type(visible).__name__}")
        grid = make_grid(query_len, kv_len, block_size)
        for name, number in (("batch", batch), ("heads", heads)):
            check_length(name, number, least=1)

        def checked(*indices: Tensor) -> Tensor:
            seen = visible(*indices)
            if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
                got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
                raise TypeError(f"visible must return a bool tensor, got {got}")
            shape = torch.broadcast_shapes(*(index.shape for index in indices))
            trailing = shape[len(shape) - seen.dim() :] if seen.dim() <= len(shape) else None
            if trailing is None or any(a not in (1, b) for a, b in zip(seen.shape, trailing, strict=True)):
                raise ValueError(
                    "visible must return a tensor that broadcasts to the shape of its arguments, "
                    f"{tuple(shape)}, got shape {tuple(seen.shape)}"
                )
            return seen

        keys = torch.arange(batch * heads * grid.query_blocks * grid.kv_blocks, device=device)
        tiles, bits = _block_cover.evaluate(grid, heads, keys, checked)
        return cls(assemble(grid, batch, heads, keys, tiles, bits), query_len, kv_len)

    @classmethod
    def from_mask(
        cls,
        mask: Mask,
        query_len: int,
        kv_len: int,
        *,
        block_size: BlockSize = 64,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The blocks that a mask touches, with the mask as their rule; one with a Dense part turns to bits.

        Costs time and memory of the lengths and the blocks. With a Dense part, or with Segments that are not
        contiguous, the elements of the blocks between a query's first and last key are looked at.

        Raises:
            TypeError: `mask` is not a mask, is a BlockMask or has a floating-point part.
            ValueError: a length or block size does not fit, or a part of `mask` is for other lengths.
        """
        grid = make_grid(query_len, kv_len, block_size)
        lowered = _lower_boolean(mask, grid, device)
        blocks = _block_cover.from_lowered(grid, lowered, torch.device(device or "cpu"), rule=True)
        return cls(blocks, query_len, kv_len, None if lowered.dense is not None else mask)

    @classmethod
    def from_flex(cls, flex_block_mask: Any) -> BlockMask:
        """What a `torch.nn.attention.flex_attention.BlockMask` shows.

        Its mask_mod is evaluated on the elements of the partial blocks alone.

        Raises:
            TypeError: `flex_block_mask` is something else.
            ValueError: it does not have batch and heads, or its blocks no multiples of 16.
        """
        grid, blocks = _block_flex.from_flex(flex_block_mask)
        return cls(blocks, grid.query_len, grid.kv_len)

    def to_flex(self) -> Any:
        """A `torch.nn.attention.flex_attention.BlockMask` that shows the same.

        It has the batch entries and heads of the blocks and the rule.

        Raises:
            TypeError: the rule has a floating-point part.
            ValueError: the rule is for other lengths, or another number of batch entries or heads.
        """
        lowered = None if self.rule is None else _lower_boolean(self.rule, self._grid, self.device)
        return _block_flex.to_flex(self._grid, self.blocks, lowered)

    def without_rule(self) -> BlockMask:
        """The same mask with its rule written into the bits of the blocks.

        Raises:
            TypeError: the rule has a floating-point part.
            ValueError: the rule is for other lengths, or another number of batch entries or heads.
        """
        if self.rule is None:
            return self
        lowered = _lower_boolean(self.rule, self._grid, self.device)
        blocks = _block_cover.restrict(self._grid, self.blocks, lowered, self.device)
        return BlockMask(blocks, self.query_len, self.kv_len)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its lists on a device."""
        if torch.device(device) == self.device:
            return self
        blocks = Blocks(*(tensor.to(device) for tensor in self.blocks))
        return BlockMask(blocks, self.query_len, self.kv_len, self.rule)

    def __and__(self, other: Mask) -> BlockMask:
        if not isinstance(other, Mask):
            return NotImplemented
        if not isinstance(other, BlockMask):
            rule = other if self.rule is None else self.rule & other
            return BlockMask(self.blocks, self.query_len, self.kv_len, rule)
        self._check_same_grid(other)
        blocks = intersection(self.blocks, other.blocks, self._grid)
        rules = [mask.rule for mask in (self, other) if mask.rule is not None]
        rule = rules[0] & rules[1] if len(rules) == 2 else (rules or [None])[0]
        return BlockMask(blocks, self.query_len, self.kv_len, rule)

    __rand__ = __and__

    def __or__(self, other: Mask) -> BlockMask:
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(other, BlockMask):
            self._check_same_grid(other)
            theirs = other.without_rule().blocks
        else:
            lowered = _lower_boolean(other, self._grid, self.device)
            theirs = _block_cover.from_lowered(self._grid, lowered, self.device, rule=False)
        blocks = union(self.without_rule().blocks, theirs, self._grid)
        return BlockMask(blocks, self.query_len, self.kv_len)

    __ror__ = __or__

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BlockMask)
            and (self._grid, self.rule) == (other._grid, other.rule)
            and all(_same_tensor(*pair) for pair in zip(self.blocks, other.blocks, strict=True))
        )

    def __hash__(self) -> int:
        return hash((BlockMask, self._grid, self.batch, self.heads, self.num_blocks))

    def __repr__(self) -> str:
        rule = "" if self.rule is None else f", rule={self.rule}"
        text = (
            f"BlockMask(query_len={self.query_len}, kv_len={self.kv_len}, block_size={self.block_size}, "
            f"batch={self.batch}, heads={self.heads}, density={self.density:.3g}{rule})"
        )
        return "\n".join([text, *_block_picture.as_text(self._grid, self.blocks)])

    def plot(self, axes: Any = None, *, batch: int = 0, head: int = 0) -> Any:
        """Draws which share of each block is seen, the rule aside.

        Args:
            axes: of matplotlib, new ones by default.
            batch, head: which of the masks.

        Returns:
            The axes.

        Raises:
            TypeError: `batch` or `head` is not an int.
            ValueError: there is no such mask.
            ImportError: matplotlib is not installed.
        """
        for name, index, count in (("batch", batch, self.batch), ("head", head, self.heads)):
            check_length(name, index)
            if index >= count:
                raise ValueError(f"{name} must be from 0 to {count - 1}, got {index}")
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("BlockMask.plot needs matplotlib: pip install matplotlib") from error
        axes = plt.subplots()[1] if axes is None else axes
        rows, columns = self._grid.query_blocks, self._grid.kv_blocks
        shares = _block_picture.shares(self._grid, self.blocks, batch, head, rows, columns)
        extent = (0, self.kv_len, self.query_len, 0)
        axes.imshow(
            shares.cpu().numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest"
        )
        axes.set(xlabel="key", ylabel="query", title=f"{self.density:.1%} of all blocks")
        return axes

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self,) if self.rule is None else (self, *self.rule.parts)

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.blocks.bits.size(2) * 8, self.blocks.bits.size(1)

    @property
    def batch(self) -> int:
        """Batch entries that have lists of their own; 1 if all share theirs."""
        return self.blocks.offsets.size(0)

    @property
    def heads(self) -> int:
        """Heads that have lists of their own; 1 if all share theirs."""
        return self.blocks.offsets.size(1)

    @property
    def device(self) -> torch.device:
        return self.blocks.offsets.device

    @property
    def num_blocks(self) -> int:
        """Blocks that are visited, of all batch entries and heads that have lists of their own."""
        return self.blocks.indices.numel()

    @property
    def density(self) -> float:
        """The share of all blocks that is visited, 0 to 1; the rule aside."""
        total = self.batch * self.heads * self._grid.query_blocks * self._grid.kv_blocks
        return self.num_blocks / max(total, 1)

    @property
    def block_map(self) -> Tensor:
        """Which blocks are visited, (B or 1, H or 1, Qb, Kb), bool."""
        return tile_map(self.blocks, 0, self._grid.query_blocks, self._grid.kv_blocks) != ABSENT

    @cached_property
    def transposed(self) -> TransposedBlocks:
        """The lists by block of keys, for kernels whose unit of work is a block of keys.

        Those of the CPU have no need of it: their backward walks the lists by block of queries.
        """
        return transpose(self.blocks, self._grid)

    def lower(self, query_len: int, kv_len: int, device: torch.device | None) -> LoweredMask:
        rule = None if self.rule is None else self.rule.lower(query_len, kv_len, device)
        return self._lower(query_len, kv_len, device, rule)

    def lower_packed(self, packing: Packing) -> LoweredMask:
        rule = None if self.rule is None else self.rule.lower_packed(packing)
        return self._lower(packing.total_queries, packing.total_keys, packing.device, rule)

    def _lower(
        self, query_len: int, kv_len: int, device: torch.device | None, rule: LoweredMask | None
    ) -> LoweredMask:
        if (query_len, kv_len) != (self.query_len, self.kv_len):
            raise ValueError(
                f"a BlockMask for {self.query_len} queries and {self.kv_len} keys cannot mask "
                f"{query_len} queries and {kv_len} keys"
            )
        lowered = LoweredMask() if rule is None else rule
        return lowered._replace(blocks=self.to(self.device if device is None else device).blocks)

    @property
    def _grid(self) -> Grid:
        return Grid(self.query_len, self.kv_len, *self.block_size)

    def _check_same_grid(self, other: BlockMask) -> None:
        if self._grid != other._grid:
            raise ValueError(
                "block masks that are combined must have the same lengths and block size, got "
                + " and ".join(f"{g.query_len} x {g.kv_len} in {g[2:]}" for g in (self._grid, other._grid))
            )


def _lower_boolean(mask: Any, grid: Grid, device: torch.device | str | None) -> LoweredMask:
    from ._validation import check_lengths_of_mask  # which knows block masks too

    _check_rule(mask, name="mask", optional=False)
    check_lengths_of_mask(mask, grid.query_len, grid.kv_len)
    lowered = mask.lower(grid.query_len, grid.kv_len, torch.device(device or "cpu"))
    if lowered.bias is not None:
        raise TypeError(f"mask must be boolean to become blocks, got a floating-point part in {mask}")
    return lowered


def _check_rule(rule: Any, name: str = "rule", optional: bool = True) -> None:
    if rule is None and optional:
        return
    if not isinstance(rule, Mask):
        raise TypeError(f"{name} must be an attn_ext mask, got {type(rule).__name__}")
    if any(isinstance(part, BlockMask) for part in rule.parts):
        raise TypeError(f"{name} must not be a BlockMask or hold one: combine block masks by & and |")


def _grid_of_counts(
    counts: list[int], query_len: int | None, kv_len: int | None, block_size: BlockSize
) -> Grid:
    """The grid of so many blocks of queries and of keys."""
    sizes, lengths = as_block_size(block_size), []
    for name, count, length, size in zip(
        ("query_len", "kv_len"), counts, (query_len, kv_len), sizes, strict=True
    ):
        if length is not None:
            check_length(name, length)
            if -(-length // size) != count:
                raise ValueError(f"{name} must be cut into {count} blocks of {size}, got {length}")
        lengths.append(count * size if length is None else length)
    return Grid(*lengths, *sizes)
