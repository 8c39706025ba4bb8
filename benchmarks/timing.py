"""Interleaved timing: contenders take turns in every round, so that what disturbs one disturbs them all."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# A call that takes longer than this is timed in one round: it averages over its own length.
VERY_SLOW_SECONDS = 2.5


@dataclass(frozen=True)
class Plan:
    """How long to measure: seconds for each contender, most and fewest rounds, least seconds of one round."""

    budget: float = 1.5
    most_rounds: int = 15
    fewest_rounds: int = 3
    least_round: float = 0.02


FULL = Plan()
QUICK = Plan(budget=0.25, most_rounds=7, least_round=0.005)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        q1, median, q3 = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(q1), float(q3))


@dataclass
class Samples:
    """Seconds per call, one entry a round; CPU time is that of the whole process, all threads together."""

    calls_per_round: int
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def seconds(self, clock: str) -> list[float]:
        return self.cpu if clock == "cpu" else self.wall


def clock_for(threads: int) -> str:
    """CPU time judges one thread, because it does not see other processes; only wall time judges several."""
    return "cpu" if threads == 1 else "wall"


def race(contenders: dict[str, Callable[[], object]], plan: Plan = FULL) -> dict[str, Samples]:
    """Warms callables up by one call each and interleaves them."""
    first_call = {}
    for name, function in contenders.items():
        start = time.perf_counter()
        function()
        first_call[name] = time.perf_counter() - start
    return interleave(contenders, first_call, plan)


def interleave(
    contenders: dict[str, Callable[[], object]], first_call: dict[str, float], plan: Plan = FULL
) -> dict[str, Samples]:
    """Times warmed-up callables round by round, each round starting with another one.

    Fast callables are called many times a round.  A slow one takes part in the first rounds only, as many as
    its budget allows, so that round r of any two contenders is still comparable.

    Args:
        contenders: what to call, by name.
        first_call: the wall seconds that the warm-up call of each took.
        plan: how long to measure.
    """
    calls, rounds = {}, {}
    for name, function in contenders.items():
        # A first call is only a bound, but a bound on something this slow is all that is needed.
        slow = first_call[name] > plan.budget
        calls[name], seconds = (1, first_call[name]) if slow else _calibrate(function, plan)
        rounds[name] = _rounds(seconds, plan)
    samples = {name: Samples(calls[name]) for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(max(rounds.values(), default=0)):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                if index < rounds[name]:
                    _measure(contenders[name], samples[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def ratios(numerator: Samples, denominator: Samples, clock: str) -> list[float]:
    """Of two interleaved contenders, round by round, for the rounds that both took part in."""
    return [a / b for a, b in zip(numerator.seconds(clock), denominator.seconds(clock), strict=False)]


def _calibrate(function: Callable[[], object], plan: Plan) -> tuple[int, float]:
    """The calls of a round and the seconds that a round takes."""
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = time.perf_counter() - start
        if seconds >= plan.least_round / 2:
            break
        calls *= 2
    per_call = seconds / calls
    calls = max(1, math.ceil(plan.least_round / per_call))
    return calls, calls * per_call


def _rounds(seconds: float, plan: Plan) -> int:
    if seconds > VERY_SLOW_SECONDS:
        return 1
    return max(plan.fewest_rounds, min(plan.most_rounds, int(plan.budget / seconds)))


def _measure(function: Callable[[], object], samples: Samples) -> None:
    repeat = range(samples.calls_per_round)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in repeat:
        function()
    samples.cpu.append((time.process_time() - cpu) / len(repeat))
    samples.wall.append((time.perf_counter() - wall) / len(repeat))
