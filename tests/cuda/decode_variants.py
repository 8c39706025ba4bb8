"""The decoding kernels of csrc/core/variants.def, and the problems that lead to each."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import test_decode
import torch
from forward_variants import ELEMENTS
from programs import ROOT
from test_decode import LARGEST, Problem

from attn_ext import testing

ROWS = TILE = 16  # of a block; keys that a warp takes at a time
LEAST_KEYS, MOST_RANGES = 256, 64  # of a range; of a sequence


class DecodeVariant(NamedTuple):
    """A line DECODE(..)."""

    name: str
    dtype: torch.dtype
    columns: int
    warps: int
    ahead: int  # tiles of keys and of values in flight
    blocks: int  # of a multiprocessor
    quantised: bool

    @property
    def caches(self) -> tuple[torch.dtype, ...]:
        """What it reads."""
        return tuple(LARGEST) if self.quantised else (self.dtype,)

    @property
    def shared_bytes(self) -> int:
        """Tiles, or the warps' outputs and states; and the queries."""
        cached = TILE * self.columns * (1 if self.quantised else self.dtype.itemsize)
        operand = TILE * self.columns * self.dtype.itemsize
        tiles = self.warps * (2 * self.ahead * cached + self.quantised * operand)
        outputs = self.warps * ROWS * (4 * self.columns + 8)
        largest = tiles if tiles > outputs else -(-outputs // 1024) * 1024
        return largest + operand

    def problem(self, lengths: tuple[int, ...], cache: torch.dtype, **sizes: Any) -> tuple[Problem, dict]:
        """One for which it is taken, and the options that go with the cache."""
        sizes = {"head_dim": self.columns, **sizes}
        if cache == self.dtype:
            return Problem(lengths, dtype=self.dtype, **sizes), {}
        problem = Problem(lengths, **sizes)
        scales = test_decode.quantise(problem, cache)
        problem.query = problem.query.to(self.dtype)
        problem.new = {name: rows.to(self.dtype) for name, rows in problem.new.items()}
        return problem, scales


def read_back(problem: Problem, scales: dict[str, torch.Tensor]) -> None:
    """Makes the problem's keys and values what its caches hold."""
    for rows, cache, scale in (
        (problem.keys, problem.key_cache, "key_scale"),
        (problem.values, problem.value_cache, "value_scale"),
    ):
        bits = cache.view(torch.int8) if cache.dtype in LARGEST else cache
        for b, row in enumerate(rows):
            page, _, _ = at = problem.place(b, torch.arange(row.size(1)))
            stored = bits[at].view(cache.dtype)
            stored = stored.float() * scales[scale][page][:, :, None] if scale in scales else stored
            rows[b] = stored.transpose(0, 1)


def check_means(problem: Problem, scale: float) -> None:
    """All keys are made the same: outputs of a single query are means of values."""
    for rows in (problem.query, problem.key_cache, *problem.keys):
        rows.fill_(0.5)
    out, _ = problem.decode(scale=scale)
    for b, values in enumerate(problem.values):
        exact, plain = (v.mean(1, keepdim=True) for v in (values.double(), values))
        for head in range(out.shape[1]):
            kv_head = head * values.size(0) // out.shape[1]
            rows = out[b, head], exact[kv_head], plain[kv_head]
            testing.assert_within_rule(*rows, testing.FORWARD_FACTOR, least=1e-7)


def _parse(line: str) -> DecodeVariant:
    name, element, *sizes, quantised = re.fullmatch(r"DECODE\((.*)\)", line)[1].split(", ")
    return DecodeVariant(name, ELEMENTS[element], *map(int, sizes), quantised == "true")


VARIANTS = tuple(
    _parse(line)
    for line in (ROOT / "csrc" / "core" / "variants.def").read_text().splitlines()
    if line.startswith("DECODE(")
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
CASES = tuple((variant, cache) for variant in VARIANTS for cache in variant.caches)
IDS = tuple(
    f"{variant.name}-{str(cache).removeprefix('torch.')}" if variant.quantised else variant.name
    for variant, cache in CASES
)
