"""The CUDA backward kernels as nvcc compiles them: their PTX, interpreted, against float64.

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
import pytest
import torch
from cuda_programs import require_toolkit
from emulated import A100, Device, emulated
from problems import make_block_mask, make_inputs
from programs import ROOT, run
from test_forward_ptx import FLAGS

from attn_ext import Causal, KeyLengths, Prefix, SlidingWindow
from attn_ext.testing import check_attention
from tools import cuda_build
from tools.emulation import Emulator
from tools.ptxrun import Machine, Struct, parse

_Launcher = ctypes.CFUNCTYPE(
    *(ctypes.c_bool, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_void_p, ctypes.c_int64),
)
SM_75 = Device(arch=75, shared_memory=64 << 10, processors=68)


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


# The small kernels, by their names in launches: parts of the mangled ones.
_STEPS = {
    "backward_rows_f32": "backward_rowsIf",
    "backward_rows_f16": "backward_rowsINS_7Float16",
    "backward_rows_bf16": "backward_rowsINS_8BFloat16",
    "add_sinks": "add_sinks",
    "add_splits": "add_splits",
}


class _Launches:
    """Runs the kernels of an emulated call as PTX."""

    def __init__(self, emulator: Emulator, arch: str, directory: Path) -> None:
        self.names: list[str] = []
        self._library, self._arch, self._directory = emulator.library, arch, directory
        self.error: Exception | None = None

    def __call__(self, name: bytes, blocks: int, threads: int, shared: int, params: int, size: int) -> bool:
        self.names.append(name.decode())
        try:
            machine = self._machine_of(self.names[-1])
            data = ctypes.string_at(params, size)
            machine.launch(blocks, threads, [Struct(data, self._pointers(data))], shared)
        except Exception as error:
            self.error = error
        return self.error is None

    def _machine_of(self, name: str) -> Machine:
        if name in _STEPS:
            return _machine("backward_steps.cu", _STEPS[name], self._arch, self._directory)
        if name.startswith("find_meetings"):
            return _machine("backward_steps.cu", _meetings_entry(name), self._arch, self._directory)
        source = name.removeprefix("flash_") + ".cu"
        return _machine(source, "flash_", self._arch, self._directory)

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


def _meetings_entry(name: str) -> str:
    """find_meetings_of_keys_64x32 -> the part of its mangled name that holds the template arguments."""
    of, queries, keys = re.fullmatch(r"find_meetings_of_(\w+)_(\d+)x(\d+)", name).groups()
    return f"find_meetingsILi{queries}ELi{keys}ELb{int(of == 'keys')}"


@contextmanager
def interpreted(arch: str, device: Device, directory: Path) -> Iterator[_Launches]:
    """All attention of CPU tensors goes to the PTX of the CUDA kernels."""
    with emulated(device=device) as emulator:
        launches = _Launches(emulator, arch, directory)
        callback = _Launcher(launches)
        emulator.library.attn_ext_emulation_launch_by(callback)
        try:
            yield launches
        except RuntimeError:
            if launches.error:
                raise launches.error from None
            raise
        finally:
            emulator.library.attn_ext_emulation_launch_by(None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backward_ptx")


SIZES = {  # of heads, and the options that lead to other kernels for them
    "bf16": ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    "f16": ((64, 64), (128, 128)),
    "f32": ((32, 32), (64, 64), (128, 128), (256, 256)),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize(
    ("element", "columns", "arch"),
    [
        *((element, columns, "sm_80") for element, sizes in SIZES.items() for columns in sizes),
        ("f16", (64, 64), "sm_75"),
    ],
)
def test_ptx(element: str, columns: tuple[int, int], arch: str, modified: bool, directory: Path) -> None:
    """Whole tiles, cut ones, blocks; or all terms of the scores, with their gradients."""
    sizes = 1, 2, 137, 133
    inputs = make_inputs(
        *sizes, columns[0] - 8, value_dim=columns[1], group=2, dtype=DTYPES[element]
    )
    options: dict[str, Any] = {"mask": Causal("bottom_right"), "sinks": torch.tensor([0.5, -1.0])}
    if modified:
        mask = (SlidingWindow(30, 9, "bottom_right") | Prefix(5)) & KeyLengths([sizes[3] - 4])
        options = {
            "mask": mask & make_block_mask(sizes, (32, 48), 0.7),
            "bias": torch.randn(1, 2, 1, sizes[3]).half().requires_grad_(),
            "softcap": 5.0,
            "alibi_slopes": torch.rand(2),
            "dropout_p": 0.3,
            "dropout_seed": 3,
        }
    device = SM_75 if arch == "sm_75" else A100
    with interpreted(arch, device, directory) as launches:
        check_attention(*inputs, **options)
    kernels = {name.removeprefix("flash_").split("_gradient")[0] for name in launches.names}
    assert {"key", "query", f"backward_rows_{element}"} <= kernels
    assert ("bias" in kernels) == modified
