"""What CUDA backward kernels execute: products, exponentials, barriers, copies; which tiles they visit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from emulated import emulated
from gradient_variants import PASSES, KeyVariant, QueryVariant
from problems import make_block_mask, make_inputs, run
from programs import ROOT
from test_backward import LAYOUTS, is_ambiguous
from test_forward_counters import BY_ELEMENT, MASKS, tiles_of

from attn_ext import Causal

HEADS, GROUP = 2, 2


class Ran(NamedTuple):
    """A kernel of a backward pass."""

    variant: KeyVariant | QueryVariant
    launch: dict[str, int]
    sites: list[dict[str, Any]]  # of access

    @property
    def copies(self) -> tuple[int, int]:
        """Pieces of 16 bytes that a block copies of its own, and for each tile that it visits."""
        v = self.variant

        def chunks(rows: int, columns: int) -> int:
            return rows * columns * v.dtype.itemsize // 16

        if isinstance(v, QueryVariant):
            columns = v.key_columns + v.value_columns
            return chunks(v.queries, columns), chunks(v.keys, columns)
        own = v.key_columns + (v.value_columns if v.outputs != "value" else 0)
        terms = v.queries * 3 * 4 // 16  # normalizer and, twice, D of a row
        return chunks(v.keys, own), chunks(v.queries, v.key_columns + v.value_columns) + terms

    @property
    def blocks(self) -> int:
        return self.launch["grid"][0]

    @property
    def visits(self) -> int:
        """How many tiles were copied."""
        own, each = self.copies
        tiles, rest = divmod(self.launch["cp_async"] - self.blocks * own, each)
        assert rest == 0
        return tiles

    @property
    def partial(self) -> int:
        """How many of them had to be masked: these cost another barrier."""
        each = 2 if self.variant.stages == 1 else 1
        return self.launch["barriers"] - 2 * self.blocks - each * self.visits

    def read(self, copy: str) -> int:
        """Bytes of global memory that this copy read, of its own or by copy_met."""
        met = (
            ("query_copy", "grad_copy")
            if isinstance(self.variant, KeyVariant)
            else ("key_copy", "value_copy")
        )
        name = dict(zip(met, ("first", "second"), strict=True)).get(copy, copy)
        sites = (site for site in self.sites if site["space"] == "global" and site["operation"] == "read")
        return sum(
            site["lanes"] * site["bytes"]
            for site in sites
            if any(line.lstrip().startswith(f"{name}.") for line in source_lines(site))
        )


def source_lines(site: dict[str, Any]) -> Iterator[str]:
    """The lines that an access belongs to, of the kernel and of what it calls."""
    for place in site["where"].split(" < "):
        name, _, line = place.partition(":")
        yield (ROOT / "csrc" / "cuda" / name).read_text().splitlines()[int(line) - 1]


def differentiate(
    name: str,
    query_len: int,
    kv_len: int,
    heads: int = HEADS,
    group: int = GROUP,
    layout: str = "",
    **options: Any,
) -> list[Ran]:
    """The kernels of a pass, of keys and then of queries."""
    query = PASSES[name].query
    inputs = make_inputs(
        *(1, heads, query_len, kv_len, query.key_columns),
        value_dim=query.value_columns,
        group=group,
        dtype=query.dtype,
    )
    grad_out = torch.randn(1, heads, query_len, query.value_columns, dtype=query.dtype)
    if layout:
        *inputs, grad_out = map(LAYOUTS[layout], (*inputs, grad_out))
    if is_ambiguous(name):
        options["alibi_slopes"] = torch.rand(heads)  # what costs none of the instructions that are counted
    with emulated(device=PASSES[name].device, access_sites=True) as running:
        run(*inputs, grad_out=grad_out, **options)
        statistics = running.statistics()
    launches = {launch["kernel"]: launch for launch in statistics["launches"]}
    variants = (*PASSES[name].keys, PASSES[name].query)
    assert all(launch["atomics"] == 0 for launch in launches.values())
    return [
        Ran(variant, launches[kernel], [site for site in statistics["sites"] if site["kernel"] == kernel])
        for variant, kernel in zip(variants, PASSES[name].kernels, strict=True)
    ]


@pytest.mark.parametrize("name", PASSES)
def test_instructions(name: str) -> None:
    query_len, kv_len = 128, 192
    for ran in differentiate(name, query_len, kv_len):
        v, launch = ran.variant, ran.launch
        key_steps, value_steps = v.key_columns // 16, v.value_columns // 16
        pairs = HEADS * (query_len // v.queries) * (kv_len // v.keys)  # tiles that meet
        assert ran.visits == pairs
        if isinstance(v, QueryVariant):
            assert ran.blocks == HEADS * query_len // v.queries
            rows, others = v.queries, v.keys
            left, right = key_steps + value_steps, key_steps  # of S and dP, and of dQ
        else:
            assert ran.blocks == HEADS // GROUP * kv_len // v.keys
            rows, others = v.keys, v.queries
            left = key_steps + (value_steps if v.outputs != "value" else 0)
            right = {"both": key_steps + value_steps, "key": key_steps, "value": value_steps}[v.outputs]
        tensor_cores = v.dtype != torch.float32
        assert launch["mma_m16n8k16"] == tensor_cores * pairs * rows // 16 * others // 8 * (left + right)
        loads = left * (rows // 16 + v.warps * others // 16) + right * v.warps * others // 16
        assert launch["ldmatrix"] == tensor_cores * pairs * loads
        assert launch["sfu"] == pairs * v.queries * v.keys
        assert launch["barriers"] == 2 * ran.blocks + pairs * (2 if v.stages == 1 else 1)
        assert ran.partial == 0
        assert launch["cp_async_bytes"] == 16 * launch["cp_async"]
        copies = [site for site in ran.sites if "ptx.cuh" in site["where"] and site["space"] == "global"]
        assert {site["bytes"] for site in copies} == {16}


@pytest.mark.parametrize("name", PASSES)
def test_bytes_of_each_tensor(name: str) -> None:
    """Whole lengths: of what a block owns once, of all else as often as tiles meet it."""
    query_len, kv_len = 128, 192
    *of_keys, of_query = differentiate(name, query_len, kv_len)
    for ran in (*of_keys, of_query):
        v = ran.variant
        key_row, value_row = (columns * v.dtype.itemsize for columns in (v.key_columns, v.value_columns))
        kv_tiles, query_tiles = kv_len // v.keys, query_len // v.queries
        if ran is of_query:
            times_query, times_key = 1, HEADS * query_tiles
            of_value = True
        else:
            times_query, times_key = kv_tiles, HEADS // GROUP
            of_value = ran.variant.outputs != "value"
        assert ran.read("query_copy") == HEADS * query_len * key_row * times_query
        assert ran.read("grad_copy") == HEADS * query_len * value_row * times_query
        assert ran.read("key_copy") == kv_len * key_row * times_key
        assert ran.read("value_copy") == of_value * kv_len * value_row * times_key


@pytest.mark.parametrize("layout", ["", "heads last"])
@pytest.mark.parametrize("name", PASSES)
def test_no_transaction_is_wasted(name: str, layout: str) -> None:
    for ran in differentiate(name, 69, 131, layout=layout, mask=Causal("bottom_right")):
        for site in ran.sites:
            if site["bytes"] == 16 or site["space"] == "shared":
                assert site.get("wavefronts", site.get("sectors")) == site["ideal"], site


def meetings(
    ran: Ran, parts: tuple, query_len: int, kv_len: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of which tiles of queries and keys any pair is visible, and of which all are."""
    visited, whole = tiles_of(torch.ones(heads, query_len, kv_len, dtype=torch.bool), ran.variant)
    for part in parts:
        any_pair, all_pairs = tiles_of(part.to_dense(1, heads, query_len, kv_len)[0], ran.variant)
        visited, whole = visited & any_pair, whole & all_pairs
    return visited, whole


@pytest.mark.parametrize("lengths", [(300, 300), (130, 450), (1, 257)], ids=str)
@pytest.mark.parametrize("name", ["bf16_64", "f16_128_long", "f32_32"])
@pytest.mark.parametrize("mask", MASKS)
def test_tiles_that_nothing_sees_are_skipped(mask: str, name: str, lengths: tuple[int, int]) -> None:
    """And of the others, those whole are not masked."""
    if "blocks" in mask:
        name = name.removesuffix("_long")  # whose tiles are larger than the blocks
    parts = MASKS[mask](*lengths)
    combined = functools.reduce(operator.and_, parts) if parts else None
    for ran in differentiate(name, *lengths, mask=combined):
        visited, whole = meetings(ran, parts, *lengths, HEADS)
        assert ran.visits == visited.sum()
        if mask not in BY_ELEMENT:
            assert ran.partial == (visited & ~whole).sum()
        assert ran.partial >= (visited & ~whole).sum()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", ["bf16_64", "f16_192_modified", "bf16_64_modified"])
def test_one_block_in_twenty(name: str, heads: int) -> None:
    """Of blocks that are tiles of both kernels, those listed are visited and no others."""
    sizes = 1, heads, 640, 640
    mask = make_block_mask(sizes, (64, 64), 0.05, 0.0)
    for ran in differentiate(name, *sizes[2:], heads=2, group=1, mask=mask):
        visited, _ = meetings(ran, (mask,), *sizes[2:], 2)
        listed = mask.to_dense(1, 2, 640, 640)[0].sum()
        assert ran.visits == visited.sum() == listed // (ran.variant.queries * ran.variant.keys)
        assert ran.partial == 0


@pytest.mark.parametrize("name", ["f16_64", "bf16_192_modified", "f32_256"])
def test_what_is_not_finite_costs_two_barriers_more(name: str) -> None:
    """In tiles that a mask cuts, where a row may not see it."""
    query = PASSES[name].query
    inputs = make_inputs(1, 1, 64, 64, query.key_columns, value_dim=query.value_columns, dtype=query.dtype)
    barriers = []
    for bad in (0.0, torch.inf):
        inputs[1][:, :, 50] = inputs[0][:, :, 50] = bad
        with emulated() as running:
            run(*inputs, mask=Causal())
            launches = running.statistics()["launches"]
        barriers.append([launch["barriers"] for launch in launches if "_gradient_" in launch["kernel"]])
    queries, keys = query.queries, query.keys
    *of_keys, of_query = (after - before for before, after in zip(*barriers, strict=True))
    # Of keys, the tiles of query 50 that the diagonal cuts; of queries, those of key 50.
    assert of_query == 2 * sum(
        q * queries < (50 // keys + 1) * keys - 1 for q in range(50 // queries, -(-64 // queries))
    )
    for variant, more in zip(PASSES[name].keys, of_keys, strict=True):
        tile = 50 // variant.queries * variant.queries
        assert more == 2 * sum(
            tile < first + variant.keys - 1 and first <= 50 for first in range(0, 64, variant.keys)
        )
