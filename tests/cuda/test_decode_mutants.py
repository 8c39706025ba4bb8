"""Planted defects of CUDA decoding kernels are noticed: by numbers, the emulator's checks, or counters.

A sample by default; all of them with ATTN_EXT_ALL_MUTANTS=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from decode_mutants import MUTANTS
from programs import ROOT

RUNNER = Path(__file__).with_name("decode_mutant_runner.py")
SAMPLE = range(4, len(MUTANTS), 14)
JOBS = 2
SECONDS = 300


def run(index: int) -> str:
    """What is noticed; a kernel that does not end or takes its process down is noticed, too."""
    command = [sys.executable, RUNNER, str(index)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MAX_JOBS": "1"}
    try:
        completed = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if completed.returncode < 0:
        return f"signal {-completed.returncode}"
    assert completed.returncode == 0, f"{MUTANTS[index].what}: {completed.stderr[-3000:]}"
    return completed.stdout.strip()


def test_defects_are_noticed() -> None:
    everything = os.environ.get("ATTN_EXT_ALL_MUTANTS") == "1"
    indices = range(len(MUTANTS)) if everything else SAMPLE
    with ThreadPoolExecutor(JOBS) as pool:
        noticed = dict(zip(indices, pool.map(run, indices), strict=True))
    for index, how in noticed.items():
        print(f"{MUTANTS[index].what}: {how or 'NOT NOTICED'}")
    missed = [MUTANTS[index].what for index, how in noticed.items() if not how]
    assert len(missed) <= 0.05 * len(noticed), missed
