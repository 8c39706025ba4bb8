"""Environments to measure in: held to an instruction set, and with MKL's vendor check bypassed."""

from __future__ import annotations

import os

import torch

from .machine import cpu_vendor
from .native import compile_library

# The same limit for everyone: torch's own kernels, MKL's and oneDNN's.
ISA_ENVIRONMENT = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
}


def isa_environment(isa: str) -> dict[str, str]:
    """The variables that hold every library to an instruction set of ``ATTN_EXT_ISA``."""
    return {"ATTN_EXT_ISA": isa, **ISA_ENVIRONMENT[isa]}


def unlocked_mkl_reason() -> str | None:
    """Why the comparison with an unlocked MKL says nothing here, or None if it does."""
    if not torch.backends.mkl.is_available():
        return "this torch is built without MKL"
    if cpu_vendor() != "AuthenticAMD":
        return f"MKL withholds kernels from AMD processors only; this one is {cpu_vendor()}"
    return None


def unlocked_mkl_environment() -> dict[str, str]:
    """The variables that make MKL treat this processor as one of its own vendor's.

    Raises:
        CompilerUnavailableError: the shim cannot be compiled here.
    """
    preload = [str(compile_library("mkl_vendor")), os.environ.get("LD_PRELOAD", "")]
    return {"LD_PRELOAD": ":".join(filter(None, preload))}
