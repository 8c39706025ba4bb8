"""The arithmetic peak of this machine, measured: what "share of the peak" is a share of."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

from .native import compile_library

# In the order of preference; each with the instruction sets (as in ATTN_EXT_ISA) that may use it.
FP32_INSTRUCTIONS = ("avx512", "avx2", "sse2", "neon")
BF16_INSTRUCTION = "avx512_bf16"
_ALLOWED = {
    "baseline": {"sse2", "neon"},
    "avx2": {"sse2", "avx2"},
    "avx512": {"sse2", "avx2", "avx512"},
}


def measure_peak(threads: int = 1) -> dict[str, float]:
    """GFLOP/s of ``threads`` cores together, by kind of arithmetic.

    Returns:
        ``float32``: fused multiply-adds of the widest vector; ``bfloat16``, where the processor has it:
        ``vdpbf16ps``.  ``ATTN_EXT_ISA`` limits what is considered.

    Raises:
        CompilerUnavailableError: the probe cannot be compiled here.
    """
    library = ctypes.CDLL(str(compile_library("peak")))
    probe = library.bench_peak_gflops
    probe.argtypes, probe.restype = [ctypes.c_char_p], ctypes.c_double
    allowed = _ALLOWED.get(os.environ.get("ATTN_EXT_ISA", ""))

    def total(instruction: str) -> float:
        if allowed is not None and instruction not in allowed:
            return 0.0
        # ctypes releases the interpreter lock, so the cores really work at the same time.
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(probe, [instruction.encode()] * threads))

    peak = {"float32": next((rate for rate in map(total, FP32_INSTRUCTIONS) if rate), 0.0)}
    if bf16 := total(BF16_INSTRUCTION):
        peak["bfloat16"] = bf16
    return peak


def peak_for(peak: dict[str, float], dtype: str) -> float:
    """The best rate open to ``dtype``: float32 arithmetic, or bfloat16 products where they are faster."""
    return max(peak["float32"], peak.get("bfloat16", 0.0)) if dtype == "bfloat16" else peak["float32"]
