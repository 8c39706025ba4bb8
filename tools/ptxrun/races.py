"""Races in shared memory: two accesses by different threads, one of them a write, that nothing orders.

Ordered are accesses with a barrier of the block between them and, within a warp, with a `bar.warp.sync`.
Accesses are logged and replayed into a shadow of the memory, exact for each cell of two bytes, when one looks
suspicious.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import MemoryAccessError
from .types import Array

_LONGEST_LOG = 256
_NOBODY, _SEVERAL_LANES, _SEVERAL_WARPS = -1, -2, -3


@dataclass
class Access:
    """`threads[i]` touch `size` bytes from `positions[i]`; `whole_warp`: so do other lanes of the warp."""

    positions: Array
    size: int
    threads: Array
    is_write: bool
    whole_warp: bool = False
    block_epochs: Array = field(init=False)  # when, by block and by warp
    warp_epochs: Array = field(init=False)


@dataclass
class _Cells:
    """An access by cell, and by columns: thread, warp and epochs of each."""

    cells: Array
    thread: Array
    warp: Array
    block_epoch: Array
    warp_epoch: Array


class Races:
    def __init__(self, blocks: int, cells: int, threads: int) -> None:
        self._threads, self._cell_count = threads, cells
        self._block_epochs = np.ones(blocks, np.int32)  # barriers the block has passed
        self._warp_epochs = np.ones(
            blocks * threads // 32, np.int32
        )  # barriers the warp has passed, of both kinds
        self._log: list[Access] = []
        self._shadow: dict[str, Array] | None = None
        self._enabled = True

    def disable(self) -> None:
        """From now on something orders accesses that is not modelled: mbarriers, barriers of some warps."""
        self._enabled = False
        self._log.clear()

    def barrier(self, block: int | None = None) -> None:
        """Of the threads of a block, or of all blocks."""
        if block is None:
            self._block_epochs += 1
            self._warp_epochs += 1
            self._log.clear()
        else:
            self._block_epochs[block] += 1
            self._warp_epochs[block * self._threads // 32 : (block + 1) * self._threads // 32] += 1

    def warp_barrier(self, warps: Array) -> None:
        self._warp_epochs[warps] += 1

    def record(self, access: Access, suspicious: bool) -> None:
        """Logs an access, and checks it against all before if it is suspicious."""
        if not self._enabled:
            return
        access.block_epochs, access.warp_epochs = self._block_epochs.copy(), self._warp_epochs.copy()
        if suspicious or len(self._log) >= _LONGEST_LOG:
            self._replay()
        if suspicious:
            (self._check_write if access.is_write else self._check_read)(access)
        self._log.append(access)

    def _replay(self) -> None:
        if self._shadow is None:
            names = "writer", "write_block_epoch", "write_warp_epoch"
            names += "reader", "reader_warp", "read_block_epoch", "read_warp_epoch"
            self._shadow = {name: np.zeros(self._cell_count, np.int32) for name in names}
        for access in self._log:
            (self._note_write if access.is_write else self._note_read)(
                self._by_cell(access), access.whole_warp
            )
        self._log.clear()

    def _by_cell(self, access: Access) -> _Cells:
        cells = (access.positions // 2)[:, None] + np.arange(max(1, access.size // 2))
        thread = access.threads[:, None].astype(np.int32)
        warp = thread // 32
        return _Cells(
            cells, thread, warp, access.block_epochs[thread // self._threads], access.warp_epochs[warp]
        )

    def _note_write(self, access: _Cells, whole_warp: bool) -> None:
        shadow, cells = self._shadow, access.cells
        shadow["writer"][cells] = access.thread
        shadow["write_block_epoch"][cells] = access.block_epoch
        shadow["write_warp_epoch"][cells] = access.warp_epoch

    def _note_read(self, access: _Cells, whole_warp: bool) -> None:
        """Who read a cell since the barrier: a thread, several lanes of a warp, or several warps."""
        shadow, cells = self._shadow, access.cells
        thread, warp = (np.broadcast_to(column, cells.shape) for column in (access.thread, access.warp))
        before = shadow["reader"][cells]
        recent = shadow["read_block_epoch"][cells] == access.block_epoch
        same_warp = shadow["reader_warp"][cells] == warp
        other_lane = (
            recent & same_warp & (before != thread) & (shadow["read_warp_epoch"][cells] == access.warp_epoch)
        )
        several_warps = recent & (~same_warp | (before == _SEVERAL_WARPS))
        reader = np.where(other_lane | whole_warp, _SEVERAL_LANES, thread)
        shadow["reader"][cells], shadow["reader_warp"][cells] = reader, warp
        shadow["read_block_epoch"][cells] = access.block_epoch
        shadow["read_warp_epoch"][cells] = access.warp_epoch
        # One instruction may read a cell for several threads, of which one is noted.
        shadow["reader"][cells[shadow["reader"][cells] != reader]] = _SEVERAL_LANES
        several_warps |= shadow["reader_warp"][cells] != warp
        shadow["reader"][cells[several_warps]] = _SEVERAL_WARPS

    def _check_read(self, access: Access) -> None:
        at, shadow = self._by_cell(access), self._shadow
        writer = shadow["writer"][at.cells]
        unordered = (writer // 32 != at.warp) | (shadow["write_warp_epoch"][at.cells] == at.warp_epoch)
        recent = shadow["write_block_epoch"][at.cells] == at.block_epoch
        race = recent & unordered & ((writer != at.thread) | access.whole_warp)
        if race.any():
            i, j = np.argwhere(race)[0]
            raise MemoryAccessError(
                f"shared race: {self._who(at.thread[i, 0])} reads what {self._who(writer[i, j])} wrote, "
                "with no barrier between"
            )

    def _check_write(self, access: Access) -> None:
        at, shadow = self._by_cell(access), self._shadow
        writer = shadow["writer"][at.cells]
        unordered = (writer // 32 != at.warp) | (shadow["write_warp_epoch"][at.cells] == at.warp_epoch)
        recent = shadow["write_block_epoch"][at.cells] == at.block_epoch
        self._report(at, recent & unordered & (writer != at.thread), writer, "wrote")

        reader = shadow["reader"][at.cells]
        other_warp = (reader == _SEVERAL_WARPS) | (shadow["reader_warp"][at.cells] != at.warp)
        unordered = other_warp | (shadow["read_warp_epoch"][at.cells] == at.warp_epoch)
        recent = shadow["read_block_epoch"][at.cells] == at.block_epoch
        self._report(at, recent & unordered & (reader != at.thread), reader, "read")

    def _report(self, at: _Cells, race: Array, other: Array, verb: str) -> None:
        if race.any():
            i, j = np.argwhere(race)[0]
            raise MemoryAccessError(
                f"shared race: {self._who(at.thread[i, 0])} writes what {self._who(other[i, j])} {verb}, "
                "with no barrier between"
            )

    def _who(self, thread: int) -> str:
        several = {_SEVERAL_LANES: "several lanes of a warp", _SEVERAL_WARPS: "several warps"}
        return several.get(int(thread)) or f"thread {int(thread) % self._threads}"
