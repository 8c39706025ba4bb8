"""Times a case: every contender is checked first, then all that are right are timed against each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from torch import Tensor

from .cases import Case
from .correctness import Judge, WrongResultError
from .peers import Peer, Run
from .timing import FULL, Plan, Samples, Spread, clock_for, interleave, ratios

BASELINE = "torch"


def time_case(case: Case, peers: list[Peer], *, threads: int = 1, plan: Plan = FULL) -> dict[str, dict]:
    """Checks and times every peer on one case.

    Returns:
        For each peer either ``{"excluded": reason}`` or its milliseconds (median and quartiles of the
        rounds), rates, error, and speed relative to torch (above 1: faster), taken round by round.
    """
    inputs = case.inputs()
    judge = Judge(case, inputs)
    contenders: dict[str, dict] = {}
    runs: dict[str, Run] = {}
    first_call: dict[str, float] = {}
    for peer in peers:
        try:
            run, first_call[peer.name], error = admit(partial(_prepare, peer, case, inputs), judge)
        except ExcludedError as reason:
            contenders[peer.name] = {"excluded": str(reason)}
        else:
            runs[peer.name] = run
            contenders[peer.name] = {"error": error}
    del judge  # it holds matrices in float64
    samples = interleave(runs, first_call, plan)
    clock = clock_for(threads)
    for name, measured in samples.items():
        contenders[name] |= _figures(case, measured, samples.get(BASELINE), clock)
    return contenders


class ExcludedError(Exception):
    """The contender cannot be timed; the message says why."""


def admit(prepare: Callable[[], Run], judge: Judge) -> tuple[Run, float, float]:
    """Prepares a contender, warms it up and checks it.

    Returns:
        What to time, the wall seconds of the warm-up call, and the error of its results.

    Raises:
        ExcludedError: it does not support the case, fails or is wrong.
    """
    try:
        run = prepare()
        start = time.perf_counter()
        results: tuple[Tensor, ...] = run()
        seconds = time.perf_counter() - start
        return run, seconds, judge.error(results)
    except WrongResultError as wrong:
        raise ExcludedError(f"wrong: {wrong}") from wrong
    except NotImplementedError as refusal:
        raise ExcludedError(f"unsupported: {refusal}") from refusal
    except Exception as failure:  # whatever a peer raises, the others are measured
        reason = "".join(str(failure).strip().splitlines()[:1])
        raise ExcludedError(f"failed: {type(failure).__name__}: {reason}") from failure


def _prepare(peer: Peer, case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Run:
    if reason := peer.unsupported(case):
        raise NotImplementedError(reason)
    return peer.prepare(case, inputs)


def _figures(case: Case, samples: Samples, baseline: Samples | None, clock: str) -> dict:
    spread = Spread.of(samples.seconds(clock))
    figures = {
        "rounds": len(samples.cpu),
        "calls_per_round": samples.calls_per_round,
        "ms": _milliseconds(samples.seconds(clock)),
        "cpu_ms": _milliseconds(samples.cpu),
        "wall_ms": _milliseconds(samples.wall),
        "gflops": case.flops / spread.median / 1e9,
    }
    if case.direction == "forward":
        figures["gbps"] = case.bytes_moved / spread.median / 1e9
    if baseline is not None:
        figures["speedup"] = asdict(Spread.of(ratios(baseline, samples, clock)))
    return figures


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return asdict(Spread.of([1e3 * value for value in seconds]))
