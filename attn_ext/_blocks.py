"""A block mask in the terms of the kernels: which blocks of the score matrix exist, and what of each is seen.

While they are worked on, blocks are keys: the number of a block in the order of batch entry, head, block of
queries, block of keys. Rising keys are the lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BlockSize = int | tuple[int, int]  # of queries and of keys, or one number for both

FULL, ABSENT = -1, -2  # in the place of a tile; nothing absent is ever listed

_MAX_BLOCK = 65536  # queries or keys of a block: kMaxBlock of the kernels


class Blocks(NamedTuple):
    """Lists of the blocks of keys that each block of queries sees, in compressed rows.

    Query block r of head h of batch entry b sees the blocks of keys indices[s], offsets[b, h, r] <= s <
    offsets[b, h, r + 1], in rising order. Of block s it sees every key if tiles[s] is -1; otherwise its query
    q sees key k where bit q % 8 of bits[tiles[s], k, q // 8] is set. Keys of blocks that are not listed are
    hidden.
    """

    offsets: Tensor  # (B or 1, H or 1, query blocks + 1), int64
    indices: Tensor  # (n,), int32
    tiles: Tensor  # (n,), int32
    bits: Tensor  # (t, kv_block, query_block // 8), uint8: if t is 0 too, the shape tells the size of a block


class TransposedBlocks(NamedTuple):
    """The same lists by block of keys: which blocks of queries see it, in rising order."""

    offsets: Tensor  # (B or 1, H or 1, key blocks + 1), int64
    indices: Tensor  # (n,), int32: the block of queries
    entries: Tensor  # (n,), int64: where in the lists by block of queries the same block stands


class Grid(NamedTuple):
    """How the score matrix is cut into blocks; those at its ends may reach beyond it."""

    query_len: int
    kv_len: int
    query_block: int
    kv_block: int

    @property
    def query_blocks(self) -> int:
        return -(-self.query_len // self.query_block)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.kv_block)


def check_length(name: str, length: Any, least: int = 0) -> None:
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"{name} must be an int, got {type(length).__name__}")
    if length < least:
        raise ValueError(f"{name} must be at least {least}, got {length}")


def as_block_size(block_size: Any) -> tuple[int, int]:
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(sizes, tuple) or len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"block_size must be an int or a pair of int, got {block_size!r}")
    if any(size < 16 or size % 16 for size in sizes):
        raise ValueError(f"block_size must be of multiples of 16, got {block_size}")
    if any(size > _MAX_BLOCK for size in sizes):
        raise ValueError(f"block_size must be at most {_MAX_BLOCK}, got {block_size}")
    return sizes


def make_grid(query_len: Any, kv_len: Any, block_size: Any) -> Grid:
    check_length("query_len", query_len)
    check_length("kv_len", kv_len)
    return Grid(query_len, kv_len, *as_block_size(block_size))


def check_fields(blocks: Blocks) -> None:
    """That the fields are the tensors they should be.

    Raises:
        TypeError: a field is not a tensor of its dtype.
        ValueError: it does not have its dimensions, or devices differ.
    """
    dtypes = {"offsets": torch.int64, "indices": torch.int32, "tiles": torch.int32, "bits": torch.uint8}
    for (name, dtype), tensor in zip(dtypes.items(), blocks, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"blocks.{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"blocks.{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != blocks.offsets.device:
            raise ValueError(
                f"blocks.{name} must be on the device of blocks.offsets, {blocks.offsets.device}, "
                f"got {tensor.device}"
            )
    shapes = {
        "offsets": "(B or 1, H or 1, query blocks + 1)",
        "indices": "(n,)",
        "tiles": "(n,)",
        "bits": "(t, kv_block, query_block // 8)",
    }
    for (name, shape), tensor, dims in zip(shapes.items(), blocks, (3, 1, 1, 3), strict=True):
        if tensor.dim() != dims:
            raise ValueError(f"blocks.{name} must be {shape}, got shape {tuple(tensor.shape)}")


def check_blocks(blocks: Blocks, grid: Grid) -> None:
    """That the kernels may read these lists, whose blocks have the size of the grid's.

    Raises:
        ValueError: shapes do not fit each other or the grid, or a number is out of place.
    """
    offsets, indices, tiles, bits = blocks
    if offsets.size(2) != grid.query_blocks + 1 or 0 in offsets.shape:
        raise ValueError(
            f"blocks.offsets must be (B or 1, H or 1, {grid.query_blocks + 1}), one more than blocks of "
            f"queries, got shape {tuple(offsets.shape)}"
        )
    if tiles.shape != indices.shape:
        raise ValueError(
            "blocks.indices and blocks.tiles must be of the same size, "
            f"got shapes {tuple(indices.shape)} and {tuple(tiles.shape)}"
        )
    if torch.compiler.is_compiling() or offsets.is_meta:
        return  # the numbers are not there to look at
    starts, ends = offsets[..., :-1].flatten(), offsets[..., 1:].flatten()
    firsts, lasts = offsets[..., 0].flatten(), offsets[..., -1].flatten()
    if (
        int(firsts[0]) != 0
        or int(lasts[-1]) != indices.numel()
        or not torch.equal(firsts[1:], lasts[:-1])
        or bool((starts > ends).any())
    ):
        raise ValueError(f"blocks.offsets must rise from 0 to the number of blocks, {indices.numel()}")
    if indices.numel() == 0:
        return
    least, most = (int(x) for x in indices.aminmax())
    if least < 0 or most >= grid.kv_blocks:
        raise ValueError(f"blocks.indices must be from 0 to {grid.kv_blocks - 1}, got {least} to {most}")
    begins_row = torch.zeros(indices.numel() + 1, dtype=torch.bool, device=indices.device)
    begins_row[starts] = True
    if not bool(((indices[1:] > indices[:-1]) | begins_row[1:-1]).all()):
        raise ValueError("blocks.indices must rise within each row, and name no block twice")
    least, most = (int(x) for x in tiles.aminmax())
    if least < FULL or most >= bits.size(0):
        raise ValueError(f"blocks.tiles must be from -1 to {bits.size(0) - 1}, got {least} to {most}")


def no_bits(grid: Grid, device: torch.device) -> Tensor:
    """The bits of full blocks alone."""
    return torch.empty(0, grid.kv_block, grid.query_block // 8, dtype=torch.uint8, device=device)


def keys_of(blocks: Blocks, grid: Grid) -> Tensor:
    """(n,), int64, rising."""
    counts = blocks.offsets.diff().flatten()
    row = torch.arange(counts.numel(), device=counts.device)
    return torch.repeat_interleave(row * grid.kv_blocks, counts) + blocks.indices


def split_keys(keys: Tensor, grid: Grid, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch entry, head, block of queries and block of keys of each."""
    row, column = keys // max(grid.kv_blocks, 1), keys % max(grid.kv_blocks, 1)
    head = row // max(grid.query_blocks, 1)
    return head // heads, head % heads, row % max(grid.query_blocks, 1), column


def assemble(grid: Grid, batch: int, heads: int, keys: Tensor, tiles: Tensor, bits: Tensor) -> Blocks:
    """Lists of what of the given blocks lies within the grid: empty ones leave, full ones need no tile.

    Args:
        keys: (n,), rising.
        tiles: (n,), an index of bits, FULL or ABSENT for each key.
        bits: (t, kv_block, query_block // 8), tiles in any number, equal ones among them.
    """
    tiles, bits = canonical_tiles(grid, keys, tiles, bits)
    listed = tiles != ABSENT
    if not bool(listed.all()):
        keys, tiles = keys[listed], tiles[listed]
    row = torch.arange(batch * heads, device=keys.device).unsqueeze(1) * grid.query_blocks
    row = row + torch.arange(grid.query_blocks + 1, device=keys.device)
    offsets = torch.searchsorted(keys, row * grid.kv_blocks).view(batch, heads, -1)
    indices = (keys % max(grid.kv_blocks, 1)).to(torch.int32)
    return Blocks(offsets, indices, tiles.to(torch.int32), bits)


def full_blocks(grid: Grid, batch: int, heads: int, keys: Tensor) -> Blocks:
    """Lists of whole blocks, of rising keys."""
    return assemble(grid, batch, heads, keys, torch.full_like(keys, FULL), no_bits(grid, keys.device))


def canonical_tiles(grid: Grid, keys: Tensor, tiles: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles that are used, different, neither empty nor full, and zero beyond the ends of the grid."""
    partial = (tiles >= 0).nonzero().squeeze(1)
    kinds = tiles[partial].to(torch.int64) * 4 + edges_of(grid, keys[partial])
    used = torch.zeros(bits.size(0) * 4, dtype=torch.bool, device=bits.device)
    used[kinds] = True
    used = used.nonzero().squeeze(1)
    inside = inside_edges(grid, bits.device)[used % 4]
    clipped = bits[used // 4] & inside
    empty, full = (clipped == 0).flatten(1).all(1), (clipped == inside).flatten(1).all(1)
    unique, numbers = _unique_tiles(clipped[~(empty | full)])

    names = torch.full((bits.size(0) * 4,), ABSENT, dtype=tiles.dtype, device=tiles.device)
    names[used[full]] = FULL
    names[used[~(empty | full)]] = numbers.to(tiles.dtype)
    return tiles.index_copy(0, partial, names[kinds]), unique


def edges_of(grid: Grid, keys: Tensor) -> Tensor:
    """1 for blocks that reach beyond the last query, 2 beyond the last key, 3 beyond both, otherwise 0."""
    edges = torch.zeros_like(keys)
    if grid.query_len % grid.query_block:
        last_row = grid.query_blocks * grid.kv_blocks - grid.kv_blocks
        edges += keys % max(grid.query_blocks * grid.kv_blocks, 1) >= last_row
    if grid.kv_len % grid.kv_block:
        edges += 2 * (keys % max(grid.kv_blocks, 1) == grid.kv_blocks - 1)
    return edges


def inside_edges(grid: Grid, device: torch.device) -> Tensor:
    """What of the blocks of each of the four kinds lies within the grid, (4, kv_block, query_block // 8)."""
    kind = torch.arange(4, device=device).view(4, 1, 1)
    query = torch.arange(grid.query_block, device=device)
    key = torch.arange(grid.kv_block, device=device).unsqueeze(1)
    queries = grid.query_len - (grid.query_blocks - 1) * grid.query_block
    keys = grid.kv_len - (grid.kv_blocks - 1) * grid.kv_block
    return pack((kind % 2 == 0) | (query < queries)).where((kind < 2) | (key < keys), 0)


def _unique_tiles(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones among tiles, and which of them each is."""
    words = bits.flatten(1).view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.size(1),), generator=generator).to(bits.device)
    mixed = words * (factors | 1)
    mixed = (mixed ^ mixed >> 29) * (factors.flip(0) | 1)
    hashes = (mixed ^ mixed >> 32).sum(1)
    different, numbers = torch.unique(hashes, return_inverse=True)
    representative = numbers.new_zeros(different.numel())
    representative[numbers] = torch.arange(numbers.numel(), device=bits.device)
    unique = bits[representative]
    if torch.equal(unique[numbers], bits):
        return unique, numbers
    unique, numbers = torch.unique(words, dim=0, return_inverse=True)  # slow: two tiles have the same hash
    return unique.view(torch.uint8).view(-1, *bits.shape[1:]), numbers


def pack(visible: Tensor) -> Tensor:
    """(..., key, query) bool -> (..., key, query // 8) uint8."""
    bytes_ = visible.clone(memory_format=torch.contiguous_format).view(torch.uint8) != 0  # any but 0 is true
    # Eight bytes of 0 or 1 are a word, whose product with this number has them as bits in its highest byte.
    words = bytes_.view(torch.int64)
    return ((words * 0x0102040810204080 >> 56) & 255).to(torch.uint8)


def common_sizes(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
    """Batch and heads of two masks, each of which may be 1 for any number.

    Raises:
        ValueError: they differ.
    """
    for name, of_a, of_b in zip(("batch entries", "heads"), a, b, strict=True):
        if of_a != of_b and 1 not in (of_a, of_b):
            raise ValueError(f"masks that are combined must have as many {name}, or 1, got {of_a} and {of_b}")
    return tuple(of_b if of_a == 1 else of_a for of_a, of_b in zip(a, b, strict=True))


def expand(blocks: Blocks, grid: Grid, batch: int, heads: int) -> Blocks:
    """The lists of one batch entry or head for each of several."""
    if blocks.offsets.shape[:2] == (batch, heads):
        return blocks
    counts = blocks.offsets.diff().expand(batch, heads, -1)
    entries = count_up(blocks.offsets[..., :-1].expand(batch, heads, -1).flatten(), counts.flatten())
    offsets = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    row = torch.arange(batch * heads, device=offsets.device).view(batch, heads, 1) * grid.query_blocks
    row = row + torch.arange(grid.query_blocks + 1, device=offsets.device)
    return Blocks(offsets[row], blocks.indices[entries], blocks.tiles[entries], blocks.bits)


def count_up(begin: Tensor, count: Tensor) -> Tensor:
    """begin[0], begin[0] + 1, ... count[0] of them, then those from begin[1], and so on."""
    ahead = count.cumsum(0) - count
    shift = torch.repeat_interleave(begin - ahead, count)
    return shift + torch.arange(shift.numel(), device=begin.device)


def union(a: Blocks, b: Blocks, grid: Grid) -> Blocks:
    """What either sees."""
    batch, heads, keys, tiles_a, tiles_b, bits = _side_by_side(a, b, grid)
    either = torch.where(tiles_a == ABSENT, tiles_b, tiles_a)
    either = torch.where((tiles_a == FULL) | (tiles_b == FULL), FULL, either)
    tiles, bits = _combine_tiles(torch.bitwise_or, tiles_a, tiles_b, either, bits)
    return assemble(grid, batch, heads, keys, tiles, bits)


def intersection(a: Blocks, b: Blocks, grid: Grid | None = None) -> Blocks:
    """What both see; of any two of the same shape, with or without the grid that they are on.

    Raises:
        ValueError: blocks are of different sizes or numbers.
    """
    if a.bits.shape[1:] != b.bits.shape[1:] or a.offsets.size(2) != b.offsets.size(2):
        sizes = [(x.offsets.size(2) - 1, (x.bits.size(2) * 8, x.bits.size(1))) for x in (a, b)]
        raise ValueError(
            "block masks must have as many blocks of queries, of the same size, to be combined, got "
            + " and ".join(f"{count} of {size}" for count, size in sizes)
        )
    if grid is None:
        kv_blocks = max((int(x.indices.max()) + 1 for x in (a, b) if x.indices.numel()), default=0)
        query_block, kv_block = a.bits.size(2) * 8, a.bits.size(1)
        query_blocks = a.offsets.size(2) - 1
        grid = Grid(query_blocks * query_block, kv_blocks * kv_block, query_block, kv_block)
    return meet(grid, *_side_by_side(a, b, grid))


def meet(
    grid: Grid, batch: int, heads: int, keys: Tensor, tiles_a: Tensor, tiles_b: Tensor, bits: Tensor
) -> Blocks:
    """Lists of what both of two tiles of each block see."""
    both = torch.where(tiles_a == FULL, tiles_b, tiles_a)
    both = torch.where((tiles_a == ABSENT) | (tiles_b == ABSENT), ABSENT, both)
    tiles, bits = _combine_tiles(torch.bitwise_and, tiles_a, tiles_b, both, bits)
    return assemble(grid, batch, heads, keys, tiles, bits)


def _side_by_side(a: Blocks, b: Blocks, grid: Grid) -> tuple[int, int, Tensor, Tensor, Tensor, Tensor]:
    """Batch, heads, the keys of either, and of each its tile in both, among the tiles of both."""
    batch, heads = common_sizes(a.offsets.shape[:2], b.offsets.shape[:2])
    a, b = (expand(x, grid, batch, heads) for x in (a, b))
    keys, places_a, places_b = _merge_keys(keys_of(a, grid), keys_of(b, grid))
    tiles_a, tiles_b = torch.full((2, keys.numel()), ABSENT, device=keys.device)
    tiles_a[places_a] = a.tiles.to(torch.int64)
    tiles_b[places_b] = b.tiles.to(torch.int64) + (b.tiles >= 0) * a.bits.size(0)
    return batch, heads, keys, tiles_a, tiles_b, torch.cat((a.bits, b.bits))


def _merge_keys(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of both, rising, and where among them those of each are."""
    if a.numel() < b.numel():
        keys, places_b, places_a = _merge_keys(b, a)
        return keys, places_a, places_b
    # Only the fewer are searched for; the others keep their order around them.
    found = torch.searchsorted(a, b)
    new = torch.nn.functional.pad(a, (0, 1), value=-1)[found] != b
    places_new = found[new] + torch.arange(int(new.sum()), device=a.device)
    old = torch.ones(a.numel() + places_new.numel(), dtype=torch.bool, device=a.device)
    old[places_new] = False
    places_a = old.nonzero().squeeze(1)
    keys = a.new_empty(old.numel())
    keys[places_a], keys[places_new] = a, b[new]
    places_b = torch.empty_like(found)
    places_b[new], places_b[~new] = places_new, places_a[found[~new]]
    return keys, places_a, places_b


def _combine_tiles(
    operation: Callable[[Tensor, Tensor], Tensor],
    tiles_a: Tensor,
    tiles_b: Tensor,
    tiles: Tensor,
    bits: Tensor,
) -> tuple[Tensor, Tensor]:
    """`tiles`, and where both have bits their combination, which is made once for each pair of them."""
    both = ((tiles_a >= 0) & (tiles_b >= 0)).nonzero().squeeze(1)
    count = max(bits.size(0), 1)
    pairs, numbers = torch.unique(tiles_a[both] * count + tiles_b[both], return_inverse=True)
    combined = operation(bits[pairs // count], bits[pairs % count])
    return tiles.index_copy(0, both, numbers + bits.size(0)), torch.cat((bits, combined))


def transpose(blocks: Blocks, grid: Grid) -> TransposedBlocks:
    """The lists by block of keys."""
    batch, heads, _ = blocks.offsets.shape
    keys = keys_of(blocks, grid)
    entry, head, row, column = split_keys(keys, grid, heads)
    column = (entry * heads + head) * grid.kv_blocks + column
    entries = torch.argsort(column, stable=True)
    counts = torch.bincount(column, minlength=batch * heads * grid.kv_blocks)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    place = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1) * grid.kv_blocks
    place = place + torch.arange(grid.kv_blocks + 1, device=keys.device)
    return TransposedBlocks(offsets[place], row[entries].to(torch.int32), entries)


def tile_map(blocks: Blocks, row_begin: int, row_end: int, kv_blocks: int) -> Tensor:
    """The tile of every block of some blocks of queries, (B or 1, H or 1, rows, kv_blocks)."""
    batch, heads, _ = blocks.offsets.shape
    offsets = blocks.offsets[..., row_begin : row_end + 1]
    counts = offsets.diff().flatten()
    entries = count_up(offsets[..., :-1].flatten(), counts)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    tiles = torch.full((counts.numel() * kv_blocks,), ABSENT, dtype=torch.int32, device=counts.device)
    tiles[row * kv_blocks + blocks.indices[entries]] = blocks.tiles[entries]
    return tiles.view(batch, heads, row_end - row_begin, kv_blocks)


def visible_rows(blocks: Blocks, query_begin: int, query_end: int, kv_len: int) -> Tensor:
    """Which keys some of the queries see, (B or 1, H or 1, rows, Lk)."""
    _, kv_block, query_bytes = blocks.bits.shape
    query_block = query_bytes * 8
    row_begin, row_end = query_begin // query_block, -(-query_end // query_block)
    tiles = tile_map(blocks, row_begin, row_end, -(-kv_len // kv_block))
    query = torch.arange(query_begin, query_end, device=tiles.device)
    tiles = tiles[:, :, query // query_block - row_begin]
    key = torch.arange(kv_block, device=tiles.device)
    seen = bits_at(blocks.bits, tiles.unsqueeze(-1), query.view(-1, 1, 1) % query_block, key)
    return seen.flatten(-2)[..., :kv_len]


def bits_at(bits: Tensor, tiles: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether `query` of a block sees `key` of it, given its tile, FULL or ABSENT."""
    if bits.size(0) == 0:
        full, shape = tiles == FULL, torch.broadcast_shapes(tiles.shape, query.shape, key.shape)
        return full if full.shape == shape else full.expand(shape)  # numbers of flex_attention have no shape
    seen = (bits[tiles.clamp(min=0), key, query // 8] >> query % 8) & 1
    return torch.where(tiles < 0, tiles == FULL, seen != 0)
