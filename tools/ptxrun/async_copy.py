"""cp.async: copies from global to shared memory that arrive when they are waited for, as late as they may.

PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy", non-bulk copies and their groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .binding import Binding, Execute, builds
from .errors import PtxError
from .state import Selection, State
from .types import Array


@dataclass
class PendingCopy:
    """By thread: `count` bytes from `source` and zeros up to `size` go to `positions`; and their group."""

    threads: Array
    groups: Array
    positions: Array
    source: Array
    count: Array
    size: int

    def select(self, which: Array) -> PendingCopy:
        columns = (self.threads, self.groups, self.positions, self.source, self.count)
        return PendingCopy(*(column[which] for column in columns), self.size)


@builds("cp")
def build_cp(binding: Binding) -> Execute:
    state, modifiers = binding.state, binding.modifiers
    if modifiers[0] != "async" or "bulk" in modifiers or "mbarrier" in modifiers:
        raise binding.unsupported()
    if "commit_group" in modifiers:
        return lambda selection: _commit(state, selection)
    if "wait_group" in modifiers:
        pending = binding.operands[0].value
        return lambda selection: _wait(state, selection, pending)
    if "wait_all" in modifiers:
        return lambda selection: _wait(state, selection, None)
    return _build_copy(binding)


def _build_copy(binding: Binding) -> Execute:
    state = binding.state
    to, source = binding.shared_address(binding.operands[0]), binding.address(binding.operands[1])
    size = binding.operands[2].value
    extra = binding.operands[3 : -1 if "L2__cache_hint" in binding.modifiers else None]
    register = binding.register(extra[0]) if extra else None
    if extra and register is not None and register.type == "pred":
        raise binding.unsupported()
    read_count = binding.broadcast(extra[0], "u32") if extra else None

    def execute(selection: Selection) -> None:
        threads = state.threads(selection)
        positions = state.shared.positions(to(selection), size, threads)
        count = np.full(len(threads), size)
        if read_count:
            count = read_count(selection).astype(np.int64)
            if (count > size).any():
                raise PtxError(f"cp.async of {size} bytes gets a source size of {int(count.max())}")
        copy = PendingCopy(threads, state.copy_groups[threads], positions, source(selection), count, size)
        _check_source(state, copy)
        state.shared.check_write(positions, size, threads, in_flight=True)
        state.shared.words[size].view(np.uint8).reshape(-1, size)[positions // size] = (
            0xFF  # the old bytes are gone
        )
        if state.statistics:
            state.statistics.access("shared", positions, size, threads)
            state.statistics.access("global", copy.source[count > 0], size, threads[count > 0])
        state.copies.append(copy)
        state.counters["cp.async"] += len(threads)

    return execute


def _check_source(state: State, copy: PendingCopy) -> None:
    for count in np.unique(copy.count[copy.count > 0]):
        state.memory.offsets(copy.source[copy.count == count], int(count), copy.size)


def _commit(state: State, selection: Selection) -> None:
    state.copy_groups[state.threads(selection)] += 1


def _wait(state: State, selection: Selection, pending: int | None) -> None:
    """Carries out the copies of all groups but the last `pending`; None: of those without a group too."""
    threads = state.threads(selection)
    last = np.full(state.size, -1, np.int64)
    last[threads] = np.iinfo(np.int64).max if pending is None else state.copy_groups[threads] - pending
    later = []
    for copy in state.copies:
        done = copy.groups < last[copy.threads]
        if done.all():
            _carry_out(state, copy)
            continue
        if done.any():
            _carry_out(state, copy.select(done))
        later.append(copy.select(~done))
    state.copies = later


def _carry_out(state: State, copy: PendingCopy) -> None:
    data = np.zeros((len(copy.threads), copy.size), np.uint8)
    for count in np.unique(copy.count[copy.count > 0]):
        which = copy.count == count
        start = state.memory.offsets(copy.source[which], int(count), copy.size)
        data[which, :count] = state.memory.bytes[start[:, None] + np.arange(count)]
    state.shared.words[copy.size][copy.positions // copy.size] = data.view(
        state.shared.words[copy.size].dtype
    )[:, 0]
    state.shared.arrive(copy.positions, copy.size, copy.threads)
