"""Peak memory beyond inputs and outputs, each figure from a fresh process of its own.

Run as ``python -m benchmarks.memory SPEC`` it is that process: it solves the case of the JSON spec once and
prints the number of bytes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .cases import Case
from .machine import ROOT
from .peers import Peer, Run, load_peers

LENGTHS = (1024, 2048, 4096, 8192)
CONTENDERS = ("attn_ext", "torch", "naive")
_WARM_UP_LENGTH = 64
# The naive backward holds scores, weights, their gradients and a temporary or two, all L x L.
_NAIVE_MATRICES = 6


def memory_cases(
    lengths: Iterable[int] = LENGTHS, dtypes: Iterable[str] = ("float32", "bfloat16")
) -> list[Case]:
    """Eight heads of 64, forward and training, of every length and dtype."""
    return [
        Case(8, length, 64, dtype, direction=direction, group="memory")
        for dtype in dtypes
        for direction in ("forward", "training")
        for length in lengths
    ]


def measure_case(case: Case, peers: list[Peer], *, threads: int = 1) -> dict[str, dict]:
    """``{"mib": ...}`` or ``{"excluded": reason}`` for each of ``CONTENDERS`` that is among the peers."""
    return {
        peer.name: _measure_in_fresh_process(case, peer.name, threads)
        for peer in peers
        if peer.name in CONTENDERS
    }


def _measure_in_fresh_process(case: Case, peer: str, threads: int) -> dict:
    scores = case.batch * case.heads * case.query_length * case.key_length * case.torch_dtype.itemsize
    needed = _NAIVE_MATRICES * scores
    if peer == "naive" and needed > _available_bytes():
        return {"excluded": f"not measured: needs about {needed / 2**30:.0f} GiB of memory"}
    spec = json.dumps({"case": asdict(case), "peer": peer, "threads": threads})
    return in_fresh_process("benchmarks.memory", spec)


def in_fresh_process(module: str, *arguments: str) -> dict:
    """``{"mib": ...}`` of the bytes that a module prints, or ``{"excluded": reason}``."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"excluded": f"failed: {reason}"}
    return {"mib": int(done.stdout.split()[-1]) / 2**20}


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _peak_bytes() -> int:
    """The largest resident size so far."""
    for line in _process_status():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    """Starts the peak again at the present size, where the system can: imports may have left a higher one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _process_status() -> list[str]:
    try:
        return Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return []


def measure_peak_bytes(case: Case, peer: Peer) -> int:
    """Solves the case once; the growth of the peak, less the results that are returned."""
    warm_up = replace(case, query_length=_WARM_UP_LENGTH, key_length=_WARM_UP_LENGTH)
    peer.prepare(warm_up, warm_up.inputs())()
    return peak_growth(peer.prepare(case, case.inputs()))


def peak_growth(run: Run) -> int:
    """By how many bytes a call raises the peak, less the results that it returns."""
    _forget_peak()
    before = _peak_bytes()
    results = run()
    grown = _peak_bytes() - before
    returned = sum(result.numel() * result.element_size() for result in results)
    return max(grown - returned, 0)


def main(spec: str) -> None:
    fields = json.loads(spec)
    torch.set_num_threads(fields["threads"])
    peers, versions = load_peers([])
    peer = next((peer for peer in peers if peer.name == fields["peer"]), None)
    if peer is None:
        raise SystemExit(versions[fields["peer"]])
    print(measure_peak_bytes(Case(**fields["case"]), peer))


if __name__ == "__main__":
    main(sys.argv[1])
