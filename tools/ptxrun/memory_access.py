"""Loads, stores and atomic operations (PTX ISA, "ld", "st", "atom", "red")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .binding import Binding, Execute, builds
from .errors import MemoryAccessError
from .memory import SPACE_OF_WINDOW, WINDOWS
from .parser import Operand
from .state import Selection, State
from .types import NUMPY, SIZES, UNSIGNED, Array


def _resolve(space: str, address: Array) -> tuple[str, Array]:
    """The state space of generic addresses, and the addresses in it."""
    if space == "const":  # constants lie in global memory here
        return "global", address
    if space != "generic":
        return space, address
    windows = np.unique(address >> np.uint64(40))
    space = SPACE_OF_WINDOW.get(int(windows[0]), "global")
    if len(windows) > 1 and any(int(window) in SPACE_OF_WINDOW for window in windows):
        spaces = [SPACE_OF_WINDOW.get(int(window), "no space") for window in windows]
        raise MemoryAccessError(f"one generic access to several state spaces: {', '.join(spaces)}")
    return space, address if space == "global" else address - np.uint64(WINDOWS[space])


def _parameter_words(state: State, address: Array, size: int) -> tuple[Array, Array]:
    if (address + np.uint64(size) > len(state.parameters)).any():
        raise MemoryAccessError("kernel parameter read out of bounds")
    space = np.frombuffer(state.parameters, np.uint8)
    words = space[address.astype(np.int64)[:, None] + np.arange(size)].view(
        f"V{size}" if size > 8 else f"u{size}"
    )
    return words[:, 0], np.arange(len(address))


def _words(
    state: State, space: str, address: Array, size: int, selection: Selection, is_write: bool
) -> tuple:
    """A memory in words of `size` bytes, and which of them are accessed."""
    threads = state.threads(selection)
    if state.statistics and space in ("global", "shared"):
        state.statistics.access(space, address, size, threads)
    if space == "global":
        return state.memory.words(address, size)
    if space == "local":
        return state.local.words(address, size, threads)
    if space == "param":
        return _parameter_words(state, address, size)
    positions = state.shared.positions(address, size, threads)
    (state.shared.check_write if is_write else state.shared.check_read)(positions, size, threads)
    return state.shared.words[size], positions // size


def _parts(operand: Operand) -> list[Operand]:
    return operand.value if operand.kind == "vector" else [operand]


@builds("ld", "ldu")
def build_load(binding: Binding) -> Execute:
    state, kind = binding.state, binding.type
    space, address = binding.space, binding.address(binding.operands[1])
    writes = [binding.write(operand, kind) for operand in _parts(binding.operands[0])]
    size = SIZES[kind] * len(writes)

    def execute(selection: Selection) -> None:
        memory, at = _words(state, *_resolve(space, address(selection)), size, selection, is_write=False)
        parts = memory[at].view(NUMPY[kind]).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(parts[:, i], selection)

    return execute


@builds("st")
def build_store(binding: Binding) -> Execute:
    state, kind = binding.state, binding.type
    space, unsigned = binding.space, UNSIGNED[SIZES[kind]]
    if space == "param":  # of a call
        raise binding.unsupported()
    address = binding.address(binding.operands[0])
    reads = [binding.read(operand, kind) for operand in _parts(binding.operands[1])]
    size = SIZES[kind] * len(reads)

    def execute(selection: Selection) -> None:
        memory, at = _words(state, *_resolve(space, address(selection)), size, selection, is_write=True)
        values = np.empty((len(at), len(reads)), unsigned)
        for i, read in enumerate(reads):
            values[:, i] = read(selection).view(unsigned)
        memory[at] = values.view(memory.dtype)[:, 0]

    return execute


_ATOMIC: dict[str, Callable] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "inc": lambda old, value: type(old)(0) if old >= value else old + type(old)(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - type(old)(1),
    "cas": lambda old, expected, value: value if old == expected else old,
}


@builds("atom", "red")
def build_atomic(binding: Binding) -> Execute:
    """One thread after another, in an order left to chance."""
    state, kind, space = binding.state, binding.type, binding.space
    function, dtype, size = _ATOMIC[binding.one_of(*_ATOMIC)], NUMPY[kind], SIZES[kind]
    operands = binding.operands if binding.opcode == "red" else binding.operands[1:]
    address = binding.address(operands[0])
    reads = [binding.broadcast(operand, kind) for operand in operands[1:]]
    write = binding.write(binding.operands[0], kind) if binding.opcode == "atom" else None

    def execute(selection: Selection) -> None:
        where, places = _resolve(space, address(selection))
        if where == "shared":
            positions = state.shared.positions(places, size, state.threads(selection))
            state.shared.check_atomic(positions, size)
            memory, at = state.shared.words[size], positions // size
        else:
            memory, at = state.memory.words(places, size)
        memory, values = memory.view(dtype), [read(selection) for read in reads]
        before = np.empty(len(at), dtype)
        for i in state.random.permutation(len(at)):
            before[i] = memory[at[i]]
            memory[at[i]] = function(before[i], *(value[i] for value in values))
        if write:
            write(before, selection)

    return execute


@builds("membar", "fence", "prefetch", "prefetchu", "nanosleep", "discard")
def build_nothing(binding: Binding) -> Execute:
    """Accesses happen in order here, and caches do not exist."""
    return lambda selection: None
