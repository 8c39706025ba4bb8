"""Keys and values of sequences that grow: one run of memory for each, or pages that sequences share.

The attributes of both caches are what `attention_decode` takes.

Which append? `append` stores prompts, and all that a quantised cache is to hold, as it sets the scales. For a
step of generation `reserve` makes room, and `attention_decode` with `new_key` writes, rotates and attends at
once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ._validation import _check_strided
from .masks import FLOAT_DTYPES

__all__ = ["CacheFullError", "KVCache", "PagedKVCache"]

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest number of a page is stored as


class CacheFullError(RuntimeError):
    """There is no room for what a cache is asked to take. The cache is as it was."""


class _Cache:
    """Pages of memory, and the sequences whose keys and values are there.

    The host keeps the books and writes them to the device as well: to give out pages waits for no device.

    Quantised, x is stored as x / scale, rounded, with one scale for each page and head. It begins as the
    largest |x| of the first tokens divided by 127 (int8) or 448 (float8_e4m3fn). A larger |x| makes it grow
    by a power of two, and what the page has is rounded anew. As each scale is at least twice the last, errors
    add up to at most scale (int8), or |x| / 16 + scale / 512 (float8_e4m3fn).
    """

    def __init__(
        self,
        sequences: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        if dtype not in (*FLOAT_DTYPES, *_LARGEST):
            raise TypeError(
                "dtype must be float32, float64, float16, bfloat16, int8 or float8_e4m3fn, "
                f"got {dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__}"
            )
        key_shape = pages, _positive("kv_heads", kv_heads), page_size, _positive("head_dim", head_dim)
        value_dim = _positive("value_dim", head_dim if value_dim is None else value_dim)
        self.key = torch.zeros(key_shape, dtype=dtype, device=device)
        self.value = torch.zeros(*key_shape[:3], value_dim, dtype=dtype, device=device)
        self.key_scale = self.value_scale = None
        if dtype in _LARGEST:
            self.key_scale = torch.zeros(key_shape[:2], device=device)
            self.value_scale = torch.zeros(key_shape[:2], device=device)
        self.seqlens = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._lengths: list[int | None] = [None] * sequences  # None: not in use

    @property
    def dtype(self) -> torch.dtype:
        return self.key.dtype

    @property
    def device(self) -> torch.device:
        return self.key.device

    def allocate(self, count: int = 1) -> list[int]:
        """Begins `count` sequences without tokens.

        Returns:
            Their indices: of `seqlens`, and of what else has one entry for each sequence.

        Raises:
            CacheFullError: there are not as many unused.
        """
        _positive("count", count)
        unused = [index for index, length in enumerate(self._lengths) if length is None]
        if count > len(unused):
            raise CacheFullError(f"{count} sequences are asked for, {len(unused)} are unused")
        for index in unused[:count]:
            self._lengths[index] = 0
        return unused[:count]

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor, sequences: Tensor | Sequence[int] | None = None) -> None:
        """Stores L more tokens of each of n sequences.

        Args:
            key: (n, Hkv, L, D), of the dtype of the cache, or any floating-point one if that is quantised.
            value: (n, Hkv, L, Dv), likewise.
            sequences: which; all in use by default, in the order of their indices.

        Raises:
            TypeError, ValueError: an argument does not fit the cache.
            CacheFullError: there is no room for all of them.
        """
        sequences = self._in_use(sequences)
        self._check_tokens(key, value, len(sequences))
        count = key.shape[2]
        with self._growing(sequences, count) as index:
            positions = self.seqlens[index, None] + torch.arange(count, device=self.device)
            self._write(*self._locate(index, positions), key, value)

    @torch.no_grad()
    def reserve(self, count: int, sequences: Tensor | Sequence[int] | None = None) -> Tensor:
        """Makes room for `count` more tokens of each of n sequences, and counts them as there.

        What they are, `attention_decode` is to write:

            lengths = cache.reserve(1)
            out = attention_decode(
                query, cache.key, cache.value, lengths,
                block_table=cache.block_table, new_key=key, new_value=value,
            )

        Args:
            count: 1 or more.
            sequences: which; all in use by default, in the order of their indices.

        Returns:
            Their lengths before, (n,) int32, the `cache_seqlens` of that call. Rows of its other arguments
            must be those of the same sequences: `block_table[sequences]`, unless they are all.

        Raises:
            TypeError: `count` is not an int.
            ValueError: it is not positive, the cache is quantised, or a sequence is not in use.
            CacheFullError: there is no room for all of them.
        """
        _positive("count", count)
        if self.key_scale is not None:
            raise ValueError(
                f"reserve takes caches that are not quantised, got {self.dtype}: append sets its scales"
            )
        with self._growing(self._in_use(sequences), count) as index:
            return self.seqlens[index]

    def fork(self, sequence: int, count: int = 1) -> list[int]:
        """Begins `count` sequences with the tokens of another.

        Returns:
            Their indices.

        Raises:
            ValueError: `sequence` is not in use.
            CacheFullError: there are not as many unused.
        """
        self._in_use([sequence])
        copies = self.allocate(count)
        self._share(sequence, copies)
        self.seqlens[copies] = self._lengths[sequence]
        for copy in copies:
            self._lengths[copy] = self._lengths[sequence]
        return copies

    def free(self, sequences: Tensor | Sequence[int] | None = None) -> None:
        """Ends sequences, all by default, for others to have their indices and memory."""
        sequences = self._in_use(sequences)
        self._release(sequences)
        self.seqlens[sequences] = 0
        for sequence in sequences:
            self._lengths[sequence] = None

    def read(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Copies of what a sequence has: key (Hkv, L, D) and value (Hkv, L, Dv), float32 if quantised."""
        self._in_use([sequence])
        positions = torch.arange(self._lengths[sequence], device=self.device)
        pages, slots = self._locate(torch.tensor([sequence], device=self.device), positions[None])
        found = []
        for store, scale in self._stores():
            tokens = _raw(store)[pages, :, slots].view(store.dtype)
            tokens = tokens if scale is None else tokens.to(torch.float32) * scale[pages].unsqueeze(-1)
            found.append(tokens.squeeze(0).transpose(0, 1))
        return tuple(found)

    @contextmanager
    def _growing(self, sequences: list[int], count: int) -> Iterator[Tensor]:
        """Their index on the device. They have room for `count` more tokens, counted if nothing is raised."""
        index = torch.tensor(sequences, dtype=torch.int64, device=self.device)
        with self._room(sequences, count):
            yield index
            self.seqlens[index] += count
        for sequence in sequences:
            self._lengths[sequence] += count

    def _room(self, sequences: list[int], count: int) -> AbstractContextManager[None]:
        """Has pages ready for `count` more tokens of each, and takes them back if something is raised.

        Raises:
            CacheFullError: there are none.
        """
        raise NotImplementedError

    def _locate(self, index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The page, and the slot in it, of tokens (n, L) of sequences (n,)."""
        raise NotImplementedError

    def _share(self, sequence: int, copies: list[int]) -> None:
        """Gives what a sequence has to others."""
        raise NotImplementedError

    def _release(self, sequences: list[int]) -> None:
        """Takes back what sequences have."""

    def _in_use(self, sequences: Any) -> list[int]:
        """Indices of sequences, different ones that are in use; all of those for None."""
        if sequences is None:
            return [index for index, length in enumerate(self._lengths) if length is not None]
        indices = sequences.tolist() if isinstance(sequences, Tensor) else list(sequences)
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"sequences must hold ints, got {type(index).__name__}")
            if not 0 <= index < len(self._lengths) or self._lengths[index] is None:
                raise ValueError(f"sequences must be in use, got {index}")
        if len(set(indices)) != len(indices):
            raise ValueError(f"sequences must differ, got {indices}")
        return indices

    def _check_tokens(self, key: Any, value: Any, sequences: int) -> None:
        taken = (self.dtype,) if self.key_scale is None else FLOAT_DTYPES
        for name, tensor, store in (("key", key, self.key), ("value", value, self.value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            _check_strided(name, tensor)
            if tensor.dtype not in taken:
                raise TypeError(f"{name} must be {' or '.join(map(str, taken))}, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(
                    f"{name} must be on the device of the cache, {self.device}, got {tensor.device}"
                )
            expected = sequences, store.shape[1], key.shape[2] if key.dim() == 4 else "L", store.shape[3]
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must be {expected}, got shape {tuple(tensor.shape)}")

    def _stores(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield self.key, self.key_scale
        yield self.value, self.value_scale

    def _copy_pages(self, source: list[int], target: list[int]) -> None:
        for store, scale in self._stores():
            _raw(store)[target] = _raw(store)[source]
            if scale is not None:
                scale[target] = scale[source]

    def _write(self, pages: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores tokens (n, Hkv, L, D); page and slot in it of each, (n, L), are nobody else's."""
        for (store, scale), tokens in zip(self._stores(), (key, value), strict=True):
            tokens = tokens.transpose(1, 2)
            if scale is not None:
                tokens = _quantize(store, scale, tokens, pages, slots)
            _raw(store)[pages, :, slots] = _raw(tokens)


class KVCache(_Cache):
    """Keys and values in one run of memory for each sequence.

        cache = KVCache(sequences=8, capacity=4096, kv_heads=8, head_dim=128)
        cache.allocate(8)
        cache.append(key, value)

    Args:
        sequences: B, how many there can be at a time.
        capacity: tokens that each has room for.
        kv_heads, head_dim: Hkv, D.
        value_dim: Dv, D by default.
        dtype: float32, float64, float16 or bfloat16; int8 or float8_e4m3fn with one scale for each sequence
            and head, of less than 2 / 127 or 2 / 448 times the largest |x| among its numbers x, which must be
            finite. Then x is read with an error of at most scale (int8; half of that if all were stored at
            once) or |x| / 16 + scale / 512 (float8_e4m3fn).
        device: of all tensors.

    Attributes:
        key, value: (B, Hkv, capacity, D), (B, Hkv, capacity, Dv).
        key_scale, value_scale: (B, Hkv), float32, factors of what is stored; None if not quantised.
        seqlens: (B,), int32, tokens of each sequence.

    Raises:
        TypeError: a size is not an int, or the dtype is none of these.
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        sequences: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        _positive("sequences", sequences)
        _positive("capacity", capacity)
        super().__init__(sequences, sequences, capacity, kv_heads, head_dim, value_dim, dtype, device)

    @contextmanager
    def _room(self, sequences: list[int], count: int) -> Iterator[None]:
        capacity, longest = self.key.shape[2], max((self._lengths[index] for index in sequences), default=0)
        if longest + count > capacity:
            raise CacheFullError(f"sequences have room for {capacity} tokens, got {count} after {longest}")
        yield

    def _locate(self, index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return index[:, None].expand_as(positions), positions

    def _share(self, sequence: int, copies: list[int]) -> None:
        self._copy_pages([sequence] * len(copies), copies)


class PagedKVCache(_Cache):
    """Keys and values in pages of a pool (PagedAttention, Kwon et al., 2023), which sequences share.

    A page is given out when a token needs it, and copied when a token is to be written to a page that another
    sequence has as well.

    Args:
        num_pages: P, pages in the pool.
        page_size: S, tokens in a page.
        kv_heads, head_dim: Hkv, D.
        max_sequences: B, how many there can be at a time.
        max_pages: that a sequence may have, num_pages by default.
        value_dim, dtype, device: as for `KVCache`, with one scale for each page and head.

    Attributes:
        key, value: (P, Hkv, S, D), (P, Hkv, S, Dv).
        key_scale, value_scale: (P, Hkv), float32, factors of what is stored; None if not quantised.
        seqlens: (B,), int32, tokens of each sequence.
        block_table: (B, max_pages), int32, the pages of each sequence in the order of its tokens, and then
            -1, where `attention_decode` does not write.

    Raises:
        TypeError: a size is not an int, or the dtype is none of those.
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        max_sequences: int,
        max_pages: int | None = None,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        _positive("num_pages", num_pages)
        _positive("page_size", page_size)
        _positive("max_sequences", max_sequences)
        max_pages = _positive("max_pages", num_pages if max_pages is None else max_pages)
        super().__init__(max_sequences, num_pages, page_size, kv_heads, head_dim, value_dim, dtype, device)
        self.block_table = torch.full((max_sequences, max_pages), -1, dtype=torch.int32, device=device)
        self._pages: list[list[int]] = [[] for _ in range(max_sequences)]
        self._references: Counter[int] = Counter()  # how many sequences have a page
        self._unused = list(range(num_pages))[::-1]  # the next to be given out last

    @property
    def page_size(self) -> int:
        return self.key.shape[2]

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._unused)

    def defragment(self) -> None:
        """Moves the pages in use to the front of the pool, in the order of the sequences and their tokens."""
        order = list(dict.fromkeys(chain.from_iterable(self._pages)))
        place = {page: index for index, page in enumerate(order)}
        self._copy_pages(order, list(place.values()))
        self._references = Counter({place[page]: self._references[page] for page in order})
        self._unused = list(range(len(order), self.key.shape[0]))[::-1]
        self._pages = [[place[page] for page in pages] for pages in self._pages]
        self._update_table({sequence: (0, pages) for sequence, pages in enumerate(self._pages)})

    @contextmanager
    def _room(self, sequences: list[int], count: int) -> Iterator[None]:
        given = self._choose_pages(sequences, count)
        try:
            self._copy_shared(given)
            self._update_table(given)
            yield
        except BaseException:
            before = {
                sequence: (begin, (self._pages[sequence][begin:] + [-1] * len(pages))[: len(pages)])
                for sequence, (begin, pages) in given.items()
            }
            self._update_table(before)
            raise
        for sequence, (begin, pages) in given.items():
            self._references.subtract(self._pages[sequence][begin:])
            self._references.update(pages)
            self._pages[sequence][begin:] = pages
            del self._unused[-len(pages) :]

    def _choose_pages(self, sequences: list[int], count: int) -> dict[int, tuple[int, list[int]]]:
        """Unused pages for `count` more tokens of each, and from which of a sequence's own on they come."""
        size, most = self.page_size, self.block_table.shape[1]
        added = {
            sequence: max(0, -(-(self._lengths[sequence] + count) // size) - len(self._pages[sequence]))
            for sequence in sequences
        }
        longest = max((len(self._pages[sequence]) + pages for sequence, pages in added.items()), default=0)
        if longest > most:
            raise CacheFullError(f"a sequence may have {most} pages, {longest} are needed")
        copied = self._must_copy(sequences) if count else []
        for sequence in copied:
            added[sequence] += 1
        needed = sum(added.values())
        if needed > len(self._unused):
            raise CacheFullError(f"{needed} pages are needed, {len(self._unused)} are free")
        unused = reversed(self._unused)
        return {
            sequence: (len(self._pages[sequence]) - (sequence in copied), list(islice(unused, pages)))
            for sequence, pages in added.items()
            if pages
        }

    def _copy_shared(self, given: dict[int, tuple[int, list[int]]]) -> None:
        """Copies the pages in whose place others come."""
        copies = [
            (self._pages[sequence][begin], pages[0])
            for sequence, (begin, pages) in given.items()
            if begin < len(self._pages[sequence])
        ]
        if copies:
            self._copy_pages(*map(list, zip(*copies, strict=True)))

    def _must_copy(self, sequences: list[int]) -> list[int]:
        """Those of the writing sequences whose last page, not full, is to remain as it is for others."""
        copied, copies = [], Counter()
        for sequence in sequences:
            if self._lengths[sequence] % self.page_size:
                last = self._pages[sequence][-1]
                if (
                    self._references[last] - copies[last] > 1
                ):  # if all that have it write to it, one may keep it
                    copied.append(sequence)
                    copies[last] += 1
        return copied

    def _update_table(self, changes: dict[int, tuple[int, list[int]]]) -> None:
        """Tells the device the pages of sequences, of each those from a column on."""
        entries = [
            (sequence, column, page)
            for sequence, (begin, pages) in changes.items()
            for column, page in enumerate(pages, begin)
        ]
        if not entries:
            return
        table = torch.tensor(entries, dtype=torch.int64, device=self.device).view(len(entries), 3)
        sequences, columns, pages = table.unbind(1)
        self.block_table[sequences, columns] = pages.to(torch.int32)

    def _locate(self, index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        pages = self.block_table[index[:, None], positions // self.page_size]
        return pages.to(torch.int64), positions % self.page_size

    def _share(self, sequence: int, copies: list[int]) -> None:
        self.block_table[copies] = self.block_table[sequence].clone()
        for copy in copies:
            self._pages[copy] = self._pages[sequence].copy()
            self._references.update(self._pages[copy])

    def _release(self, sequences: list[int]) -> None:
        self.block_table[sequences] = -1
        for sequence in sequences:
            pages, self._pages[sequence] = self._pages[sequence], []
            self._references.subtract(pages)
            self._unused += [page for page in reversed(pages) if not self._references[page]]


def _positive(name: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return size


def _raw(tensor: Tensor) -> Tensor:
    """As torch can index it, which is not so of float8."""
    return tensor.view(torch.int8) if tensor.dtype in _LARGEST else tensor


def _quantize(store: Tensor, scale: Tensor, tokens: Tensor, pages: Tensor, slots: Tensor) -> Tensor:
    """Tokens (n, L, Hkv, D) as they are stored, after the scales of their pages have grown as they need."""
    tokens = tokens.to(torch.float32)
    pages, index = torch.unique(pages, return_inverse=True)
    begun = torch.zeros(pages.shape[0], 1, dtype=torch.bool, device=pages.device)
    begun[index[slots == 0]] = True  # by these tokens
    old = torch.where(begun, 0, scale[pages])
    largest = tokens.abs().amax(-1).flatten(0, 1)  # (n L, Hkv)
    least = torch.zeros_like(old).scatter_reduce_(0, index.view(-1, 1).expand_as(largest), largest, "amax")
    least /= _LARGEST[store.dtype]
    new = torch.where(old > 0, old * torch.exp2(torch.log2(least / old).ceil().clamp(min=0)), least)
    scale[pages] = new
    grown = ((old > 0) & (new > old)).any(1)
    if grown.any():
        present, shrink = _raw(store)[pages[grown]].view(store.dtype), (old / new)[grown, :, None, None]
        _raw(store)[pages[grown]] = _raw(_round(present.to(torch.float32) * shrink, store.dtype))
    return _round(tokens / torch.where(new > 0, new, 1)[index].unsqueeze(-1), store.dtype)


def _round(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = numbers.round() if dtype == torch.int8 else numbers
    return numbers.clamp(-_LARGEST[dtype], _LARGEST[dtype]).to(dtype)
