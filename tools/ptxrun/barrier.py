"""Barriers of a block (PTX ISA, "bar", "barrier"): `sync` and `red`, of all threads or of so many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .binding import Binding, Read, Write
from .parser import Instruction
from .state import State
from .types import Array

_REDUCTIONS = {"or": np.any, "and": np.all, "popc": np.count_nonzero}


@dataclass
class _Operands:
    number: Read
    expected: Read | None  # how many threads it is for; None: all
    result: Write | None = None
    predicate: Read | None = None
    reduction: str = ""


class Barrier:
    """The threads of each block that wait at its barriers."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._operands: dict[int, _Operands] = {}

    def start(self) -> None:
        """New threads, none of which waits."""
        self._number = np.full(self._state.size, -1)  # of the barrier a thread waits at
        self._expected = np.zeros(self._state.size, np.int64)  # 0: all threads of the block
        self._at = np.zeros(self._state.size, np.int64)  # the instruction it waits at
        self._predicate = np.zeros(self._state.size, bool)

    def arrive(self, instruction: Instruction, at: int, threads: Array) -> bool:
        """Threads come to a barrier; True if they are all there are, and go on at once."""
        state = self._state
        if at not in self._operands:
            self._operands[at] = self._bind(instruction)
        operands = self._operands[at]
        number = np.broadcast_to(operands.number(threads), len(threads)).astype(np.int64)
        all_come = len(threads) == np.count_nonzero(state.alive) and (number == number[0]).all()
        state.counters["barrier"] += len(np.unique(threads // 32))
        if all_come and operands.expected is None and operands.result is None:
            state.shared.barrier()
            return True
        self._number[threads], self._at[threads] = number, at
        self._expected[threads] = operands.expected(threads) if operands.expected else 0
        self._predicate[threads] = operands.predicate(threads) if operands.predicate else False
        return False

    def release(self, block: int) -> Iterator[tuple[int, Array]]:
        """Threads of a block that need wait no longer, and where they go on."""
        state, first = self._state, block * self._state.block_stride
        alive = first + np.flatnonzero(state.alive[first : first + state.block_stride])
        for number in np.unique(self._number[alive]):
            waiting = alive[self._number[alive] == number]
            expected = int(self._expected[waiting].max()) or len(alive)
            if number < 0 or len(waiting) < expected:
                continue
            if expected < len(alive):
                state.shared.races.disable()  # it orders some warps, which the look for races does not model
            else:
                state.shared.barrier(block)
            self._number[waiting] = -1
            for at in np.unique(self._at[waiting]):
                threads = waiting[self._at[waiting] == at]
                self._write_reduction(self._operands[int(at)], waiting, threads)
                yield int(at) + 1, threads

    def places(self) -> list[int]:
        """The instruction at which each waiting thread is."""
        return self._at[self._number >= 0].tolist()

    def _write_reduction(self, operands: _Operands, waiting: Array, threads: Array) -> None:
        if operands.result:
            result = _REDUCTIONS[operands.reduction](self._predicate[waiting])
            dtype = np.uint32 if operands.reduction == "popc" else np.bool_
            operands.result(np.full(len(threads), result, dtype), threads)

    def _bind(self, instruction: Instruction) -> _Operands:
        binding = Binding(self._state, instruction)
        operands = binding.operands
        if "arrive" in binding.modifiers:
            raise binding.unsupported()
        reduces = "red" in binding.modifiers
        numbers = operands[1:-1] if reduces else operands
        number = binding.read(numbers[0], "u32")
        expected = binding.read(numbers[1], "u32") if len(numbers) > 1 else None
        if not reduces:
            return _Operands(number, expected)
        reduction = binding.one_of(*_REDUCTIONS)
        result = binding.write(operands[0], "u32" if reduction == "popc" else "pred")
        return _Operands(number, expected, result, binding.read(operands[-1], "pred"), reduction)
