"""Which threads run next, and where: branches, barriers, instructions of whole warps.

Threads that diverge meet again where the code does: always those with the lowest program counter run.
Barriers and instructions of whole warps hold threads back until all whom they concern have come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from .barrier import Barrier
from .binding import Binding, Execute
from .errors import PtxError
from .instructions import OPCODES
from .parser import Instruction, Register
from .state import WARP, Selection, State
from .types import Array

_MAX_STEPS = 50_000_000
_ALL_LANES = np.uint32(0xFFFFFFFF)
_TAKES_MASK = ("shfl", "vote", "redux")  # as the last operand


class _Group:
    """Threads that run together: `ready` at an instruction, or `waiting` at it for lanes of their warps."""

    def __init__(self, threads: Array) -> None:
        self.threads = threads
        self.ready: dict[int, Array] = {0: threads}
        self.waiting: dict[int, Array] = {}

    def resume(self, at: int, threads: Array) -> None:
        _add(self.ready, at, threads)


def _add(table: dict[int, Array], at: int, threads: Array) -> None:
    if len(threads):
        table[at] = np.union1d(table[at], threads) if at in table else threads


class Scheduler:
    """Executes the code for the threads of a state.

    Args:
        state: of the launch.
        warps_apart: a group for each warp, which take turns at random; else one for all threads.
    """

    def __init__(self, state: State, warps_apart: bool) -> None:
        self._state, self._code, self._warps_apart = state, state.kernel.code, warps_apart
        self._execute: list[Execute | None] = [None] * len(self._code)
        self._written: dict[int, list[Register]] = {}
        self._masks: dict[int, Callable[[Selection], Array]] = {}
        self._control = [self._control_of(instruction) for instruction in self._code]
        self._barrier = Barrier(state)
        self.instruction = self._code[0]  # the one that runs

    def run(self, blocks: Array) -> None:
        """Runs the blocks with these numbers to their end."""
        state = self._state
        state.start(blocks)
        self._barrier.start()
        live = np.flatnonzero(state.alive)
        warps = np.flatnonzero(np.diff(live // WARP)) + 1 if self._warps_apart else []
        self._groups = [_Group(threads) for threads in np.split(live, warps)]
        self._group_of = {
            warp: group for group in self._groups for warp in np.unique(group.threads // WARP).tolist()
        }
        while ready := [group for group in self._groups if group.ready]:
            self._advance(ready[0] if len(ready) == 1 else ready[state.random.integers(len(ready))])
        if state.alive.any():
            raise self._deadlock()
        if state.copies:
            raise PtxError("the kernel ends with cp.async copies nobody waited for")

    def _control_of(self, instruction: Instruction) -> Callable | None:
        """What decides who goes on where; None: everyone goes on with the next instruction."""
        opcode, modifiers = instruction.opcode, instruction.modifiers
        if opcode in ("bar", "barrier"):
            return self._together if "warp" in modifiers else self._meet
        if opcode in OPCODES and OPCODES[opcode].together:
            return self._together
        return {"bra": self._branch, "ret": self._end, "exit": self._end, "trap": self._trap}.get(opcode)

    def _advance(self, group: _Group) -> None:
        """Runs the threads with the lowest program counter until they block, end, or meet others."""
        state, everyone = self._state, self._state.size
        at = min(group.ready)
        threads = group.ready.pop(at)
        while at < len(self._code):
            self.instruction = instruction = self._code[at]
            state.steps += 1
            if state.steps > _MAX_STEPS:
                raise PtxError(f"still running after {_MAX_STEPS} instructions")
            if state.statistics:
                state.statistics.instruction = instruction
            chosen = self._guarded(instruction, threads) if instruction.guard else threads
            control = self._control[at]
            if control is None or not len(chosen):
                if len(chosen):
                    (self._execute[at] or self._bind(at))(None if len(chosen) == everyone else chosen)
                at += 1
            else:
                diverge = len(chosen) < len(threads)
                if diverge:
                    group.resume(at + 1, np.setdiff1d(threads, chosen, assume_unique=True))
                at, threads = control(group, at, chosen)
                if diverge or not len(threads):
                    group.resume(at, threads)
                    return
            if group.ready and at >= min(group.ready):
                group.resume(at, threads)
                return
        self._finish(threads)

    def _guarded(self, instruction: Instruction, threads: Array) -> Array:
        """Those of the threads whose predicate lets them execute the instruction."""
        register, negated = instruction.guard
        if register not in self._state.registers:
            raise PtxError(f"predicate {register.name} is read but was never written")
        holds = self._state.registers[register][threads]
        return threads[~holds if negated else holds]

    def _bind(self, at: int) -> Execute:
        """What executes an instruction; built when it is first reached."""
        binding = Binding(self._state, self._code[at])
        if binding.opcode not in OPCODES:
            raise binding.unsupported()
        try:
            execute = OPCODES[binding.opcode].builder(binding)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise PtxError(f"{binding.unsupported()} ({error!r})") from error
        self._execute[at], self._written[at] = execute, binding.written
        return execute

    # Who goes on where after an instruction: (program counter, threads)

    def _branch(self, group: _Group, at: int, threads: Array) -> tuple[int, Array]:
        binding = Binding(self._state, self._code[at])
        return self._code[at].scope.target(binding.operands[0].value), threads

    def _end(self, group: _Group, at: int, threads: Array) -> tuple[int, Array]:
        self._finish(threads)
        return at, threads[:0]

    def _trap(self, group: _Group, at: int, threads: Array) -> tuple[int, Array]:
        raise PtxError("the kernel traps")

    def _meet(self, group: _Group, at: int, threads: Array) -> tuple[int, Array]:
        """A barrier of the block."""
        if self._barrier.arrive(self._code[at], at, threads):
            return at + 1, threads
        for block in self._state.blocks(threads):
            self._release(int(block))
        return at, threads[:0]

    def _release(self, block: int) -> None:
        for at, threads in self._barrier.release(block):
            for group in {self._group_of[warp] for warp in np.unique(threads // WARP).tolist()}:
                group.resume(at, np.intersect1d(threads, group.threads, assume_unique=True))

    def _finish(self, threads: Array) -> None:
        self._state.alive[threads] = False
        for block in self._state.blocks(threads):
            self._release(int(block))

    def _together(self, group: _Group, at: int, threads: Array) -> tuple[int, Array]:
        """An instruction for which lanes wait for each other."""
        state = self._state
        if at in group.waiting:
            threads = np.union1d(threads, group.waiting.pop(at))
        missing = self._lanes_missing(at, threads)
        if missing is not None:
            _add(group.waiting, at, threads[missing])
            threads = threads[~missing]
            if not len(threads):
                return at, threads
        if self._code[at].opcode in ("bar", "barrier"):
            state.shared.races.warp_barrier(np.unique(threads // WARP))
        elif len(threads) == state.size:
            (self._execute[at] or self._bind(at))(None)
        else:
            self._execute_for_some(self._execute[at] or self._bind(at), at, threads)
        return at + 1, threads

    def _execute_for_some(self, execute: Execute, at: int, threads: Array) -> None:
        """Executes for whole warps, and keeps the results of the lanes that came."""
        warps = np.unique(threads // WARP)
        if len(threads) == len(warps) * WARP:
            execute(threads)
            return
        registers = self._state.registers
        lanes = (warps[:, None] * WARP + np.arange(WARP)).reshape(-1)
        absent = np.setdiff1d(lanes, threads, assume_unique=True)
        before = {
            register: registers[register][absent] for register in self._written[at] if register in registers
        }
        execute(lanes)
        for register, values in before.items():
            registers[register][absent] = values

    def _lanes_missing(self, at: int, threads: Array) -> Array | None:
        """Of each thread, whether a lane of its mask has not come; None: all have."""
        state = self._state
        if at not in self._masks:
            self._masks[at] = self._mask_reader(at)
        masks = np.broadcast_to(self._masks[at](threads), len(threads))
        if len(threads) == state.size and (masks == _ALL_LANES).all():
            return None
        warp, bit = threads // WARP, np.uint32(1) << (threads % WARP).astype(np.uint32)
        if ((masks & bit) == 0).any():
            raise PtxError("a thread is not in the membermask of its own instruction")
        present, exist = np.zeros((2, state.size // WARP), np.uint32)
        np.bitwise_or.at(present, warp, bit)
        real = np.flatnonzero(state.thread_of_block < state.threads_of_block)
        np.bitwise_or.at(exist, real // WARP, np.uint32(1) << (real % WARP).astype(np.uint32))
        missing = (masks & exist[warp] & ~present[warp]) != 0
        return missing if missing.any() else None

    def _mask_reader(self, at: int) -> Callable[[Selection], Array]:
        binding = Binding(self._state, self._code[at])
        if binding.opcode in _TAKES_MASK:
            return binding.read(binding.operands[-1], "u32")
        if "warp" in binding.modifiers:
            return binding.read(binding.operands[0], "u32")
        return lambda selection: _ALL_LANES

    def _deadlock(self) -> PtxError:
        places: Counter[int] = Counter(self._barrier.places())
        for group in self._groups:
            for at, threads in group.waiting.items():
                places[at] += len(threads)
        waits = [
            f"{n} threads wait at PTX line {self._code[at].line}: {self._code[at].text}"
            for at, n in places.items()
        ]
        return PtxError(f"deadlock: {'; '.join(waits)}")
