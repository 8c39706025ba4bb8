"""What a CUDA kernel takes, predicted from what a tile of it executes.

A block computes a tile at a time.  What that needs of each resource of a multiprocessor is counted: products,
exponentials, single-precision operations, warp instructions, bytes of shared memory and of the L2 cache.  Two
times follow: *roofline*, if all resources work at once and the busiest one decides, and *in turns*, if no
product overlaps the softmax of a tile, as in a warp alone.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.occupancy import WARP, resident_blocks

from .chips import EXPONENTIALS, ISSUE, LDMATRIX_BYTES, MMA_FLOPS, SHARED, Chip, Figure

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ROOT / "csrc" / "core" / "variants.def"
REPORT = ROOT / "docs" / "cuda_report.md"

# Of a thread and a score.
FP32_PER_SCORE = Figure(4, "of a forward; forward_bf16_128 has 127 of 32")
FP32_PER_GRADIENT = Figure(2, "of a backward: the exponent and dS, an instruction each")
# Where docs/cuda_report.md does not know what a turn executes.
OTHERS_PER_SCORE = Figure(1.25, "forward_bf16_128: 40 of 32 scores; assumed for backward kernels too")
REGISTERS = Figure(255, "assumed where docs/cuda_report.md does not have the kernel: the most there are")
COUNTS = {
    "fp32 operations a score, forward": FP32_PER_SCORE,
    "fp32 operations a score, backward": FP32_PER_GRADIENT,
    "other instructions a score": OTHERS_PER_SCORE,
    "registers a thread": REGISTERS,
}

COPY_BYTES = 16 * WARP  # of a warp's cp.async

_FIELDS = {
    "FORWARD": "queries keys warps in_registers modified",
    "KEY_GRADIENT": "queries keys warps stages outputs modified",
    "QUERY_GRADIENT": "queries keys warps stages modified",
}


@dataclass(frozen=True)
class Kernel:
    """A line of csrc/core/variants.def.

    Attributes:
        kind: ``FORWARD`` and ``QUERY_GRADIENT`` own queries and stream keys and values, ``KEY_GRADIENT`` owns
            those and streams queries and gradients of outputs.
        key_columns, value_columns: of tiles; head dims are padded to them.
        queries, keys: of a tile.
        in_registers: the queries of a forward are read from shared memory once only.
        stages: tiles that are streamed at a time.
        outputs: of KEY_GRADIENT: ``key``, ``value`` or ``both``.
    """

    kind: str
    name: str
    element: str
    key_columns: int
    value_columns: int
    queries: int
    keys: int
    warps: int
    in_registers: bool = False
    modified: bool = False
    stages: int = 1
    outputs: str = "both"

    @property
    def bytes(self) -> int:
        """Of an element."""
        return 4 if self.element == "float" else 2

    @property
    def owned(self) -> int:
        """Rows that a block owns."""
        return self.keys if self.kind == "KEY_GRADIENT" else self.queries

    @property
    def streamed(self) -> int:
        """Rows of a tile that a block reads."""
        return self.queries if self.kind == "KEY_GRADIENT" else self.keys

    @property
    def products(self) -> list[int]:
        """Columns of each product of a tile; the other two extents are its queries and keys."""
        k, v = self.key_columns, self.value_columns
        return {
            "FORWARD": [k, v],
            "QUERY_GRADIENT": [k, v, k],
            "KEY_GRADIENT": {"both": [k, v, v, k], "key": [k, v, k], "value": [k, v]}[self.outputs],
        }[self.kind]

    @property
    def shared_bytes(self) -> int:
        """What is owned and what is streamed; a forward's output takes the place of its queries."""
        columns = self.key_columns + self.value_columns
        owned = max(self.key_columns, self.value_columns) if self.kind == "FORWARD" else columns
        return (self.owned * owned + self.stages * self.streamed * columns) * self.bytes


def parse_variants(text: str) -> tuple[list[Kernel], list[str]]:
    """The kernels on tensor cores of csrc/core/variants.def, and the kinds of lines that are not modelled.

    Raises:
        ValueError: a line of a known kind with other parameters than this module knows.
    """
    kernels, others = [], dict[str, None]()
    for line in text.splitlines():
        if not (match := re.fullmatch(r"([A-Z_]+)\((.*)\)\s*", line)):
            continue
        kind, (name, element, *values) = match[1], match[2].split(", ")
        if kind not in _FIELDS:
            others[kind] = None
            continue
        names = ["key_columns", "value_columns", *_FIELDS[kind].split()]
        if len(values) != len(names):
            raise ValueError(f"{kind} has {', '.join(['name', 'element', *names])}; got {line!r}")
        words = {"true": True, "false": False} | {
            f"KeyOutputs::{outputs}": outputs for outputs in ("both", "key", "value")
        }
        parsed = {n: words[v] if v in words else int(v) for n, v in zip(names, values, strict=True)}
        if element != "float":
            kernels.append(Kernel(kind, name, element, **parsed))
    return kernels, list(others)


class Compiled(NamedTuple):
    """A row of docs/cuda_report.md: of a thread, and what a warp executes for a tile, if that is known."""

    registers: int
    shared_bytes: int
    turn: int | None


def parse_report(text: str) -> dict[tuple[str, str], Compiled]:
    """The rows of docs/cuda_report.md by architecture and name."""
    rows = {}
    for arch, section in re.findall(r"^## sm_(\d+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        lines = [line for line in section.splitlines() if line.startswith("|")]
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        for cells in table[2:]:
            row = dict(zip(table[0], cells, strict=True))
            shared, turn = round(float(row["shared KiB"]) * 1024), row["turn"]
            compiled = Compiled(int(row["registers"]), shared, int(turn) if turn else None)
            rows[arch, row["kernel"].strip("`")] = compiled
    return rows


@dataclass(frozen=True)
class Work:
    """What a block executes for a tile, all warps together.

    Attributes:
        mma: m16n8k16 instructions.
        ldmatrix: ldmatrix.x4 instructions.
        exponentials: one for each score.
        copied: bytes from L2 to shared memory.
        fp32: single-precision warp instructions.
        instructions: warp instructions of all kinds.
    """

    mma: int
    ldmatrix: int
    exponentials: int
    copied: int
    fp32: float
    instructions: float

    def clocks(self, chip: Chip) -> dict[str, float]:
        """Clocks that each resource of a multiprocessor is busy."""
        return {
            "tensor": self.mma * MMA_FLOPS.value / chip.tensor.value,
            "shared": (self.ldmatrix * LDMATRIX_BYTES.value + self.copied) / SHARED.value,
            "L2": self.copied * chip.multiprocessors.value / chip.l2.value,
            "exp": self.exponentials / EXPONENTIALS.value,
            "fp32": self.fp32 * WARP / chip.fp32.value,
            "issue": self.instructions / ISSUE.value,
        }

    def in_turns(self, chip: Chip) -> float:
        """Clocks of the products and then of all else; copies run beside them."""
        busy = self.clocks(chip)
        others = self.instructions - self.mma - self.ldmatrix - self.copied / COPY_BYTES
        softmax = max(busy["exp"], busy["fp32"], others / ISSUE.value)
        return max(busy["L2"], max(busy["tensor"], busy["shared"]) + softmax)


def work(kernel: Kernel, compiled: Compiled | None = None) -> Work:
    """A tile's: counted from its shape, instructions from the report or else estimated."""
    rows, steps = min(kernel.warps, kernel.owned // 16), kernel.streamed // 16
    mma = kernel.queries * kernel.keys * sum(kernel.products) // 2048
    # Every group of warps with rows of its own reads what is streamed, for each product.  What is owned is
    # read for the products that it is an operand of: the scores and, of a backward, the gradients of weights;
    # by all warps that share its rows.
    ldmatrix = rows * steps * sum(kernel.products) // 16
    if not kernel.in_registers:
        operands = kernel.products[: 1 if kernel.kind == "FORWARD" or kernel.outputs == "value" else 2]
        ldmatrix += kernel.warps // rows * kernel.owned // 16 * sum(operands) // 16
    copied = kernel.streamed * (kernel.key_columns + kernel.value_columns) * kernel.bytes
    scores = kernel.queries * kernel.keys
    per_score = FP32_PER_SCORE if kernel.kind == "FORWARD" else FP32_PER_GRADIENT
    fp32 = per_score.value * scores / WARP
    if compiled is not None and compiled.turn is not None:
        return Work(mma, ldmatrix, scores, copied, fp32, compiled.turn * kernel.warps)
    others = (1 + OTHERS_PER_SCORE.value) * scores / WARP
    return Work(mma, ldmatrix, scores, copied, fp32, mma + ldmatrix + copied / COPY_BYTES + fp32 + others)


@dataclass(frozen=True)
class Problem:
    """Attention of batch x heads x length x head_dim, with as many keys as queries."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool = False
    kv_heads: int = 0  # as many as heads

    @property
    def flops(self) -> float:
        """Of a forward: 4 B H L L D, half when causal; a backward is 2.5 times that."""
        return 4.0 * self.batch * self.heads * self.length**2 * self.head_dim * (0.5 if self.causal else 1)

    @property
    def memory_bytes(self) -> int:
        """Of a forward in 16 bits: query, key, value and output once each, and two floats a row."""
        rows = self.batch * self.heads * self.length
        keys = self.batch * (self.kv_heads or self.heads) * self.length
        return (2 * rows + 2 * keys) * self.head_dim * 2 + 8 * rows


@dataclass(frozen=True)
class Prediction:
    """For a problem.

    Attributes:
        roofline, in_turns: seconds.
        bound: the resource that decides the roofline; "turns" where nothing can overlap.
        blocks: of the grid.
        resident: blocks that a multiprocessor holds.
    """

    roofline: float
    in_turns: float
    bound: str
    blocks: int
    resident: int


def tiles_of_blocks(kernel: Kernel, problem: Problem) -> list[int]:
    """How many tiles each block of a head visits, in the order that they start: longest first when causal."""
    blocks = -(-problem.length // kernel.owned)
    most = -(-problem.length // kernel.streamed)
    if not problem.causal:
        return [most] * blocks
    ends = (min(problem.length, (i + 1) * kernel.owned) for i in range(blocks))
    return sorted((-(-end // kernel.streamed) for end in ends), reverse=True)


def schedule(durations: Iterable[int], processors: int) -> int:
    """When the last of the blocks ends, each of which starts on the processor that is free first."""
    free = [0] * processors
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def predict(chip: Chip, kernel: Kernel, problem: Problem, compiled: Compiled | None = None) -> Prediction:
    """What a kernel takes for a problem, without its launch, prologues and epilogues.

    Blocks that share a multiprocessor share its resources: together they take as long as one after the other,
    so waves are of multiprocessors.  How many are resident decides whether anything overlaps: a scheduler
    with a single warp takes turns.

    Raises:
        ValueError: the kernel does not fit the chip.
    """
    tile = work(kernel, compiled)
    registers, shared = compiled[:2] if compiled else (int(REGISTERS.value), kernel.shared_bytes)
    resident = resident_blocks(chip.arch, kernel.warps * WARP, registers, shared)
    if not resident:
        raise ValueError(f"{kernel.name} does not fit {chip.name}: {registers} registers, {shared} bytes")
    durations = tiles_of_blocks(kernel, problem) * (problem.batch * problem.heads)
    processors = int(chip.multiprocessors.value)
    together = min(resident, -(-len(durations) // processors))
    busy, turns = tile.clocks(chip), tile.in_turns(chip)
    bound = max(busy, key=busy.__getitem__)
    overlapped = busy[bound]
    if together * kernel.warps < 2 * ISSUE.value:
        bound, overlapped = "turns", turns
    tiles = schedule(durations, processors)
    roofline, in_turns = (tiles * clocks / chip.clock.value for clocks in (overlapped, turns))
    # A pass of a backward reads q, k, v and dO, a forward's four, and writes one or two of them.
    memory = problem.memory_bytes * (1 if kernel.kind == "FORWARD" else 1.5) / chip.memory.value
    if memory > roofline:
        bound = "memory"
    return Prediction(max(roofline, memory), max(in_turns, memory), bound, len(durations), resident)


def decode_seconds(chip: Chip, problem: Problem, bytes_per_element: int = 2) -> float:
    """A step of generation: reading the cache once, by as many blocks as it takes."""
    rows = problem.batch * (problem.kv_heads or problem.heads) * problem.length
    return 2 * rows * problem.head_dim * bytes_per_element / chip.memory.value
