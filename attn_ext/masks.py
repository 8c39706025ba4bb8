"""Which keys a query may attend to: mask objects, combined with `&`.

A mask knows nothing of the size of the problem. `attention` lowers it to the terms of the kernels: a band of
the score matrix, a number of keys for each batch entry, and a dense tensor where nothing smaller will do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Causal", "Dense", "KeyLengths", "Mask", "SlidingWindow"]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_BEYOND_ANY_LENGTH = 2**62  # and, with a length added, still an int64


class LoweredMask(NamedTuple):
    """A mask as the operators take it.  Key j is visible to query i of batch entry b iff

    band_lower <= j - i <= band_upper, j < key_lengths[b], and the bias is neither False nor -inf there.
    """

    bias: Tensor | None = None  # 4-D, each dimension 1 or that of (B, H, Lq, Lk)
    key_lengths: Tensor | None = None  # (B,), int64
    band_lower: int | None = None
    band_upper: int | None = None


class Mask:
    """Base of all masks.  `a & b` lets a query attend to the keys that both allow, and adds what both add."""

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Conjunction((*self.parts, *other.parts))

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self,)

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        """The mask for `query_len` queries and `kv_len` keys, in the terms of the kernels."""
        raise NotImplementedError

    def to_dense(
        self, batch: int, heads: int, query_len: int, kv_len: int, device: torch.device | str | None = None
    ) -> Tensor:
        """The mask as a tensor, (batch, heads, query_len, kv_len): to read, to plot, for other functions.

        Returns:
            bool (True = attend), or, if a part of the mask is floating point, what is added to the scaled
            scores, with -inf for keys that are hidden. May be an expanded view.
        """
        bias, key_lengths, band_lower, band_upper = self.lower(query_len, kv_len, device)
        column = torch.arange(kv_len, device=device)
        distance = column - torch.arange(query_len, device=device).unsqueeze(1)
        terms = [torch.ones((), dtype=torch.bool, device=device)]
        if band_lower is not None:
            terms.append(distance >= band_lower)
        if band_upper is not None:
            terms.append(distance <= band_upper)
        if key_lengths is not None:
            terms.append(column < key_lengths.view(-1, 1, 1, 1))
        if bias is not None:
            terms.append(bias)
        return reduce(_intersect, terms).expand(batch, heads, query_len, kv_len)


@dataclass(frozen=True)
class Causal(Mask):
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
class SlidingWindow(Mask):
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
        object.__setattr__(self, "lengths", _as_lengths(self.lengths))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyLengths) and _same_tensor(self.lengths, other.lengths)

    def __hash__(self) -> int:
        return hash((KeyLengths, self.lengths.shape))

    def __repr__(self) -> str:
        return f"KeyLengths({_summary(self.lengths)})"

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        return LoweredMask(key_lengths=self.lengths.to(device).contiguous())


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
        return LoweredMask(bias=self.tensor[(None,) * (4 - self.tensor.dim())])


@dataclass(frozen=True)
class Conjunction(Mask):
    """What `&` makes: all its parts at once."""

    masks: tuple[Mask, ...]

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.masks

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.masks))

    def lower(self, query_len: int, kv_len: int, device: torch.device) -> LoweredMask:
        return reduce(_lowered_and, (mask.lower(query_len, kv_len, device) for mask in self.masks))


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
    return LoweredMask(
        bias=_both(_intersect, a.bias, b.bias),
        key_lengths=_both(torch.minimum, a.key_lengths, b.key_lengths),
        band_lower=_both(torch.sym_max, a.band_lower, b.band_lower),
        band_upper=_both(torch.sym_min, a.band_upper, b.band_upper),
    )


def _both(combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """The two combined, or the one that is not None."""
    if a is None:
        return b
    return a if b is None else combine(a, b)


def _intersect(a: Tensor, b: Tensor) -> Tensor:
    """The dense mask that allows what both allow and adds what both add."""
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        return torch.where(a, b, -torch.inf)
    if b.dtype == torch.bool:
        return torch.where(b, a, -torch.inf)
    return a + b


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
