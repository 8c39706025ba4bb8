"""The backward kernels of csrc/core/variants.def, and what of them a problem runs."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from emulated import A100, Device
from forward_variants import ELEMENTS
from programs import ROOT


class KeyVariant(NamedTuple):
    """A line KEY_GRADIENT(..)."""

    name: str
    dtype: torch.dtype
    key_columns: int
    value_columns: int
    queries: int  # of a tile
    keys: int
    warps: int
    stages: int
    outputs: str  # both, key or value
    modified: bool


class QueryVariant(NamedTuple):
    """A line QUERY_GRADIENT(..)."""

    name: str
    dtype: torch.dtype
    key_columns: int
    value_columns: int
    queries: int
    keys: int
    warps: int
    stages: int
    modified: bool


class BiasVariant(NamedTuple):
    """A line BIAS_GRADIENT(..)."""

    name: str
    dtype: torch.dtype
    key_columns: int
    value_columns: int
    queries: int
    keys: int
    warps: int


def _fields(kind: str) -> list[list[str]]:
    lines = (ROOT / "csrc" / "core" / "variants.def").read_text().splitlines()
    matches = (re.fullmatch(rf"{kind}\((.*)\)", line) for line in lines)
    return [match[1].split(", ") for match in matches if match]


def _sizes(name: str, element: str, *sizes: str) -> tuple:
    return name, ELEMENTS[element], *map(int, sizes)


KEY_VARIANTS = tuple(
    KeyVariant(*_sizes(*fields[:-2]), fields[-2].removeprefix("KeyOutputs::"), fields[-1] == "true")
    for fields in _fields("KEY_GRADIENT")
)
QUERY_VARIANTS = tuple(
    QueryVariant(*_sizes(*fields[:-1]), fields[-1] == "true") for fields in _fields("QUERY_GRADIENT")
)
BIAS_VARIANTS = tuple(BiasVariant(*_sizes(*fields)) for fields in _fields("BIAS_GRADIENT"))


class Pass(NamedTuple):
    """The kernels of one backward pass: those of one name."""

    keys: tuple[KeyVariant, ...]  # one of both outputs, or one of each
    query: QueryVariant

    @property
    def device(self) -> Device:
        """One on which the selector takes them, however few the queries are."""
        return A100._replace(processors=0) if self.query.name.endswith("_long") else A100

    @property
    def kernels(self) -> list[str]:
        names = [f"flash_key_gradient_{variant.name}" for variant in self.keys]
        return [*names, f"flash_query_gradient_{self.query.name}"]


def _keys_of(name: str) -> tuple[KeyVariant, ...]:
    name = name.removesuffix("_long")
    for_value = f"{name.removesuffix('_modified')}_value{'_modified' * name.endswith('_modified')}"
    return tuple(variant for variant in KEY_VARIANTS if variant.name in (name, for_value))


PASSES = {query.name: Pass(_keys_of(query.name), query) for query in QUERY_VARIANTS}
