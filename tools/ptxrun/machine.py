"""A kernel and its launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .arguments import parameter_offsets, place_arguments
from .errors import PtxError
from .memory import Global
from .parser import Instruction, Kernel, Module
from .scheduler import Scheduler
from .state import Sizes, State
from .statistics import Statistics

_MAX_THREADS = 1024


class Machine:
    """A kernel, ready to be launched any number of times.

    Args:
        module: what `parse` gives.
        entry: name of the kernel, or a part that only its name has; may be left out if there is one kernel.
        schedule: "together": all threads in step; "warps": warps apart, in random order.
        blocks_at_once: how many blocks run at a time.
        seed: of the order of warps and of atomic operations.
        statistics: count bank conflicts and sectors.

    Raises:
        ValueError: no such kernel, or several.
    """

    def __init__(
        self,
        module: Module,
        entry: str = "",
        *,
        schedule: Literal["together", "warps"] = "together",
        blocks_at_once: int = 32,
        seed: int = 0,
        statistics: bool = False,
    ) -> None:
        if schedule not in ("together", "warps"):
            raise ValueError(f"schedule must be 'together' or 'warps'; got {schedule!r}")
        self.module, self.kernel = module, _kernel(module, entry)
        self.statistics = Statistics() if statistics else None
        symbols = _global_memory(module)[1] | parameter_offsets(self.kernel)
        self._state = State(self.kernel, module, symbols, np.random.default_rng(seed), self.statistics)
        self._scheduler = Scheduler(self._state, warps_apart=schedule == "warps")
        self._blocks_at_once = blocks_at_once

    @property
    def counters(self) -> Counter[str]:
        """How many instructions of some kinds all launches executed, by warp; cp.async by thread."""
        return self._state.counters

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        """Runs the kernel to its end.

        Args:
            grid: blocks in x, and in y and z if they are not 1.
            block: threads, likewise.
            arguments: in the order of the parameters: arrays, read and written, for pointers;
                numbers; a `Struct` for a struct.
            shared_bytes: dynamic shared memory.

        Raises:
            PtxError: the kernel did what it must not; arrays keep what they held.
            TypeError, ValueError: arguments that are not the kernel's.
        """
        grid, block = _sizes("grid", grid), _sizes("block", block)
        most = self.kernel.max_threads or _MAX_THREADS
        if np.prod(block) > most:
            raise ValueError(f"block must have at most {most} threads; got {np.prod(block)}")
        memory, _ = _global_memory(self.module)
        parameters = place_arguments(self.kernel, arguments, memory)
        memory.copy_in()
        self._state.launch(grid, block, shared_bytes, memory, parameters)
        blocks = np.arange(np.prod(grid))
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), self._blocks_at_once):
                try:
                    self._scheduler.run(blocks[first : first + self._blocks_at_once])
                except PtxError as error:
                    raise PtxError(f"{error}\n  {self._where(self._scheduler.instruction)}") from None
        memory.copy_out()

    def _where(self, instruction: Instruction) -> str:
        """The instruction, its source line, and where that was inlined (compile with -lineinfo)."""
        source, files = instruction.source, self.module.files
        lines = [f"{files.get(source[i], '?')}:{source[i + 1]}" for i in range(0, len(source), 2)]
        return f"at PTX line {instruction.line} ({' < '.join(lines) or 'no line info'}): {instruction.text}"


def _kernel(module: Module, entry: str) -> Kernel:
    names = [entry] if entry in module.kernels else [name for name in module.kernels if entry in name]
    if len(names) != 1:
        raise ValueError(f"entry must name one of the kernels {sorted(module.kernels)}; got {entry!r}")
    return module.kernels[names[0]]


def _global_memory(module: Module) -> tuple[Global, dict[str, int]]:
    """The module's variables with their first values, and their addresses, the same each time."""
    memory, addresses = Global(), {}
    for variable in module.globals:
        initial = np.frombuffer(variable.initial, np.uint8)
        addresses[variable.name] = memory.add(initial, variable.name)
    return memory, addresses


def _sizes(name: str, sizes: int | Sequence[int]) -> Sizes:
    sizes = tuple(int(size) for size in np.atleast_1d(sizes))
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"{name} must be one to three positive numbers; got {sizes}")
    return (*sizes, 1, 1)[:3]
