"""Shared memory: bounds, alignment, what was written, what is still in flight, and a quick look for races.

Each two bytes have a cell of flags.  Flags tell whether an access may be a race; only then does `Races` look
at who accessed the cell and when.  Two bytes are the grain: threads that store neighbouring bytes look like a
race.
"""

from __future__ import annotations

import numpy as np

from .errors import MemoryAccessError
from .races import Access, Races
from .types import UNSIGNED, Array

BASE = 1024  # the first valid offset: a null pointer is not one

_INITIALISED, _IN_FLIGHT, _WRITTEN, _READ = 1, 2, 4, 8  # written and read: since the last barrier
_ALL_CELLS = {cells: int.from_bytes(b"\1" * cells, "little") for cells in (1, 2, 4, 8)}


class Shared:
    """The shared memory of several blocks.

    Args:
        blocks: how many there are.
        size: bytes of each.
        threads: of each block, a multiple of the warp size.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        self.stride = -(-max(size, 1) // 256) * 256
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.words = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.words[16] = self.bytes.view("V16")
        self._flags = np.zeros(len(self.bytes) // 2, np.uint8)
        self._flag_words = {size: self._flags.view(UNSIGNED[max(1, size // 2)]) for size in (1, 2, 4, 8, 16)}
        self._last_thread = np.zeros(len(self._flags), np.int32)
        self.races = Races(blocks, len(self._flags), threads)

    def positions(self, offset: Array, size: int, threads: Array) -> Array:
        """Where in `bytes` accesses of `size` bytes at shared offsets begin; one thread each."""
        offset = offset.astype(np.int64) - BASE
        if int(offset.min()) < 0 or int(offset.max()) + size > self.size:
            at = np.flatnonzero((offset < 0) | (offset + size > self.size))[0]
            raise MemoryAccessError(
                f"shared access out of bounds: {size} bytes at {int(offset[at])} of {self.size}, "
                f"thread {int(threads[at]) % self.threads}"
            )
        if (offset & (size - 1)).any():
            raise MemoryAccessError(f"misaligned shared access of {size} bytes")
        return threads // self.threads * self.stride + offset

    def check_read(self, positions: Array, size: int, threads: Array, whole_warp: bool = False) -> None:
        """Before `threads` read; `whole_warp`: all lanes of a thread's warp read what it points to."""
        flags, at, every = self._cells(positions, size)
        found = flags[at]
        if ((found & (every * (_INITIALISED | _IN_FLIGHT))) != every * _INITIALISED).any():
            if (found & (every * _IN_FLIGHT)).any():
                raise MemoryAccessError("reads shared bytes whose cp.async is not waited for")
            raise MemoryAccessError("reads uninitialised shared memory")
        access = Access(positions, size, threads, False, whole_warp)
        self.races.record(access, suspicious=bool((found & (every * _WRITTEN)).any()))
        flags[at] = found | every * _READ

    def check_write(self, positions: Array, size: int, threads: Array, in_flight: bool = False) -> None:
        """Before `threads` write; `in_flight`: an asynchronous copy, which arrives later."""
        flags, at, every = self._cells(positions, size)
        found = flags[at]
        if (found & (every * _IN_FLIGHT)).any():
            raise MemoryAccessError("writes shared bytes with a cp.async in flight")
        if size > 1:
            self._last_thread[positions // 2] = threads
            if (self._last_thread[positions // 2] != threads).any():
                raise MemoryAccessError(
                    "shared race: several threads write the same bytes in one instruction"
                )
        access = Access(positions, size, threads, True)
        self.races.record(access, suspicious=bool((found & (every * (_WRITTEN | _READ))).any()))
        flags[at] = every * ((_IN_FLIGHT if in_flight else _INITIALISED) | _WRITTEN)

    def check_atomic(self, positions: Array, size: int) -> None:
        """Before an atomic operation; whether it races with an ordinary one is not looked at."""
        flags, at, every = self._cells(positions, size)
        if ((flags[at] & (every * _INITIALISED)) != every * _INITIALISED).any():
            raise MemoryAccessError("reads uninitialised shared memory")

    def arrive(self, positions: Array, size: int, threads: Array) -> None:
        """A copy that its own threads waited for is there: as if they wrote it now."""
        flags, at, every = self._cells(positions, size)
        flags[at] = every * (_INITIALISED | _WRITTEN)
        self.races.record(Access(positions, size, threads, True), suspicious=False)

    def barrier(self, block: int | None = None) -> None:
        """All threads of a block, or of all blocks, have met: accesses before are ordered with later ones."""
        which = (
            slice(None) if block is None else slice(block * self.stride // 2, (block + 1) * self.stride // 2)
        )
        self._flags[which] &= np.uint8(255 & ~(_WRITTEN | _READ))
        self.races.barrier(block)

    def _cells(self, positions: Array, size: int) -> tuple[Array, Array, np.integer]:
        """Flags in words of an access's cells, which words, and the word that has 1 in each cell."""
        flags = self._flag_words[size]
        return flags, positions // max(size, 2), flags.dtype.type(_ALL_CELLS[flags.itemsize])
