"""The public API on the CUDA kernels as nvcc compiles them: their PTX, interpreted on the CPU.

The selector and the launches are the emulated ones: only what a launch runs is another.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cuda_programs import require_toolkit
from emulated import A100, SM_75, emulated
from programs import ROOT, run

from tools import cuda_build
from tools.emulation import Emulator
from tools.ptxrun import Machine, Struct, parse

FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-lineinfo", f"-I{ROOT / 'csrc'}")
DEVICES = {"sm_75": SM_75, "sm_80": A100}

_Launcher = ctypes.CFUNCTYPE(
    *(ctypes.c_bool, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_void_p, ctypes.c_int64),
)


@functools.cache
def _sources() -> dict[str, str]:
    return cuda_build.variant_sources((ROOT / "csrc" / "core" / "variants.def").read_text())


@functools.cache
def _compiled(source: str, arch: str, directory: Path) -> str:
    """The PTX of a line of variants.def, or of a file of csrc/cuda."""
    path = ROOT / "csrc" / "cuda" / source
    if source in _sources():
        path = directory / source
        path.write_text(_sources()[source])
    ptx = directory / f"{source}.{arch}.ptx"
    run(require_toolkit("nvcc"), *FLAGS, f"-arch={arch}", "-ptx", path, "-o", ptx)
    return ptx.read_text()


@functools.cache
def _machine(source: str, entry: str, arch: str, directory: Path) -> Machine:
    """The kernel of a file, by a part of its mangled name."""
    return Machine(parse(_compiled(source, arch, directory)), entry)


# The small kernels of backward_steps.cu, by their names in launches: parts of the mangled ones.
_STEPS = {
    "backward_rows_f32": "backward_rowsIf",
    "backward_rows_f16": "backward_rowsINS_7Float16",
    "backward_rows_bf16": "backward_rowsINS_8BFloat16",
    "add_sinks": "add_sinks",
    "add_splits": "add_splits",
}


def _place(name: str) -> tuple[str, str]:
    """The source of the kernel that a launch names, and a part of its mangled name."""
    if name in _STEPS:
        return "backward_steps.cu", _STEPS[name]
    if meetings := re.fullmatch(r"find_meetings_of_(\w+)_(\d+)x(\d+)", name):
        of, queries, keys = meetings.groups()
        return "backward_steps.cu", f"find_meetingsILi{queries}ELi{keys}ELb{int(of == 'keys')}"
    return name.removeprefix("flash_") + ".cu", ""  # the only one there


class Launches:
    """Runs the kernels of an emulated call as PTX."""

    def __init__(self, emulator: Emulator, arch: str, directory: Path) -> None:
        self.names: list[str] = []  # of the kernels, in order
        self.error: Exception | None = None
        self._library, self._arch, self._directory = emulator.library, arch, directory

    def __call__(self, name: bytes, blocks: int, threads: int, shared: int, params: int, size: int) -> bool:
        self.names.append(name.decode())
        try:
            machine = _machine(*_place(self.names[-1]), self._arch, self._directory)
            data = ctypes.string_at(params, size)
            machine.launch(blocks, threads, [Struct(data, self._pointers(data))], shared)
        except Exception as error:
            self.error = self.error or error
        return self.error is None

    def _pointers(self, data: bytes) -> dict[int, tuple[np.ndarray, int]]:
        """What the words of the arguments that are addresses point to."""
        ranges, start, size = [], ctypes.c_size_t(), ctypes.c_size_t()
        while self._library.attn_ext_emulation_memory(
            ctypes.c_size_t(len(ranges)), ctypes.byref(start), ctypes.byref(size)
        ):
            array = np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(start.value))
            ranges.append((start.value, array))
        words = enumerate(memoryview(data).cast("Q"))
        return {
            8 * index: (array, word - first)
            for index, word in words
            for first, array in ranges
            if first <= word < first + array.nbytes
        }


@contextmanager
def interpreted(arch: str, directory: Path, **options: Any) -> Iterator[Launches]:
    """All attention of CPU tensors goes to the PTX of the CUDA kernels.

    Args:
        arch: what nvcc compiles for, ``"sm_75"`` or ``"sm_80"``.
        directory: for the PTX.
        options: of `emulated`; the device is one of the architecture.

    Yields:
        What ran.
    """
    with emulated(**{"device": DEVICES[arch], **options}) as emulator:
        launches = Launches(emulator, arch, directory)
        callback = _Launcher(launches)
        emulator.library.attn_ext_emulation_launch_by(callback)
        try:
            yield launches
        except Exception:  # what the operators and their callers make of it
            if launches.error:
                raise launches.error from None
            raise
        finally:
            emulator.library.attn_ext_emulation_launch_by(None)
