"""The threads of some blocks: their registers, their memories, what they have in flight.

Threads are numbered block by block; blocks are padded to whole warps.  A selection names threads by their
sorted numbers; None selects all.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .memory import Global, Local
from .parser import Kernel, Module, Register, Variable
from .shared import BASE, Shared
from .types import Array

if TYPE_CHECKING:
    from .async_copy import PendingCopy
    from .statistics import Statistics

Selection = np.ndarray | None
Sizes = tuple[int, int, int]  # of a grid or a block
WARP = 32


class State:
    """What instructions read and write.  `launch` sets up a launch, `start` puts its next blocks in.

    Args:
        kernel, module: the program.
        symbols: addresses of the module's variables, offsets of the kernel's parameters.
        random: decides what a GPU leaves open.
        statistics: where accesses are counted, if they are.
    """

    def __init__(
        self,
        kernel: Kernel,
        module: Module,
        symbols: dict[str, int],
        random: np.random.Generator,
        statistics: Statistics | None,
    ) -> None:
        self.kernel, self.symbols, self.random, self.statistics = kernel, symbols, random, statistics
        self._static_shared = self._place_shared(module, kernel)
        self._local_size = self._place(kernel.local, 0)
        self.counters: Counter[str] = Counter()
        self.registers: dict[Register, Array] = {}

    def _place(self, variables: list[Variable], start: int) -> int:
        for variable in variables:
            self.symbols[variable.name] = start = -(-start // variable.align) * variable.align
            start += variable.size
        return start

    def _place_shared(self, module: Module, kernel: Kernel) -> int:
        top = self._place(module.shared + kernel.shared, BASE)
        for variable in module.dynamic_shared:
            top = -(-top // variable.align) * variable.align
        self.symbols.update({variable.name: top for variable in module.dynamic_shared})
        return top - BASE

    def launch(
        self, grid: Sizes, block: Sizes, dynamic_shared: int, memory: Global, parameters: bytes
    ) -> None:
        """A launch, with its arguments in global memory and in the parameter space."""
        self.grid, self.block, self._dynamic_shared = grid, block, dynamic_shared
        self.memory, self.parameters = memory, parameters
        self.threads_of_block = block[0] * block[1] * block[2]
        self.block_stride = -(-self.threads_of_block // WARP) * WARP
        self.steps = 0

    def start(self, blocks: Array) -> None:
        """New threads, of the blocks with these numbers."""
        self.size = len(blocks) * self.block_stride
        self.everyone = np.arange(self.size)
        self.thread_of_block = self.everyone % self.block_stride
        self.block_number = blocks[self.everyone // self.block_stride]
        self.alive = self.thread_of_block < self.threads_of_block
        self.registers.clear()
        self._special: dict[str, Array] = {}
        self.shared = Shared(len(blocks), self._static_shared + self._dynamic_shared, self.block_stride)
        self.local = Local(self.size, self._local_size)
        self.carry = np.zeros(self.size, bool)  # CC.CF of add.cc
        self.copies: list[PendingCopy] = []  # cp.async
        self.copy_groups = np.zeros(self.size, np.int64)  # that each thread has committed

    def count(self, selection: Selection) -> int:
        return self.size if selection is None else len(selection)

    def threads(self, selection: Selection) -> Array:
        return self.everyone if selection is None else selection

    def blocks(self, selection: Selection) -> Array:
        """The blocks among those that run now in which selected threads are."""
        return np.unique(self.threads(selection) // self.block_stride)

    def symbol(self, name: str) -> int:
        if name not in self.symbols:
            raise PtxError(f"there is no variable {name}")
        return self.symbols[name]

    def special(self, name: str) -> Array:
        """A special register of every thread (PTX ISA, "Special Registers")."""
        if name in ("%clock", "%clock64", "%globaltimer"):
            return np.full(self.size, self.steps)
        if name not in self._special:
            self._special[name] = self._special_value(name)
        return self._special[name]

    def _special_value(self, name: str) -> Array:
        base, _, axis = name.partition(".")
        if base in ("%tid", "%ctaid"):
            number = self.thread_of_block if base == "%tid" else self.block_number
            x, y, _ = self.block if base == "%tid" else self.grid
            return {"x": number % x, "y": number // x % y, "z": number // (x * y)}[axis]
        if base in ("%ntid", "%nctaid"):
            sizes = self.block if base == "%ntid" else self.grid
            return np.full(self.size, sizes["xyz".index(axis)])
        lane = self.thread_of_block % WARP
        bit = np.uint64(1) << lane.astype(np.uint64)
        one = np.uint64(1)
        values = {
            "%laneid": lane,
            "%warpid": self.thread_of_block // WARP,
            "%nwarpid": np.full(self.size, self.block_stride // WARP),
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - one,
            "%lanemask_le": bit * np.uint64(2) - one,
            "%lanemask_gt": ~(bit * np.uint64(2) - one),
            "%lanemask_ge": ~(bit - one),
            "%dynamic_smem_size": np.full(self.size, self._dynamic_shared),
            "%cluster_ctarank": np.zeros(self.size, np.int64),
            "%cluster_nctarank": np.ones(self.size, np.int64),
        }
        if name not in values:
            raise PtxError(f"special register {name} is not supported")
        return values[name]
