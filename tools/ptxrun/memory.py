"""Global and local memory: bounds and alignment (PTX ISA, "State Spaces").

A generic address says by its upper bits which state space it lies in; offsets within a space start at its
window.
"""

from __future__ import annotations

import bisect

import numpy as np

from .errors import MemoryAccessError
from .types import UNSIGNED, Array

GLOBAL_WINDOW = 0x7F0000000000
SHARED_WINDOW = 0x7E0000000000
LOCAL_WINDOW = 0x7D0000000000
PARAM_WINDOW = 0x7C0000000000
WINDOWS = {
    "global": GLOBAL_WINDOW,
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
    "param": PARAM_WINDOW,
}
SPACE_OF_WINDOW = {window >> 40: space for space, window in WINDOWS.items()}

_GAP = 4096  # between buffers, so that leaving one does not reach another
_ALIGNMENT = 256  # of buffers, as cudaMalloc's


class Global:
    """Buffers that stand for numpy arrays, which are copied in before the kernel and out after it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []
        self._arrays: list[Array] = []
        self._addresses: dict[int, int] = {}
        self._top = _GAP
        self.bytes = np.empty(0, np.uint8)
        self._words: dict[int, Array] = {}

    def add(self, array: Array, name: str) -> int:
        """The address of a buffer for the array; the same one each time it is added."""
        if id(array) in self._addresses:
            return self._addresses[id(array)]
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be a contiguous array; got strides {array.strides}")
        start = -(-self._top // _ALIGNMENT) * _ALIGNMENT
        self._starts.append(start)
        self._ends.append(start + array.nbytes)
        self._names.append(name)
        self._arrays.append(array)
        self._top = start + array.nbytes + _GAP
        return self._addresses.setdefault(id(array), GLOBAL_WINDOW + start)

    def copy_in(self) -> None:
        self.bytes = np.full(-(-self._top // _ALIGNMENT) * _ALIGNMENT, 0xFF, np.uint8)
        for start, end, array in zip(self._starts, self._ends, self._arrays, strict=True):
            self.bytes[start:end] = array.reshape(-1).view(np.uint8)
        self._words = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self._words[16] = self.bytes.view("V16")
        self._all_starts = np.array(self._starts, np.uint64)
        self._all_ends = np.array(self._ends, np.uint64)

    def copy_out(self) -> None:
        for start, end, array in zip(self._starts, self._ends, self._arrays, strict=True):
            if array.flags.writeable:
                array[...] = self.bytes[start:end].view(array.dtype).reshape(array.shape)

    def offsets(self, address: Array, size: int, align: int | None = None) -> Array:
        """Where in `bytes` accesses of `size` bytes begin."""
        align = align or size
        offset = address - np.uint64(GLOBAL_WINDOW)
        lowest, highest = int(offset.min()), int(offset.max())
        buffer = bisect.bisect_right(self._starts, lowest) - 1
        if buffer < 0 or highest + size > self._ends[buffer]:  # not all in one buffer
            self._check_each(address, offset, size)
        if align > 1 and (offset & np.uint64(align - 1)).any():
            raise MemoryAccessError(f"misaligned global access of {align} bytes")
        return offset.astype(np.int64)

    def words(self, address: Array, size: int) -> tuple[Array, Array]:
        """All of memory in words of `size` bytes, and which of them the addresses mean."""
        return self._words[size], self.offsets(address, size) // size

    def _check_each(self, address: Array, offset: Array, size: int) -> None:
        buffers = np.searchsorted(self._all_starts, offset, "right").astype(np.int64) - 1
        bad = np.flatnonzero((buffers < 0) | (offset + np.uint64(size) > self._all_ends[buffers]))
        if not len(bad):
            return
        at, below = bad[0], max(int(buffers[bad[0]]), 0)
        near = "no buffer is below"
        if buffers[at] >= 0:
            near = f"the buffer below is {self._names[below]} (+{int(offset[at]) - self._starts[below]})"
        raise MemoryAccessError(
            f"global access out of bounds: {size} bytes at 0x{int(address[at]):x}, {near}; "
            f"{len(bad)} of {len(address)} threads"
        )


class Local:
    """A stack frame for each thread; what is in it before it is written is 0xFF, a NaN."""

    def __init__(self, threads: int, size: int) -> None:
        self.size = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(threads * self.size, 0xFF, np.uint8)
        self._words = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self._words[16] = self.bytes.view("V16")

    def words(self, address: Array, size: int, threads: Array) -> tuple[Array, Array]:
        """All of memory in words of `size` bytes, and which of them the addresses mean."""
        offset = address.astype(np.int64)
        if (offset < 0).any() or (offset + size > self.size).any() or (offset % size).any():
            raise MemoryAccessError("local access out of bounds or misaligned")
        return self._words[size], (threads * self.size + offset) // size
