"""The public API on the CUDA kernels, run on the CPU by the emulator."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from operators import attention_by, build_arguments, decode_by
from programs import ROOT

from tools import cuda_build, emulation

LIBRARY = ROOT / "build" / "emulation" / "attn_ext_emulated.so"


class Device(NamedTuple):
    """What of a device decides which kernel runs on it."""

    arch: int = 80  # 10 * compute capability
    shared_memory: int = 163 << 10  # bytes that a block may have
    processors: int = 108


A100 = Device()
SM_75 = Device(arch=75, shared_memory=64 << 10, processors=68)


@functools.cache
def emulator() -> emulation.Emulator:
    """Builds the kernels for the emulator and registers `torch.ops.attn_ext_emulated`."""
    kernels = cuda_build.kernel_sources(ROOT, ROOT / "build" / "emulation" / "variants")
    library = emulation.build(
        [
            *(source for source in kernels if source.name not in ("build.cu", "device.cu")),
            ROOT / "csrc" / "bindings" / "emulated.cpp",
        ],
        LIBRARY,
        **build_arguments(),
    )
    torch.ops.load_library(library)
    return emulation.Emulator(library)


@contextmanager
def emulated(
    *, device: Device = A100, variant: str | None = None, seed: int = 0, access_sites: bool = False
) -> Iterator[emulation.Emulator]:
    """All attention of CPU tensors goes to the CUDA kernels. What the emulator finds wrong is a RuntimeError.

    Args:
        device: the one to be.
        variant: the kernel to run, ``"bf16_64_long"``; None: what the selector takes.
        seed: of the order in which blocks, warps and lanes run.
        access_sites: count the transactions of each access to memory.

    Yields:
        The emulator, whose statistics are those of all calls within.
    """
    running = emulator()
    running.library.attn_ext_emulated_device(*map(ctypes.c_int, device))
    kernel = None if variant is None else f"flash_forward_{variant}".encode()
    if not running.library.attn_ext_emulated_force(kernel):
        raise ValueError(f"no kernel {variant!r} in csrc/core/variants.def")
    running.start(seed=seed, access_sites=access_sites)
    with attention_by("attn_ext_emulated"), decode_by("attn_ext_emulated"):
        yield running
