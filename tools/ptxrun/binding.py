"""What an instruction's operands mean: functions that read and write them for the selected threads.

A file of instructions registers builders.  A builder gets a `Binding` and returns the function that executes
the instruction; it runs once, when the instruction is first reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import PtxError
from .memory import WINDOWS
from .parser import Instruction, Operand, Register
from .state import Selection, State
from .types import NUMPY, SIZES, UNSIGNED, Array

Execute = Callable[[Selection], None]
Read = Callable[[Selection], Array]
Write = Callable[[Array, Selection], None]


@dataclass(frozen=True)
class Opcode:
    """builder: of the instruction; together: all threads of a warp must come (PTX ISA, ".sync")."""

    builder: Callable[[Binding], Execute]
    together: bool


OPCODES: dict[str, Opcode] = {}


def builds(*names: str, together: bool = False) -> Callable:
    """Registers the builder of these opcodes."""

    def register(builder: Callable[[Binding], Execute]) -> Callable[[Binding], Execute]:
        OPCODES.update(dict.fromkeys(names, Opcode(builder, together)))
        return builder

    return register


class Binding:
    """An instruction of a running kernel: its modifiers, and access to its operands."""

    def __init__(self, state: State, instruction: Instruction) -> None:
        self.state, self.instruction = state, instruction
        self.opcode, *self.modifiers = instruction.modifiers
        self.operands = instruction.operands
        self.written: list[Register] = []

    @property
    def types(self) -> list[str]:
        return [modifier for modifier in self.modifiers if modifier in NUMPY]

    @property
    def type(self) -> str:
        return self.types[-1]

    @property
    def space(self) -> str:
        """The state space of an access; generic if none is named."""
        for modifier in self.modifiers:
            space = modifier.partition("__")[0]
            if space in ("param", "global", "shared", "local", "const"):
                return space
        return "generic"

    def one_of(self, *names: str) -> str:
        """The modifier that is among the names."""
        for modifier in self.modifiers:
            if modifier in names:
                return modifier
        raise self.unsupported()

    def unsupported(self) -> PtxError:
        return PtxError(f"not supported: {self.instruction.text}")

    def register(self, operand: Operand) -> Register | None:
        return self.instruction.scope.register(operand.value) if operand.kind == "name" else None

    def read(self, operand: Operand, kind: str) -> Read:
        """The values of an operand, as a type of the same size as the register or smaller."""
        dtype = NUMPY[kind]
        if operand.kind == "negated":
            positive = self.read(operand.value, kind)
            return lambda selection: ~positive(selection)
        register = self.register(operand)
        if register is None:
            return self._read_special(operand, dtype) or self._constant(operand, kind)
        registers, size = self.state.registers, SIZES[kind]
        same_size = SIZES[register.type] == size

        def read(selection: Selection) -> Array:
            try:
                value = registers[register]
            except KeyError:
                raise PtxError(f"register {register.name} is read but was never written") from None
            if selection is not None:
                value = value[selection]
            return value.view(dtype) if same_size else value.astype(UNSIGNED[size]).view(dtype)

        return read

    def _read_special(self, operand: Operand, dtype: type) -> Read | None:
        if operand.kind != "name" or not operand.value.startswith("%"):
            return None
        state, name = self.state, operand.value

        def read(selection: Selection) -> Array:
            value = state.special(name)
            return (value if selection is None else value[selection]).astype(dtype)

        return read

    def _constant(self, operand: Operand, kind: str) -> Read:
        dtype = np.dtype(NUMPY[kind])
        if operand.kind == "float":
            as_bits = {"b16": np.float16, "b32": np.float32, "b64": np.float64}.get(kind)
            value = as_bits(operand.value).view(dtype) if as_bits else dtype.type(operand.value)
        else:
            number = operand.value
            if operand.kind != "immediate":
                number = self.state.symbol(operand.value) + operand.offset
            if dtype.kind in "iu":
                value = np.array(number % 256**dtype.itemsize, UNSIGNED[dtype.itemsize]).view(dtype)[()]
            else:
                value = dtype.type(number)
        constant = np.asarray(value)
        return lambda selection: constant

    def broadcast(self, operand: Operand, kind: str) -> Read:
        """Like `read`, with a value for each selected thread even if all have the same."""
        read, state = self.read(operand, kind), self.state

        def broadcast(selection: Selection) -> Array:
            value = read(selection)
            return value if value.ndim else np.full(state.count(selection), value)

        return broadcast

    def write(self, operand: Operand, kind: str) -> Write:
        """Stores values of a type; a wider register gets them extended by their sign."""
        if operand.kind == "sink":
            return lambda value, selection: None
        register, state = self.register(operand), self.state
        if register is None:
            raise self.unsupported()
        self.written.append(register)
        stored = np.dtype(np.bool_ if register.type == "pred" else UNSIGNED[SIZES[register.type]])
        size, registers, letter = stored.itemsize, state.registers, "i" if kind[0] == "s" else "u"
        never_written = True if register.type == "pred" else np.iinfo(stored).max

        def write(value: Array, selection: Selection) -> None:
            value = np.asarray(value)
            if value.dtype.itemsize < size:
                value = value.view(f"{letter}{value.dtype.itemsize}").astype(f"{letter}{size}")
            elif value.dtype.itemsize > size:
                value = value.astype(f"u{size}")
            value = value.view(stored)
            if selection is not None:
                if register not in registers:
                    registers[register] = np.full(state.size, never_written, stored)
                registers[register][selection] = value
            elif value.ndim == 0:
                registers[register] = np.full(state.size, value)
            else:  # a view may be of another register
                registers[register] = value.copy()

        return write

    def compute(self, function: Callable[..., Array], *kinds: str, result: str | None = None) -> Execute:
        """Executes destination = function(sources): a type for each source, and of the result."""
        reads = [self.read(operand, kind) for operand, kind in zip(self.operands[1:], kinds, strict=False)]
        write = self.write(self.operands[0], result or kinds[0])
        return lambda selection: write(function(*[read(selection) for read in reads]), selection)

    def address(self, operand: Operand) -> Read:
        """Addresses of a memory operand, one for each selected thread."""
        base, offset = operand.value, np.int64(operand.offset)
        register = self.register(base)
        read = self.broadcast(base, "b64" if register is None or SIZES[register.type] == 8 else "b32")

        def address(selection: Selection) -> Array:
            return (read(selection).astype(np.int64) + offset).view(np.uint64)

        return address

    def shared_address(self, operand: Operand) -> Read:
        """Offsets in shared memory of an instruction's memory operand."""
        address = self.address(operand)
        if self.space != "generic":
            return address
        return lambda selection: address(selection) - np.uint64(WINDOWS["shared"])
