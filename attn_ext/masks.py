"""Which keys a query may attend to: mask objects, combined with `&` and `|`.

A mask knows nothing of the size of the problem. `attention` lowers it to the terms of the kernels: a band of
the score matrix, a few ranges of keys for each query, ids of segments, and a dense tensor where nothing
smaller will do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ._blocks import Blocks, intersection, visible_rows
from ._packing import Packing

__all__ = ["Causal", "Dense", "KeyLengths", "Mask", "Prefix", "Segments", "SlidingWindow"]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_BEYOND_ANY_LENGTH = 2**62  # and, with a length added, still an int64


MAX_RANGES = 4  # ranges of keys that a query may have: kMaxKeyRanges of the kernels


class LoweredMask(NamedTuple):
    """A mask as the operators take it.  Key j is visible to query i of batch entry b iff

    band_lower <= j - i <= band_upper, one of the key_ranges[b, i] holds j, query_segments[b, i] ==
    kv_segments[b, j], the dense mask is true there, the bias is not -inf and the blocks let i see j.
    """

    bias: Tensor | None = None  # 4-D, each dimension 1 or that of (B, H, Lq, Lk), floating point
    dense: Tensor | None = None  # the same, bool
    key_ranges: Tensor | None = None  # (B or 1, Lq or 1, n, 2): first key and one past the last, int64
    query_segments: Tensor | None = None  # (B or 1, Lq), int32
    kv_segments: Tensor | None = None  # (B or 1, Lk), int32
    band_lower: int | None = None
    band_upper: int | None = None
    blocks: Blocks | None = None

    def visible(self, query_begin: int, query_end: int, kv_len: int, device: Any = None) -> Tensor:
        """Which keys some of the queries see, broadcastable to (B, H, rows, Lk); the bias aside."""
        ranges = queries = keys = dense = None
        if self.key_ranges is not None:
            ranges = _rows(self.key_ranges, 1, query_begin, query_end)
            ranges = ranges[:, None, :, None]  # (B, 1, rows, 1, n, 2)
        if self.query_segments is not None:
            queries = self.query_segments[:, None, query_begin:query_end, None]
            keys = self.kv_segments[:, None, None, :]
        if self.dense is not None:
            dense = _rows(self.dense, 2, query_begin, query_end)
        row = torch.arange(query_begin, query_end, device=device).unsqueeze(1)
        column = torch.arange(kv_len, device=device)
        visible = self._visible(row, column, ranges, queries, keys, dense)
        if self.blocks is None:
            return visible
        return visible & visible_rows(self.blocks, query_begin, query_end, kv_len)

    def visible_pairs(self, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Whether these queries see these keys, all of which broadcast; the bias and the blocks aside."""
        ranges = queries = keys = dense = None
        if self.key_ranges is not None:
            ranges = _look_up(self.key_ranges, batch, row)
        if self.query_segments is not None:
            queries = _look_up(self.query_segments, batch, row)
            keys = _look_up(self.kv_segments, batch, column)
        if self.dense is not None:
            dense = _look_up(self.dense, batch, head, row, column)
        return self._visible(row, column, ranges, queries, keys, dense)

    def _visible(
        self,
        row: Tensor,
        column: Tensor,
        ranges: Tensor | None,
        queries: Tensor | None,
        keys: Tensor | None,
        dense: Tensor | None,
    ) -> Tensor:
        """From the ranges of the rows, the segments of both and the dense mask of the pairs."""
        terms = [torch.ones((), dtype=torch.bool, device=row.device)]
        if self.band_lower is not None:
            terms.append(column - row >= self.band_lower)
        if self.band_upper is not None:
            terms.append(column - row <= self.band_upper)
        if ranges is not None:
            inside = [(column >= one[..., 0]) & (column < one[..., 1]) for one in ranges.unbind(-2)]
            terms.append(reduce(torch.logical_or, inside))
        if queries is not None:
            terms.append(queries == keys)
        if dense is not None:
            terms.append(dense)
        return reduce(torch.logical_and, terms)


def _rows(tensor: Tensor, dim: int, begin: int, end: int) -> Tensor:
    """Some of the rows, or the one that stands for all."""
    return tensor if tensor.size(dim) == 1 else tensor.narrow(dim, begin, end - begin)


def _look_up(tensor: Tensor, *indices: Tensor) -> Tensor:
    """tensor[indices], where a dimension of size 1 stands for any size."""
    return tensor[tuple(index * (size > 1) for index, size in zip(indices, tensor.shape, strict=False))]


class Mask:
    """Base of all masks.

    `a & b` lets a query attend to the keys that both allow, and adds what both add; `a | b` to those that
    either allows. `&` binds closer.
    """

    absorbs: ClassVar[bool] = False  # whether `&` and `|` with it are its own to define, from either side

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask) or other.absorbs:
            return NotImplemented
        return Conjunction(_flatten(Conjunction, self, other))

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask) or other.absorbs:
            return NotImplemented
        return Disjunction(_flatten(Disjunction, self, other))

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The masks that this one is combined from."""
        return (self,)

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        """The mask for `query_len` queries and `kv_len` keys, in the terms of the kernels."""
        raise NotImplementedError

    def lower_packed(self, packing: Packing) -> LoweredMask:
        """The mask of each of the packed sequences, in the score matrix of all of them.

        What lies beyond a query's own sequence is the caller's to hide.
        """
        raise NotImplementedError(f"{type(self).__name__} masks of packed sequences are not implemented")

    def to_dense(
        self, batch: int, heads: int, query_len: int, kv_len: int, device: torch.device | str | None = None
    ) -> Tensor:
        """The mask as a tensor, (batch, heads, query_len, kv_len): to read, to plot, for other functions.

        Returns:
            bool (True = attend), or, if a part of the mask is floating point, what is added to the scaled
            scores, with -inf for keys that are hidden. May be an expanded view.
        """
        lowered = self.lower(query_len, kv_len, device)
        dense = lowered.visible(0, query_len, kv_len, device)
        if lowered.bias is not None:
            dense = torch.where(dense, lowered.bias, -torch.inf)
        return dense.expand(batch, heads, query_len, kv_len)


class _Band(Mask):
    """A mask that `lower` makes a band of, by sums and differences of lengths: tensors of them will do."""

    def lower_packed(self, packing: Packing) -> LoweredMask:
        band = self.lower(packing.query_len, packing.kv_len, packing.device)
        own_key = packing.kv_begin + packing.query_position
        begin = torch.zeros_like(own_key) if band.band_lower is None else own_key + band.band_lower
        end = packing.kv_end if band.band_upper is None else own_key + (band.band_upper + 1)
        return LoweredMask(key_ranges=_ranges(begin, end)[None])


@dataclass(frozen=True)
class Causal(_Band):
    """A query attends to no key after its own position.

    Args:
        align: where the diagonal runs when there are not as many queries as keys. ``"top_left"``: query i
            sees keys 0..i, as torch's ``is_causal`` has it. ``"bottom_right"``: the last query sees all keys,
            query i sees keys 0..i + Lk - Lq, as flash-attn's ``causal`` and decoding with a cache have it.

    Raises:
        ValueError: ``align`` is neither.
    """

    align: Literal["top_left", "bottom_right"] = "top_left"

    def __post_init__(self) -> None:
        _check_align(self.align)

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        return LoweredMask(band_upper=0 if self.align == "top_left" else kv_len - query_len)


@dataclass(frozen=True)
class SlidingWindow(_Band):
    """A query attends to the keys near its own position: query i to keys i - left .. i + right, inclusive.

    The inclusive window of flash-attn; ``left=n - 1, right=0`` is the causal window of n keys of Longformer
    (Beltagy et al., 2020) and Mistral. The kernels visit the tiles of the window only.

    Args:
        left: how many keys before its own position a query sees; None for all.
        right: how many after it; None for all.
        align: what "its own position" is when there are not as many queries as keys: i, ``"top_left"``, or
            i + Lk - Lq, ``"bottom_right"``, which flash-attn and decoding with a cache have.

    Raises:
        TypeError: ``left`` or ``right`` is neither an int nor None.
        ValueError: ``left`` or ``right`` is negative, or ``align`` is neither.
    """

    left: int | None = None
    right: int | None = None
    align: Literal["top_left", "bottom_right"] = "top_left"

    def __post_init__(self) -> None:
        for name, size in (("left", self.left), ("right", self.right)):
            if size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
                raise TypeError(f"{name} must be an int, or None for no bound, got {type(size).__name__}")
            if size < 0:
                raise ValueError(f"{name} must not be negative (None is no bound), got {size}")
        _check_align(self.align)

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        diagonal = 0 if self.align == "top_left" else kv_len - query_len
        return LoweredMask(
            band_lower=None if self.left is None else diagonal - min(self.left, _BEYOND_ANY_LENGTH),
            band_upper=None if self.right is None else diagonal + min(self.right, _BEYOND_ANY_LENGTH),
        )


@dataclass(frozen=True, eq=False)
class KeyLengths(Mask):
    """Batch entry b attends to its first ``lengths[b]`` keys only: padding on the right.

    Args:
        lengths: one length for each batch entry, 0 to Lk: a 1-D integer tensor or a sequence of int.

    Raises:
        TypeError: ``lengths`` is neither.
        ValueError: ``lengths`` is not 1-D, or a length in a sequence is negative.
    """

    lengths: Tensor

    def __post_init__(self) -> None:
        lengths = _as_lengths(self.lengths)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "_ranges", _ranges(torch.zeros_like(lengths), lengths)[:, None])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyLengths) and _same_tensor(self.lengths, other.lengths)

    def __hash__(self) -> int:
        return hash((KeyLengths, self.lengths.shape))

    def __repr__(self) -> str:
        return f"KeyLengths({_summary(self.lengths)})"

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        return LoweredMask(key_ranges=self._ranges.to(device))

    def lower_packed(self, packing: Packing) -> LoweredMask:
        lengths = self.lengths.to(packing.device)[packing.sequence]
        return LoweredMask(key_ranges=_ranges(packing.kv_begin, packing.kv_begin + lengths)[None])


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first ``length`` keys: the inputs of a prefix language model.

    ``Causal() | Prefix(n)`` is the prefix-LM mask (Raffel et al., 2020);
    ``SlidingWindow(w, 0) | Prefix(4)`` a window that keeps the first keys in sight (Xiao et al., 2024).

    Args:
        length: number of keys; more than there are is all of them.

    Raises:
        TypeError: ``length`` is not an int.
        ValueError: ``length`` is negative.
    """

    length: int

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, (int, torch.SymInt)):
            raise TypeError(f"length must be an int, got {type(self.length).__name__}")
        if self.length < 0:
            raise ValueError(f"length must not be negative, got {self.length}")

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        end = torch.full((1, 1), min(self.length, kv_len), dtype=torch.int64, device=device)
        return LoweredMask(key_ranges=_ranges(torch.zeros_like(end), end))

    def lower_packed(self, packing: Packing) -> LoweredMask:
        end = packing.kv_begin + min(self.length, _BEYOND_ANY_LENGTH)
        return LoweredMask(key_ranges=_ranges(packing.kv_begin, end)[None])


@dataclass(frozen=True, eq=False)
class Segments(Mask):
    """A query sees the keys of its own segment: documents packed into one sequence.

    Ids may be any numbers in any order. Tiles of keys outside the first and last key of a query's segment are
    skipped, so packed documents cost what each costs alone.

    Args:
        query_ids: (B, Lq) or (Lq,), an integer tensor: the segment of each query.
        kv_ids: (B, Lk) or (Lk,): that of each key; query_ids by default.

    Raises:
        TypeError: an argument is not an integer tensor.
        ValueError: it does not have 1 or 2 dimensions, batch sizes differ, or an id does not fit in 32 bits.
    """

    query_ids: Tensor
    kv_ids: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        query_ids = _as_segment_ids("query_ids", self.query_ids)
        kv_ids = query_ids if self.kv_ids is None else _as_segment_ids("kv_ids", self.kv_ids)
        batches = query_ids.shape[0], kv_ids.shape[0]
        if batches[0] != batches[1] and 1 not in batches:
            raise ValueError(
                f"query_ids and kv_ids must have the same batch size, got shapes {tuple(query_ids.shape)} "
                f"and {tuple(kv_ids.shape)}"
            )
        object.__setattr__(self, "query_ids", query_ids)
        object.__setattr__(self, "kv_ids", kv_ids)
        object.__setattr__(self, "_ranges", _segment_ranges(query_ids, kv_ids))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Segments)
            and _same_tensor(self.query_ids, other.query_ids)
            and _same_tensor(self.kv_ids, other.kv_ids)
        )

    def __hash__(self) -> int:
        return hash((Segments, self.query_ids.shape, self.kv_ids.shape))

    def __repr__(self) -> str:
        return f"Segments({tuple(self.query_ids.shape)}, {tuple(self.kv_ids.shape)})"

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        return LoweredMask(
            key_ranges=self._ranges.to(device),
            query_segments=self.query_ids.to(device),
            kv_segments=self.kv_ids.to(device),
        )

    def lower_packed(self, packing: Packing) -> LoweredMask:
        lowered = self.lower(packing.total_queries, packing.total_keys, packing.device)
        sequences = packing.sequence[None], packing.kv_sequence[None]
        query_ids, kv_ids = _intersect_segments(sequences, _segments_of(lowered))
        return LoweredMask(
            key_ranges=_segment_ranges(query_ids, kv_ids), query_segments=query_ids, kv_segments=kv_ids
        )


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any mask, as a tensor.

    Args:
        tensor: broadcastable to (B, H, Lq, Lk) and never expanded in memory: bool, True = attend, or float32,
            float64, float16 or bfloat16, added to the scaled scores, -inf = hidden.

    Raises:
        TypeError: ``tensor`` is not a tensor of one of these dtypes.
        ValueError: it does not have 1 to 4 dimensions.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor):
            raise TypeError(f"tensor must be a torch.Tensor, got {type(self.tensor).__name__}")
        if self.tensor.dtype not in (torch.bool, *FLOAT_DTYPES):
            raise TypeError(
                "tensor must be bool (True = attend), or float32, float64, float16 or bfloat16 (added to the "
                f"scores), got {self.tensor.dtype}"
            )
        if not 1 <= self.tensor.dim() <= 4:
            raise ValueError(
                f"tensor must have 1 to 4 dimensions of (B, H, Lq, Lk), got shape {tuple(self.tensor.shape)}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dense) and _same_tensor(self.tensor, other.tensor)

    def __hash__(self) -> int:
        return hash((Dense, self.tensor.shape, self.tensor.dtype))

    def __repr__(self) -> str:
        return f"Dense({_summary(self.tensor)})"

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        tensor = self.tensor[(None,) * (4 - self.tensor.dim())]
        return LoweredMask(dense=tensor) if tensor.dtype == torch.bool else LoweredMask(bias=tensor)

    def lower_packed(self, packing: Packing) -> LoweredMask:
        return self.lower(packing.total_queries, packing.total_keys, packing.device)


@dataclass(frozen=True)
class _Combination(Mask):
    masks: tuple[Mask, ...]

    @property
    def parts(self) -> tuple[Mask, ...]:
        return tuple(part for mask in self.masks for part in mask.parts)


def _flatten(kind: type[_Combination], *masks: Mask) -> tuple[Mask, ...]:
    """The masks, and in place of those that are of this kind what they combine."""
    return tuple(part for mask in masks for part in (mask.masks if isinstance(mask, kind) else (mask,)))


class Conjunction(_Combination):
    """What `&` makes: all its parts at once."""

    def __repr__(self) -> str:
        texts = (f"({mask})" if isinstance(mask, Disjunction) else repr(mask) for mask in self.masks)
        return " & ".join(texts)

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        return reduce(_lowered_and, (mask.lower(query_len, kv_len, device) for mask in self.masks))

    def lower_packed(self, packing: Packing) -> LoweredMask:
        return reduce(_lowered_and, (mask.lower_packed(packing) for mask in self.masks))


class Disjunction(_Combination):
    """What `|` makes: any of its parts."""

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.masks))

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        lowered = [mask.lower(query_len, kv_len, device) for mask in self.masks]
        return self._either(lowered, query_len, kv_len, device)

    def lower_packed(self, packing: Packing) -> LoweredMask:
        lowered = [mask.lower_packed(packing) for mask in self.masks]
        return self._either(lowered, packing.total_queries, packing.total_keys, packing.device)

    def _either(
        self, lowered: list[LoweredMask], query_len: int, kv_len: int, device: torch.device
    ) -> LoweredMask:
        if any(part.bias is not None for part in lowered):
            raise TypeError("masks combined with | must be boolean, got a floating-point Dense mask")
        if any(part.blocks is not None for part in lowered):
            raise TypeError("a BlockMask within | must be combined by its own operator: block_mask | mask")
        if any(part.dense is not None for part in lowered):
            return LoweredMask(dense=_dense_or(lowered, query_len, kv_len, device))
        parts = [as_ranges(part, query_len, kv_len, device) for part in lowered]
        batch = max(part.size(0) for part in parts)
        ranges = torch.cat([part.expand(batch, query_len, -1, 2) for part in parts], dim=2)
        if ranges.size(2) > MAX_RANGES:
            raise ValueError(
                f"a mask must let a query see at most {MAX_RANGES} ranges of keys, "
                f"got {ranges.size(2)}: {self}"
            )
        return LoweredMask(key_ranges=ranges)


def is_causal_bias(tensor: Any) -> bool:
    """Whether this is one of the `torch.nn.attention.bias.CausalBias`, which are tensors in name only."""
    # Whoever has one has loaded its module; loading it here would load the compiler.
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(tensor, module.CausalBias)


def from_causal_bias(bias: Any, query_len: int, kv_len: int) -> Causal:
    """The mask that a `torch.nn.attention.bias.CausalBias` stands for.

    Raises:
        ValueError: it was made for other lengths.
    """
    if (bias.seq_len_q, bias.seq_len_kv) != (query_len, kv_len):
        raise ValueError(
            f"attn_mask must be a CausalBias for the lengths of query and key, ({query_len}, {kv_len}), "
            f"got one for ({bias.seq_len_q}, {bias.seq_len_kv})"
        )
    return Causal("top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right")


def _check_align(align: str) -> None:
    if align not in ("top_left", "bottom_right"):
        raise ValueError(f"align must be 'top_left' or 'bottom_right', got {align!r}")


def _lowered_and(a: LoweredMask, b: LoweredMask) -> LoweredMask:
    query_segments, kv_segments = _both(_intersect_segments, _segments_of(a), _segments_of(b)) or (None, None)
    return LoweredMask(
        bias=_both(add_biases, a.bias, b.bias),
        dense=_both(torch.logical_and, a.dense, b.dense),
        key_ranges=_both(_intersect_ranges, a.key_ranges, b.key_ranges),
        query_segments=query_segments,
        kv_segments=kv_segments,
        band_lower=_both(torch.sym_max, a.band_lower, b.band_lower),
        band_upper=_both(torch.sym_min, a.band_upper, b.band_upper),
        blocks=_both(intersection, a.blocks, b.blocks),
    )


def _both(combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """The two combined, or the one that is not None."""
    if a is None:
        return b
    return a if b is None else combine(a, b)


def add_biases(a: Tensor, b: Tensor) -> Tensor:
    """Their sum, in a precision that has room for it; that of finite numbers is finite."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    total = a.to(dtype) + b.to(dtype)
    limits = torch.finfo(dtype)
    return torch.where(a.isfinite() & b.isfinite(), total.clamp(limits.min, limits.max), total)


def _ranges(begin: Tensor, end: Tensor) -> Tensor:
    """(B, L) or (B,) each -> one range of keys for each, (..., 1, 2)."""
    return torch.stack((begin, end), -1).unsqueeze(-2)


def _intersect_ranges(a: Tensor, b: Tensor) -> Tensor:
    """Each range of one with each of the other: (B, L, n, 2) and (B, L, m, 2) -> (B, L, n m, 2)."""
    a, b = a.unsqueeze(3), b.unsqueeze(2)
    begin, end = torch.maximum(a[..., 0], b[..., 0]), torch.minimum(a[..., 1], b[..., 1])
    ranges = torch.stack((begin, end), -1).flatten(2, 3)
    if ranges.size(2) > MAX_RANGES:
        raise ValueError(
            f"a mask must let a query see at most {MAX_RANGES} ranges of keys, got {ranges.size(2)}"
        )
    return ranges


def as_ranges(lowered: LoweredMask, query_len: int, kv_len: int, device: torch.device) -> Tensor:
    """A mask without dense parts as ranges alone."""
    row = torch.arange(query_len, device=device)
    begin, end = torch.zeros_like(row), torch.full_like(row, kv_len)
    if lowered.band_lower is not None:
        begin = (row + max(lowered.band_lower, -query_len)).clamp(0, kv_len)
    if lowered.band_upper is not None:
        end = (row + min(lowered.band_upper, kv_len) + 1).clamp(0, kv_len)
    ranges = _ranges(begin, end)[None]
    if lowered.query_segments is not None:
        ranges = _intersect_ranges(ranges, _contiguous_segment_ranges(lowered))
    return ranges if lowered.key_ranges is None else _intersect_ranges(ranges, lowered.key_ranges)


def _dense_or(parts: list[LoweredMask], query_len: int, kv_len: int, device: torch.device) -> Tensor:
    visible = [part.visible(0, query_len, kv_len, device) for part in parts]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in visible))
    largest = max(part.dense.numel() for part in parts if part.dense is not None)
    if math.prod(shape) > largest:
        raise NotImplementedError(
            f"| of a Dense mask and a mask of another kind needs a tensor of shape {tuple(shape)}, which "
            "would be larger than the one given: make that tensor, or expand the given one"
        )
    return reduce(torch.logical_or, visible)


def _segments_of(lowered: LoweredMask) -> tuple[Tensor, Tensor] | None:
    return None if lowered.query_segments is None else (lowered.query_segments, lowered.kv_segments)


def _intersect_segments(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids that are equal where those of both are."""
    query_len, batch = a[0].size(1), max(a[0].size(0), b[0].size(0), a[1].size(0), b[1].size(0))
    high, low = (torch.cat([ids.expand(batch, -1) for ids in pair], dim=1) for pair in (a, b))
    ids = torch.unique(high.to(torch.int64) * 2**32 + low, return_inverse=True)[1].to(torch.int32)
    return ids[:, :query_len], ids[:, query_len:]


def _segment_ranges(query_ids: Tensor, kv_ids: Tensor) -> Tensor:
    """From the first to the last key of each query's segment, (B or 1, Lq, 1, 2)."""
    batch = max(query_ids.size(0), kv_ids.size(0))
    query_ids, kv_ids = (ids.expand(batch, -1).contiguous() for ids in (query_ids, kv_ids))
    if kv_ids.size(1) == 0:
        return torch.zeros(batch, query_ids.size(1), 1, 2, dtype=torch.int64, device=query_ids.device)
    ordered, index = torch.sort(kv_ids, dim=1, stable=True)
    left = torch.searchsorted(ordered, query_ids)
    right = torch.searchsorted(ordered, query_ids, right=True)
    begin = index.gather(1, left.clamp(max=kv_ids.size(1) - 1))
    end = index.gather(1, (right - 1).clamp(min=0)) + 1
    return _ranges(begin, torch.where(left == right, begin, end))


def _contiguous_segment_ranges(lowered: LoweredMask) -> Tensor:
    """The keys of each query's segment, if they are one run."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("Segments combined with | cannot be traced: pass the mask in from outside")
    ranges = _segment_ranges(lowered.query_segments, lowered.kv_segments)
    begin, end = ranges[..., 0, 0], ranges[..., 0, 1]
    kv_ids = lowered.kv_segments
    if kv_ids.size(1) == 0:
        return ranges
    changes = torch.nn.functional.pad((kv_ids[:, 1:] != kv_ids[:, :-1]).cumsum(1), (1, 0))
    changes = changes.expand(begin.size(0), -1)
    last = changes.gather(1, (end - 1).clamp(min=0))
    if bool((changes.gather(1, begin.clamp(max=kv_ids.size(1) - 1)) != last).logical_and(end > begin).any()):
        raise NotImplementedError("Segments combined with | must be contiguous: one run of keys for each id")
    return ranges


def _as_segment_ids(name: str, ids: Any) -> Tensor:
    """(B or 1, L), int32."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"{name} must be (B, L) or (L,), got shape {tuple(ids.shape)}")
    if ids.dtype == torch.int64 and not torch.compiler.is_compiling() and ids.numel():
        limits = torch.iinfo(torch.int32)
        least, most = (int(x) for x in ids.aminmax())
        if least < limits.min or most > limits.max:
            raise ValueError(f"{name} must fit in 32 bits, got {least} to {most}")
    ids = ids.to(torch.int32)
    return ids if ids.dim() == 2 else ids.unsqueeze(0)


def _as_lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    """(B,), int64."""
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be a tensor of integers, got {lengths.dtype}")
        if lengths.dim() != 1:
            raise ValueError(f"lengths must have one dimension, (B,), got shape {tuple(lengths.shape)}")
        return lengths.to(torch.int64)
    if not isinstance(lengths, Sequence) or isinstance(lengths, (str, bytes)):
        raise TypeError(f"lengths must be a tensor or a sequence of int, got {type(lengths).__name__}")
    for index, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"lengths[{index}] must be an int, got {type(length).__name__}")
        if length < 0:
            raise ValueError(f"lengths[{index}] must not be negative, got {length}")
    return torch.tensor(lengths, dtype=torch.int64)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _summary(tensor: Tensor) -> str:
    if tensor.dim() == 1 and tensor.dtype == torch.int64 and tensor.numel() <= 16:
        return str(tensor.tolist())
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
