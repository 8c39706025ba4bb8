"""Executes the PTX that nvcc emits, on the CPU with numpy: no GPU, no driver.

    machine = Machine(parse(text), "kernel")
    machine.launch(grid, block, [array, 3, Struct(params, {0: array})], shared_bytes)

All threads of several blocks run in step, a numpy operation an instruction.  What a GPU would answer with
wrong numbers is a `PtxError` that names the instruction and its source line: accesses out of bounds or
misaligned, races in shared memory, reads of what was never written or whose copy nobody waited for,
deadlocks.  Layouts of fragments, shuffles and copies are written from the PTX ISA text.

Not modelled: calls, wgmma, bulk copies, clusters, races in global memory, how tensor cores round (sums are
exact here, rounded once), the error of approximate instructions, time.
"""

from .arguments import Struct
from .errors import PtxError
from .machine import Machine
from .parser import Module, parse

__all__ = ["Machine", "Module", "PtxError", "Struct", "parse"]
