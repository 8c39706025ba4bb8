"""`attention_decode` with functions of the test in the place of the CUDA kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from cuda_programs import SOURCES
from launches import Memory
from operators import build_arguments, decode_by
from programs import ROOT

from tools import emulation


class Grid(ctypes.Structure):
    """Blocks of each kernel."""

    _fields_ = (("append", ctypes.c_int64), ("decode", ctypes.c_int64), ("merge", ctypes.c_int64))


class DecodeLaunch(NamedTuple):
    """Valid while the kernels run."""

    params: bytes  # a DeviceDecodeParams
    memory: list[Memory]
    append: int
    decode: int
    merge: int

    @property
    def pointers(self) -> dict[int, np.ndarray]:
        """What the params point to, by their offset in bytes; pointers may lie within a tensor."""
        found = {}
        for index, word in enumerate(memoryview(self.params).cast("Q")):
            for memory in self.memory:
                if memory.address <= word < memory.address + memory.bytes:
                    found[8 * index] = memory.array()[word - memory.address :]
        return found


Kernels = Callable[[DecodeLaunch], None]
_Callback = ctypes.CFUNCTYPE(
    *(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Memory), ctypes.c_int64),
    ctypes.POINTER(Grid),
)


@functools.cache
def _library() -> ctypes.CDLL:
    path = ROOT / "build" / "emulation" / "launched_decode.so"
    emulation.build([SOURCES / "launched_decode.cpp"], path, **build_arguments())
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@contextmanager
def decode_launched(kernels: Kernels) -> Iterator[None]:
    """Decoding of CPU tensors calls `kernels`, which fill the results; what they raise is raised."""
    errors: list[Exception] = []

    @_Callback
    def call(params: int, size: int, memory: ctypes.Array, count: int, grid: ctypes.Array) -> bool:
        blocks = grid[0].append, grid[0].decode, grid[0].merge
        try:
            kernels(DecodeLaunch(ctypes.string_at(params, size), list(memory[:count]), *blocks))
        except Exception as error:
            errors.append(error)
        return not errors

    _library().attn_ext_launched_decode_by(call)
    try:
        with decode_by("attn_ext_launched_decode"):
            yield
    except Exception:  # what it makes of the operator's error
        if errors:
            raise errors[0] from None
        raise
