"""The kernels of csrc/core/variants.def, and the problems that lead to each."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from emulated import A100, Device
from programs import ROOT

ELEMENTS = {"BFloat16": torch.bfloat16, "Float16": torch.float16, "float": torch.float32}
ONE_PROCESSOR = A100._replace(processors=1)  # on which few queries are many


class Variant(NamedTuple):
    """A line FORWARD(..)."""

    name: str
    dtype: torch.dtype
    key_columns: int
    value_columns: int
    queries: int  # of a tile
    keys: int
    warps: int
    query_in_registers: bool
    modified: bool

    @property
    def device(self) -> Device:
        """One on which the selector takes it for heads of just its size."""
        return ONE_PROCESSOR if self.name.endswith("_long") else A100

    @property
    def bytes(self) -> int:
        """Of an element."""
        return self.dtype.itemsize

    @property
    def shared_bytes(self) -> int:
        """The tiles of queries, which the output takes over, of keys, and of values."""
        columns = max(self.key_columns, self.value_columns)
        elements = self.queries * columns + self.keys * (self.key_columns + self.value_columns)
        return elements * self.bytes


def _parse(line: str) -> Variant:
    name, element, *sizes, in_registers, modified = re.fullmatch(r"FORWARD\((.*)\)", line)[1].split(", ")
    return Variant(name, ELEMENTS[element], *map(int, sizes), in_registers == "true", modified == "true")


VARIANTS = tuple(
    _parse(line)
    for line in (ROOT / "csrc" / "core" / "variants.def").read_text().splitlines()
    if line.startswith("FORWARD(")
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
