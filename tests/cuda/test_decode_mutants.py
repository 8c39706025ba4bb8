"""Planted defects of CUDA decoding kernels are noticed: by numbers, the emulator's checks, or counters.

A sample by default; all of them with ATTN_EXT_ALL_MUTANTS=1.
"""

from __future__ import annotations

from pathlib import Path

from decode_mutants import MUTANTS
from test_forward_mutants import check_noticed

RUNNER = Path(__file__).with_name("decode_mutant_runner.py")
SAMPLE = range(4, len(MUTANTS), 14)


def test_defects_are_noticed() -> None:
    check_noticed(RUNNER, MUTANTS, SAMPLE)
