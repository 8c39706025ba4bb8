"""``python -m benchmarks.sparse``: what block-sparse attention costs, as a Markdown report.

Time against density and length, beside dense attention, FlexAttention and torch's
scaled_dot_product_attention with a dense mask, and what it takes to make the patterns. Before anything is
timed, some rows of each contender's output, and the gradients that come from them, are compared with the
float64 reference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import attn_ext
from attn_ext import BlockMask, Mask, SlidingWindow, patterns

from .cases import Case, Direction
from .contest import ExcludedError, admit
from .correctness import Judge
from .machine import describe_machine
from .memory import in_fresh_process, peak_growth
from .peers import Attend, bind
from .report import markdown_table, render_machine
from .timing import FULL, QUICK, Plan, Samples, Spread, clock_for, interleave, race, ratios

HEADS, HEAD_DIM = 4, 64
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.25)
WINDOW = 512  # keys that a query of the sliding window sees, its own and those before it
LONGFORMER_WINDOW, LONGFORMER_GLOBAL_TOKENS = 256, 16
_PASSES: dict[Direction, str] = {"forward": "forward", "training": "forward + backward"}
_ROWS_COMPARED = 128
SEED = 1234


@dataclass(frozen=True)
class Size:
    """How long the sequences are and how long to measure."""

    density: int = 16384
    longformer: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    window: int = 16384
    building: int = 131072
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    block_sizes: tuple[int, ...] = (64, 128)
    plan: Plan = FULL


SMALL = Size(1024, (256, 512, 1024), 1024, 4096, dtypes=("float32",), block_sizes=(64,), plan=QUICK)


@dataclass(frozen=True)
class Contender:
    """One way to solve a case, and the mask that its results are judged by."""

    case: Case
    attend: Attend
    mask: Mask | None = None


class Race:
    """The times of contenders that were right, interleaved, and why the others have none."""

    def __init__(self, contenders: dict[str, Contender], plan: Plan, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.clock = clock_for(threads)
        self.excluded: dict[str, str] = {}
        runs, first_call = {}, {}
        inputs = {case: case.inputs() for case in {contender.case for contender in contenders.values()}}
        for name, contender in contenders.items():
            case = contender.case
            middle = case.query_length // 2
            rows = slice(middle, min(middle + _ROWS_COMPARED, case.query_length))
            judge = Judge(case, inputs[case], contender.mask, rows)
            try:
                _, first_call[name], _ = admit(partial(bind, contender.attend, case, judge.inputs), judge)
            except ExcludedError as reason:
                self.excluded[name] = str(reason)
            else:
                runs[name] = bind(contender.attend, case, inputs[case])
        self.samples: dict[str, Samples] = interleave(runs, first_call, plan)

    def seconds(self, name: str) -> float:
        """The median, NaN if there is none."""
        return _median(self.samples[name].seconds(self.clock)) if name in self.samples else math.nan

    def ratio(self, name: str, other: str) -> float:
        """How much longer `name` takes than `other`, the median of the rounds; NaN if there is none."""
        if not {name, other} <= self.samples.keys():
            return math.nan
        return _median(ratios(self.samples[name], self.samples[other], self.clock))


def _median(values: list[float]) -> float:
    return Spread.of(values).median


def _sparse(block_mask: BlockMask) -> Attend:
    return partial(attn_ext.block_sparse_attention, block_mask=block_mask)


def _flex(block_mask: Any) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)


def _case(length: int, dtype: str = "float32", direction: Direction = "forward") -> Case:
    return Case(HEADS, length, HEAD_DIM, dtype, direction=direction, group="sparse")


def _cell(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _notes(races: list[Race]) -> str:
    reasons = {f"- {name}: {reason}" for race_ in races for name, reason in race_.excluded.items()}
    return "".join(f"\n{reason}" for reason in sorted(reasons))


def density(size: Size) -> str:
    """Random blocks, from few to many, beside dense attention in the same rounds."""
    rows, races = [], []
    configurations = [
        (block, dtype, direction)
        for block in size.block_sizes
        for dtype in size.dtypes
        for direction in _PASSES
    ]
    for block, dtype, direction in tqdm(configurations, desc="density", disable=None):
        torch.compiler.reset()
        generator = torch.Generator().manual_seed(SEED)
        count = size.density // block
        case = _case(size.density, dtype, direction)
        contenders = {"dense": Contender(case, attn_ext.attention)}
        masks = {}
        for share in DENSITIES:
            block_map = torch.rand(HEADS, count, count, generator=generator) < share
            masks[share] = mask = BlockMask.from_map(block_map, block_size=block)
            contenders[f"{share:.0%}"] = Contender(case, _sparse(mask), mask)
            if direction == "forward":
                contenders[f"FlexAttention {share:.0%}"] = Contender(case, _flex(mask.to_flex()), mask)
        result = Race(contenders, size.plan)
        races.append(result)
        for share, mask in masks.items():
            name = f"{share:.0%}"
            rows.append(
                [
                    _PASSES[direction],
                    str(block),
                    dtype,
                    name,
                    _cell(1e3 * result.seconds(name)),
                    _cell(1e3 * result.seconds("dense") * mask.density),
                    _cell(result.ratio(name, "dense") / mask.density),
                    _cell(1e3 * result.seconds(f"FlexAttention {name}")),
                    _cell(result.ratio(f"FlexAttention {name}", name)),
                ]
            )
    header = ["", "block", "dtype", "density", "ms", "dense ms x density", "ratio"]
    table = markdown_table([*header, "FlexAttention ms", "x FlexAttention"], rows)
    return (
        f"## Density\n\nRandom blocks, other ones for each head; 1 x {HEADS} x {size.density} x {HEAD_DIM}, "
        f"one thread.\n\n{table}\n{_notes(races)}"
    )


def _longformer(length: int) -> BlockMask:
    return patterns.longformer(length, LONGFORMER_WINDOW, range(LONGFORMER_GLOBAL_TOKENS))


def longformer(size: Size) -> str:
    """The Longformer pattern as sequences grow, in time and in memory."""
    shortest = size.longformer[0]
    masks = {length: _longformer(length) for length in size.longformer}
    rows, races = [], []
    for direction, label in tqdm(_PASSES.items(), desc="longformer", disable=None):
        contenders = {
            f"{length}": Contender(_case(length, direction=direction), _sparse(mask), mask)
            for length, mask in masks.items()
        }
        contenders["dense"] = Contender(_case(shortest, direction=direction), attn_ext.attention)
        result = Race(contenders, size.plan, threads=2)
        races.append(result)
        for length, mask in masks.items():
            peak = in_fresh_process("benchmarks.sparse", "--peak", json.dumps([length, direction]))
            rows.append(
                [
                    label,
                    f"{length:,}",
                    f"{mask.density:.2%}",
                    _cell(1e3 * result.seconds(f"{length}"), 1),
                    _cell(result.ratio(f"{length}", f"{length // 2}")),
                    f"{peak['mib']:.0f}" if "mib" in peak else peak["excluded"],
                    _cell(result.seconds("dense") * (length / shortest) ** 2, 1),
                    f"{HEADS * length**2 * 4 / 2**30:,.2f}",
                ]
            )
    header = ["", "L", "density", "ms", "x half as long", "peak MiB", "dense s", "dense scores GiB"]
    return (
        f"## Longformer\n\nA window of {LONGFORMER_WINDOW} on each side and {LONGFORMER_GLOBAL_TOKENS} "
        f"global tokens; 1 x {HEADS} x L x {HEAD_DIM}, float32, two threads. Peak: resident memory beyond "
        "inputs and results, in a process of its own. Dense: `attn_ext.attention` without a mask, measured "
        f"at L {shortest:,} and scaled by the square of the length, and the size of a matrix of scores.\n\n"
        f"{markdown_table(header, rows)}\n{_notes(races)}"
    )


def peak_bytes(length: int, direction: Direction) -> int:
    """What the Longformer pattern takes beyond inputs and results; this process is to be a new one."""
    torch.set_num_threads(2)

    def run_of(length: int) -> Callable[[], tuple[Tensor, ...]]:
        case = _case(length, direction=direction)
        return bind(_sparse(_longformer(length)), case, case.inputs())

    run_of(LONGFORMER_GLOBAL_TOKENS)()
    return peak_growth(run_of(length))


def window(size: Size) -> str:
    """The causal window in each of the ways to say it."""
    from torch.nn.attention.flex_attention import create_block_mask

    length, mask = size.window, SlidingWindow(WINDOW - 1, 0)
    flex = create_block_mask(
        lambda batch, head, query, key: (query >= key) & (query - key < WINDOW),
        *(None, None, length, length),
        device="cpu",
    )
    dense_mask = mask.to_dense(1, 1, length, length)[0, 0]
    ways = {
        "patterns.sliding_window": _sparse(patterns.sliding_window(length, WINDOW - 1)),
        "SlidingWindow": partial(attn_ext.attention, mask=mask),
        "FlexAttention": None,
        "torch, dense mask": partial(F.scaled_dot_product_attention, attn_mask=dense_mask),
    }
    ours, *peers = ways
    rows, races = [], []
    configurations = [(threads, dtype) for threads in (1, 2) for dtype in size.dtypes]
    for threads, dtype in tqdm(configurations, desc="window", disable=None):
        torch.compiler.reset()
        case = _case(length, dtype)
        # FlexAttention's kernel is compiled for a number of threads.
        contenders = {
            name: Contender(case, _flex(flex) if attend is None else attend, mask)
            for name, attend in ways.items()
        }
        result = Race(contenders, size.plan, threads=threads)
        races.append(result)
        milliseconds = [_cell(1e3 * result.seconds(name), 1) for name in ways]
        slower = [_cell(result.ratio(name, ours)) for name in peers]
        rows.append([f"{threads}", dtype, *milliseconds, *slower])
    header = ["threads", "dtype", *(f"{name}, ms" for name in ways), *(f"x {name}" for name in peers)]
    return (
        f"## Sliding window\n\nA causal window of {WINDOW} keys; 1 x {HEADS} x {length} x {HEAD_DIM}, "
        f"forward. x: how much longer than {ours}.\n\n{markdown_table(header, rows)}\n{_notes(races)}"
    )


def builders(length: int) -> dict[str, Callable[[], BlockMask]]:
    """What makes each pattern for so many tokens, with settings of a usual size."""
    generator = torch.Generator().manual_seed(SEED)
    blocks = length // 64
    scores = torch.randn(blocks, blocks, generator=generator)
    qk = torch.randn(1, 1, length, HEAD_DIM, generator=generator)
    return {
        f"sliding_window({WINDOW - 1})": lambda: patterns.sliding_window(length, WINDOW - 1),
        "dilated(128, 4)": lambda: patterns.dilated(length, 128, 4),
        "streaming(4, 512)": lambda: patterns.streaming(length, 4, 512),
        "prefix_lm(1024)": lambda: patterns.prefix_lm(length, 1024),
        "longformer(256, 16 global)": lambda: _longformer(length),
        "bigbird()": lambda: patterns.bigbird(length),
        "strided(512)": lambda: patterns.strided(length, 512),
        "fixed(512)": lambda: patterns.fixed(length, 512),
        "deepspeed.fixed(block=64)": lambda: patterns.deepspeed.fixed(length, 1, block=64),
        "from_scores(k=16)": lambda: patterns.from_scores(scores, k=16),
        "topk_blocks(16), D 64": lambda: patterns.topk_blocks(qk, qk, 16),
        "lsh(L // 64 buckets), D 64": lambda: patterns.lsh(qk, blocks).block_mask,
    }


def building(size: Size) -> str:
    """How long it takes to make each pattern, and how much it holds."""
    torch.set_num_threads(1)
    makers = builders(size.building)
    samples = race(makers, size.plan)
    rows = []
    for name, make in tqdm(makers.items(), desc="building", disable=None):
        mask = make()
        held = sum(tensor.numel() * tensor.element_size() for tensor in mask.blocks)
        rows.append(
            [
                name,
                f"{mask.density:.2%}",
                f"{mask.num_blocks:,}",
                _cell(_median(samples[name].seconds(clock_for(1))), 3),
                _cell(held / 2**20),
            ]
        )
    table = markdown_table(["pattern", "density", "blocks", "s", "MiB"], rows)
    return (
        f"## Building\n\n{size.building:,} tokens in blocks of 64 (lsh: of its chunks), one head, one "
        f"thread; MiB: the lists and bits of the mask.\n\n{table}"
    )


SECTIONS: dict[str, Callable[[Size], str]] = {
    "density": density,
    "longformer": longformer,
    "window": window,
    "building": building,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="small problems, in a minute")
    # What a process that measures its own memory is told: length and direction.
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    if unknown := [name for name in parsed.sections if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    if parsed.peak:
        print(peak_bytes(*parsed.peak))
        return
    size = SMALL if parsed.quick else Size()
    print(f"# Block-sparse attention\n\n{render_machine(describe_machine())}", flush=True)
    for name in parsed.sections or SECTIONS:
        print(f"\n{SECTIONS[name](size)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
