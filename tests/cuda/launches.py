"""The public API with a function of the test in the place of the CUDA kernel."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from cuda_programs import SOURCES
from operators import FORWARD, attention_by, build_arguments
from programs import ROOT

from tools import emulation


class Memory(ctypes.Structure):
    """What a tensor occupies."""

    _fields_ = (("address", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("is_result", ctypes.c_int64))

    def array(self) -> np.ndarray:
        """Its bytes, to read and write."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.bytes).from_address(self.address))


class Launch(NamedTuple):
    """Valid while the kernel runs."""

    params: bytes  # a ForwardParams
    memory: list[Memory]

    @property
    def pointers(self) -> dict[int, np.ndarray]:
        """What the params point to, by their offset in bytes."""
        arrays = {memory.address: memory.array() for memory in self.memory}
        words = enumerate(memoryview(self.params).cast("Q"))
        return {8 * index: arrays[word] for index, word in words if word in arrays}


Kernel = Callable[[Launch], None]
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Memory), ctypes.c_int64
)


@functools.cache
def _library() -> ctypes.CDLL:
    path = ROOT / "build" / "emulation" / "launched.so"
    emulation.build([SOURCES / "launched.cpp"], path, **build_arguments())
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@contextmanager
def launched(kernel: Kernel) -> Iterator[None]:
    """All attention of CPU tensors calls `kernel`, which fills the results; what it raises is raised."""
    errors: list[Exception] = []

    @_Callback
    def call(params: int, size: int, memory: ctypes.Array, count: int) -> bool:
        try:
            kernel(Launch(ctypes.string_at(params, size), list(memory[:count])))
        except Exception as error:
            errors.append(error)
        return not errors

    _library().attn_ext_launched_by(call)
    try:
        with attention_by("attn_ext_launched", FORWARD):
            yield
    except RuntimeError:
        if errors:
            raise errors[0] from None
        raise
