"""``python -m benchmarks.roofline``: what the CUDA kernels should take, and what speaks for their tiles.

Prints the assumptions, what they make of FlashAttention-2, which uses the same instructions and is published,
and predictions for the tiles of csrc/core/variants.def.  Nothing is timed: benchmarks/kernel_model.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .chips import CHIPS, COMMON, Chip, chip, figures, figures_table
from .kernel_model import (
    COUNTS,
    REPORT,
    VARIANTS,
    Compiled,
    Kernel,
    Prediction,
    Problem,
    Work,
    decode_seconds,
    parse_report,
    parse_variants,
    predict,
    work,
)
from .report import markdown_table

Report = Mapping[tuple[str, str], Compiled]

# Not compiled, as it spills registers: two blocks of 16 queries a warp share what it reads of keys, values.
ALTERNATIVES = """
FORWARD(bf16_128_wide, BFloat16, 128, 128, 128, 64, 4, false, false)
"""
_NOT_COMPILED = {kernel.name for kernel in parse_variants(ALTERNATIVES)[0]}
SCORES = 64 * 64  # to which clocks of tiles are brought


class Peer(NamedTuple):
    """A kernel of FlashAttention-2, as nvcc 13.0 compiles it for sm_80, and how fast it is said to be."""

    chip: str
    name: str
    work: Work
    flops: float  # of a tile
    published: float  # TFLOP/s
    source: str


def _peer(tile: tuple[int, int], warps: int, counts: Sequence[int], copied: int) -> Work:
    """From a warp's mma, ldmatrix, fp32 and all instructions; maxima, one a score, are assumed."""
    mma, ldmatrix, fp32, instructions = (count * warps for count in counts)
    return Work(mma, ldmatrix, tile[0] * tile[1], copied, fp32, instructions)


_FORWARD_128 = _peer((128, 64), 4, (256, 80, 332, 914), 32768)
_FORWARD_64 = _peer((128, 128), 4, (256, 72, 460, 1167), 32768)
_BACKWARD_128 = _peer((64, 128), 8, (320, 144, 100, 977), 32768)
_FLOPS = 4 * 128 * 64 * 128.0  # of each of these forwards; the backward has five products instead of two
PEERS = (
    Peer("A100", "forward, 128", _FORWARD_128, _FLOPS, 0.73 * 312, "FlashAttention-2: up to 73 % of 312"),
    Peer("A100", "backward, 128", _BACKWARD_128, 2.5 * _FLOPS, 0.63 * 312, "FlashAttention-2: up to 63 %"),
    Peer("H100", "forward, 128", _FORWARD_128, _FLOPS, 370, "FlashAttention-3, figure of FlashAttention-2"),
    Peer("B200", "forward, 128", _FORWARD_128, _FLOPS, 362, "meta-pytorch/tritonbench, pull request 171"),
    Peer("B200", "forward, 64", _FORWARD_64, _FLOPS, 379, "Dao-AILab/flash-attention, issue 1589"),
)


def render(chips: Sequence[Chip], kernels: Sequence[Kernel], others: Sequence[str], report: Report) -> str:
    """The page."""
    kernels = [kernel for kernel in kernels if kernel.element == "BFloat16" and not kernel.modified]
    parts = [_INTRODUCTION, _assumptions(chips), _published(chips)]
    for of in chips:
        parts += [f"## {of.name}", _tiles(of, kernels, report), _forwards(of, kernels, report)]
        parts += [table for table in (_backwards(of, kernels, report), _decode(of)) if table]
    parts.append("## Choices\n\n" + "\n".join(f"- {line}" for line in arguments(chips, kernels, report)))
    parts.append(_FALSIFIED)
    if others:
        parts.append(f"Kinds of csrc/core/variants.def whose tiles are not modelled: {', '.join(others)}.")
    return "\n\n".join(parts) + "\n"


def _assumptions(chips: Sequence[Chip]) -> str:
    tables = [figures_table(figures(of), of.name) for of in chips]
    tables.append(figures_table(COMMON, "each multiprocessor, a clock"))
    tables.append(figures_table(COUNTS, "instructions"))
    return f"## Assumptions\n\n{_UNITS}\n\n" + "\n\n".join(tables)


def _rate(of: Chip, flops: float, clocks: float) -> float:
    """TFLOP/s of all multiprocessors."""
    return flops / clocks * of.multiprocessors.value * of.clock.value / 1e12


def _published(chips: Sequence[Chip]) -> str:
    rows = []
    for peer in PEERS:
        if (of := CHIPS[peer.chip]) not in chips:
            continue
        turns, bound = peer.work.in_turns(of), max(peer.work.clocks(of).values())
        rates = [_rate(of, peer.flops, clocks) for clocks in (turns, bound)]
        cells = [f"{rate:.0f}" for rate in (peer.published, *rates)]
        rows.append([f"{peer.chip}, {peer.name}", *cells, f"{peer.published / rates[0]:.2f}", peer.source])
    header = ["FlashAttention-2", "published", "in turns", "roofline", "published / in turns", "source"]
    return f"## Against published figures\n\n{_CHECK}\n\n{markdown_table(header, rows)}" if rows else ""


def _compiled(of: Chip, kernel: Kernel, report: Report) -> Compiled | None:
    return report.get((of.arch, f"{kernel.kind.lower()}_{kernel.name}"))


def _label(kernel: Kernel) -> str:
    sizes = f"{kernel.queries} x {kernel.keys}, {kernel.warps} warps"
    return f"{kernel.kind.lower()}_{kernel.name}, {sizes}{', not compiled' * (kernel.name in _NOT_COMPILED)}"


def _tiles(of: Chip, kernels: Sequence[Kernel], report: Report) -> str:
    """Clocks of each resource."""
    rows, resources = [], []
    for kernel in kernels:
        tile = work(kernel, _compiled(of, kernel, report))
        share = SCORES / tile.exponentials
        busy = tile.clocks(of)
        resources = list(busy)
        most = max(busy.values())
        cells = [f"**{n * share:.0f}**" if n == most else f"{n * share:.0f}" for n in busy.values()]
        rows.append([_label(kernel), *cells, f"{tile.in_turns(of) * share:.0f}"])
    title = "Clocks that a multiprocessor needs for 64 x 64 scores, of each resource and in turns:"
    return f"{title}\n\n{markdown_table(['kernel', *resources, 'in turns'], rows)}"


def _columns(problem: Problem, kernels: Sequence[Kernel], kind: str) -> list[Kernel]:
    """The kernels of a kind with a problem's columns."""
    sizes = problem.head_dim, problem.head_dim
    return [k for k in kernels if k.kind == kind and (k.key_columns, k.value_columns) == sizes]


_PROBLEMS = (
    Problem(4, 32, 4096, 64),
    Problem(4, 32, 4096, 64, causal=True),
    Problem(4, 16, 4096, 128),
    Problem(4, 16, 4096, 128, causal=True),
    Problem(1, 32, 512, 64),
    Problem(1, 32, 512, 128),
)


def _name(problem: Problem) -> str:
    heads = f"{problem.heads}/{problem.kv_heads}" if problem.kv_heads else f"{problem.heads}"
    shape = f"{problem.batch}x{heads}x{problem.length}x{problem.head_dim}"
    return f"{'causal ' * problem.causal}{shape}"


_HEADER = [
    "problem",
    "kernel",
    "blocks",
    "resident",
    "bound",
    "ms",
    "TFLOP/s",
    "ms in turns",
    "TFLOP/s in turns",
]


def _times(roofline: float, in_turns: float, flops: float) -> list[str]:
    return [text for s in (roofline, in_turns) for text in (f"{s * 1e3:.3g}", f"{flops / s / 1e12:.0f}")]


def _row(problem: Problem, kernel: Kernel, of: Chip, report: Report) -> list[str]:
    found = predict(of, kernel, problem, _compiled(of, kernel, report))
    counts = [str(found.blocks), str(found.resident), found.bound]
    return [_name(problem), kernel.name, *counts, *_times(found.roofline, found.in_turns, problem.flops)]


def _forwards(of: Chip, kernels: Sequence[Kernel], report: Report) -> str:
    rows = [_row(p, k, of, report) for p in _PROBLEMS for k in _columns(p, kernels, "FORWARD")]
    return f"Forward:\n\n{markdown_table(_HEADER, rows)}"


def backward(
    of: Chip, kernels: Sequence[Kernel], problem: Problem, report: Report
) -> list[tuple[Kernel, Prediction]]:
    """The fastest kernels for the gradients of keys and values, in one pass or in two, and of queries.

    Returns:
        Nothing where there are not all of them.
    """

    def fastest(kind: str, wanted: Callable[[Kernel], bool]) -> list[tuple[Kernel, Prediction]]:
        found = []
        for kernel in filter(wanted, _columns(problem, kernels, kind)):
            try:
                found.append((kernel, predict(of, kernel, problem, _compiled(of, kernel, report))))
            except ValueError:  # does not fit
                continue
        return sorted(found, key=lambda pair: pair[1].roofline)[:1]

    def seconds(passes: list[tuple[Kernel, Prediction]]) -> float:
        return sum(found.roofline for _, found in passes)

    queries = fastest("QUERY_GRADIENT", lambda kernel: True)
    both, key, value = (
        fastest("KEY_GRADIENT", lambda k, o=o: k.outputs == o) for o in ("both", "key", "value")
    )
    ways = [way for way in (both, key + value if key and value else []) if way]
    return [*min(ways, key=seconds), *queries] if ways and queries else []


def _backwards(of: Chip, kernels: Sequence[Kernel], report: Report) -> str:
    rows = []
    for problem in _PROBLEMS[:4]:
        passes = backward(of, kernels, problem, report)
        forward = [k for k in _columns(problem, kernels, "FORWARD") if k.name not in _NOT_COMPILED]
        if not passes or not forward:
            continue
        first = min(
            (predict(of, k, problem, _compiled(of, k, report)) for k in forward), key=lambda f: f.roofline
        )
        names = " + ".join(f"{kernel.kind.lower()}_{kernel.name} ({found.bound})" for kernel, found in passes)
        delta = problem.memory_bytes / 2 / of.memory.value  # rows of dO times O
        times = [
            delta + sum(getattr(found, which) for _, found in passes) for which in ("roofline", "in_turns")
        ]
        rows.append([_name(problem), names, *_times(*times, 2.5 * problem.flops)])
        whole = [times[0] + first.roofline, times[1] + first.in_turns]
        rows.append([_name(problem), "forward + backward", *_times(*whole, 3.5 * problem.flops)])
    header = [_HEADER[0], "kernels", *_HEADER[5:]]
    title = "Backward, as 2.5 forwards, and both:"
    return f"{title}\n\n{markdown_table(header, rows)}" if rows else ""


_CACHES = tuple(Problem(batch, 32, 8192, 128, kv_heads=8) for batch in (1, 8, 64))


def _decode(of: Chip) -> str:
    rows = [[_name(cache), f"{decode_seconds(of, cache) * 1e6:.1f}"] for cache in _CACHES]
    return (
        f"A step of generation over a cache of 16 bits, read once:\n\n{markdown_table(['cache', 'us'], rows)}"
    )


def arguments(chips: Sequence[Chip], kernels: Sequence[Kernel], report: Report) -> list[str]:
    """A line for each choice of a tile."""
    by_name = {kernel.name: kernel for kernel in kernels if kernel.kind == "FORWARD"}
    lines = []
    for of in chips:
        for head_dim in (64, 128):
            short, long, wide = (by_name.get(f"bf16_{head_dim}{end}") for end in ("", "_long", "_wide"))
            if not short or not long:
                continue

            def ratios(
                kernel: Kernel, problem: Problem, of: Chip = of, short: Kernel = short
            ) -> tuple[float, float]:
                one, other = (predict(of, k, problem, _compiled(of, k, report)) for k in (kernel, short))
                return one.roofline / other.roofline, one.in_turns / other.in_turns

            many, few = Problem(4, 16, 4096, head_dim), Problem(1, 4, 1024, head_dim)
            # The selector takes it from two blocks a multiprocessor on.
            heads = range(-(-2 * int(of.multiprocessors.value) // 8), 128)
            worst = max(ratios(long, Problem(1, count, 1024, head_dim)) for count in heads)
            line = (
                f"{of.name}, head_dim {head_dim}: 128 queries by {long.warps} warps take "
                f"{_both(ratios(long, many))} of "
            )
            line += (
                f"what 64 by 4 take for {_name(many)}, {_both(ratios(long, few))} for {_name(few)}, and, for "
            )
            line += f"the last wave, at most {_both(worst)} where the selector takes them"
            if wide:
                line += f"; by 4 warps, which is not compiled, {_both(ratios(wide, many))}"
            lines.append(f"{line}.")
    return lines


def _both(ratios: tuple[float, float]) -> str:
    return f"{ratios[0]:.2f} (in turns {ratios[1]:.2f})"


_INTRODUCTION = """# What the CUDA kernels should take

Predicted, not measured: **no kernel was timed, on any GPU**.  `python -m benchmarks.roofline --out
docs/roofline.md` counts what a tile of a kernel executes (from its line of csrc/core/variants.def and from
docs/cuda_report.md) and divides it by what a GPU can do.

- *roofline*: every resource of a multiprocessor works all the time that it can, and the busiest decides.
- *in turns*: the products of a tile, then its softmax; only copies overlap.  A warp alone does that.

No factor makes them fit.  A kernel should be no faster than its roofline; it may be slower than in turns, as
latency, barriers, launches, prologues, spilled registers and clocks below the datasheet's are left out.
Further:

- What is copied to shared memory takes of its bandwidth as what is read from it does.
- Keys and values come from memory once and then from the L2 cache.
- Tiles that a mask cuts cost as much as whole ones; causal problems count half of the products.
- Blocks start in their order on the multiprocessor that is free first.
- Of backwards, weights stay in registers between products.
- Kernels of fp32 and of modified scores are not modelled; decoding takes what its cache takes to be read."""

_UNITS = """Clocks in Hz, memory in bytes a second; L2 in bytes a clock for all multiprocessors together,
tensor in FLOP and fp32 in operations a clock for each."""

_CHECK = """TFLOP/s of long sequences, from the instructions of FlashAttention-2's loops as nvcc 13.0 compiles
them for sm_80: those of docs/cuda_report.md, and 977 of a warp for 64 x 128 scores of the backward.  All of
them count as executed."""

_FALSIFIED = """## What would contradict this

- A kernel faster than its roofline at the clock assumed: a figure of the chip is wrong, the rate of
  `mma.sync` or of shared memory first.  A loop of independent mma, or of ldmatrix, measures either.
- Tensor cores busier than shared memory where *shared* is said to bind, or the reverse: in Nsight Compute,
  the tensor pipe's share of active cycles beside the wavefronts of shared memory.
- On an A100, `bf16_128_long` that is no faster than `bf16_128` for 4x16x4096x128: copies then do not compete
  with ldmatrix for shared memory.
- Warp instructions executed, divided by the tiles visited, 5 % off those assumed (*issue*, times 4).
- A kernel further below its in turns than FlashAttention-2 is below its own: something not modelled binds."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default=",".join(CHIPS), metavar="NAMES", help="separated by commas")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the page there")
    options = parser.parse_args(argv)
    try:
        chips = [chip(name) for name in options.chips.split(",")]
    except ValueError as error:
        parser.error(str(error))
    kernels, others = parse_variants(VARIANTS.read_text() + ALTERNATIVES)
    page = render(chips, kernels, others, parse_report(REPORT.read_text()))
    print(page, end="")
    if options.out:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
