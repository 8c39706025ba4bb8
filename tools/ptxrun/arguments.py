"""Kernel arguments: what a launch puts into the parameter space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Global
from .parser import Kernel
from .types import NUMPY, Array

_POINTERS = ("u64", "b64", "s64")


@dataclass
class Struct:
    """A struct passed by value.

    Args:
        data: its bytes, those of pointers ignored.
        pointers: by offset in the struct, the array a pointer points to, or the array and an offset in bytes.
    """

    data: bytes
    pointers: Mapping[int, Array | tuple[Array, int]] = field(default_factory=dict)

    def place(self, name: str, memory: Global) -> bytes:
        """The bytes with the pointers in them."""
        data = bytearray(self.data)
        for at, target in self.pointers.items():
            array, offset = target if isinstance(target, tuple) else (target, 0)
            if not 0 <= at <= len(data) - 8:
                raise ValueError(f"pointers of {name} must lie in its {len(data)} bytes; got offset {at}")
            data[at : at + 8] = (memory.add(array, f"{name}+{at}") + offset).to_bytes(8, "little")
        return bytes(data)


def parameter_offsets(kernel: Kernel) -> dict[str, int]:
    """Where each parameter lies in the parameter space."""
    offsets, end = {}, 0
    for parameter in kernel.parameters:
        offsets[parameter.name] = start = -(-end // parameter.align) * parameter.align
        end = start + parameter.size
    return offsets


def place_arguments(kernel: Kernel, arguments: Sequence[Any], memory: Global) -> bytes:
    """The parameter space; arrays that arguments point to go into memory.

    Raises:
        TypeError, ValueError: arguments that are not those of the kernel.
    """
    if len(arguments) != len(kernel.parameters):
        types = [parameter.type for parameter in kernel.parameters]
        raise ValueError(f"{kernel.name} must get {len(types)} arguments, {types}; got {len(arguments)}")
    space, offsets = bytearray(), parameter_offsets(kernel).values()
    for i, (parameter, offset) in enumerate(zip(kernel.parameters, offsets, strict=True)):
        data = _bytes_of(arguments[i], parameter.type, f"argument {i}", memory)
        if len(data) != parameter.size:
            raise ValueError(
                f"argument {i} of {kernel.name} must have {parameter.size} bytes; got {len(data)}"
            )
        space += bytes(offset - len(space)) + data
    return bytes(space)


def _bytes_of(argument: Any, kind: str, name: str, memory: Global) -> bytes:
    if isinstance(argument, Struct):
        return argument.place(name, memory)
    if isinstance(argument, np.ndarray) and argument.ndim:
        if kind not in _POINTERS:
            raise TypeError(f"{name} must be a {kind}; got an array")
        return memory.add(argument, name).to_bytes(8, "little")
    if kind == "b8":
        raise TypeError(f"{name} must be a Struct; got {type(argument).__name__}")
    return np.asarray(argument).astype(NUMPY[kind]).tobytes()
