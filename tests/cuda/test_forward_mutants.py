"""Planted defects of CUDA forward kernels are noticed: by numbers, the emulator's checks, or counters.

A sample by default; all of them with ATTN_EXT_ALL_MUTANTS=1.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forward_mutants import MUTANTS, Mutant
from programs import ROOT

RUNNER = Path(__file__).with_name("forward_mutant_runner.py")
SAMPLE = range(5, len(MUTANTS), 12)
JOBS = 2
SECONDS = 300


def run(runner: Path, mutants: Sequence[Mutant], index: int) -> str:
    """What is noticed; a kernel that does not end or takes its process down is noticed, too."""
    command = [sys.executable, runner, str(index)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MAX_JOBS": "1"}
    try:
        completed = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if completed.returncode < 0:
        return f"signal {-completed.returncode}"
    assert completed.returncode == 0, f"{mutants[index].what}: {completed.stderr[-3000:]}"
    return completed.stdout.strip()


def check_noticed(runner: Path, mutants: Sequence[Mutant], sample: Iterable[int]) -> None:
    """At most one in twenty is missed, of the sample or, if the environment says so, of all."""
    everything = os.environ.get("ATTN_EXT_ALL_MUTANTS") == "1"
    indices = range(len(mutants)) if everything else sample
    with ThreadPoolExecutor(JOBS) as pool:
        noticed = dict(zip(indices, pool.map(functools.partial(run, runner, mutants), indices), strict=True))
    for index, how in noticed.items():
        print(f"{mutants[index].what}: {how or 'NOT NOTICED'}")
    missed = [mutants[index].what for index, how in noticed.items() if not how]
    assert len(missed) <= 0.05 * len(noticed), missed


def test_defects_are_noticed() -> None:
    check_noticed(RUNNER, MUTANTS, SAMPLE)
