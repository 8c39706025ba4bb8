"""What CUDA forward kernels execute: products, exponentials, barriers, copies; and which tiles they visit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import emulated
from forward_variants import BY_NAME, VARIANTS, Variant
from problems import make_block_mask, make_inputs
from programs import ROOT

import attn_ext
from attn_ext import Causal, KeyLengths, Prefix, Segments, SlidingWindow

HEADS = 2


def attend(
    variant: Variant, query_len: int, kv_len: int, **options: Any
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The counters of a launch for HEADS heads, and its places of access."""
    inputs = make_inputs(
        *(1, HEADS, query_len, kv_len, variant.key_columns),
        value_dim=variant.value_columns,
        dtype=variant.dtype,
    )
    with emulated(variant=variant.name, access_sites=True) as running:
        attn_ext.attention(*inputs, return_lse=True, **options)
        statistics = running.statistics()
    (launch,) = statistics["launches"]
    return launch, statistics["sites"]


def chunks(variant: Variant, rows: int, columns: int) -> int:
    """Pieces of 16 bytes of a tile."""
    return rows * columns * variant.bytes // 16


def visits(variant: Variant, query_tiles: int, launch: dict[str, int]) -> int:
    """How many tiles of keys and values were copied."""
    of_queries = HEADS * query_tiles * chunks(variant, variant.queries, variant.key_columns)
    of_a_tile = chunks(variant, variant.keys, variant.key_columns + variant.value_columns)
    tiles, rest = divmod(launch["cp_async"] - of_queries, of_a_tile)
    assert rest == 0
    return tiles


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_instructions(variant: Variant) -> None:
    """Of ordinary scores, whose first tile's maximum stays that of the row as far as weights can tell."""
    m, n, warps = variant.queries, variant.keys, variant.warps
    launch, sites = attend(variant, 2 * m, 3 * n)
    blocks, tiles = 2 * HEADS, 3
    key_steps, value_steps = variant.key_columns // 16, variant.value_columns // 16
    query_loads = m // 16 * key_steps
    once, each = (query_loads, 0) if variant.query_in_registers else (0, query_loads)
    loads = warps * n // 16 * (key_steps + value_steps)
    tensor_cores = variant.dtype != torch.float32

    assert visits(variant, 2, launch) == blocks * tiles
    products = m // 16 * n // 8 * (key_steps + value_steps)
    assert launch["mma_m16n8k16"] == tensor_cores * blocks * tiles * products
    assert launch["ldmatrix"] == tensor_cores * blocks * (once + tiles * (loads + each))
    # Four threads move a row's maximum, once, and divide by its sum.
    assert launch["sfu"] == blocks * (tiles * m * n + 8 * m)
    assert launch["barriers"] == blocks * (1 + 2 * tiles)
    assert launch["votes"] == blocks * (tiles * warps + m // 16)  # 16 rows vote once
    assert launch["atomics"] == 0
    assert launch["cp_async_bytes"] == 16 * launch["cp_async"]
    # Of 4 bytes: fragments of the output, on their way to become rows.
    assert {site["bytes"] for site in sites if "lse" not in source_line(site)} == {16, *[4] * tensor_cores}


def source_line(site: dict[str, Any]) -> str:
    """The line of the kernel that an access belongs to."""
    place = next(place for place in site["where"].split(" < ") if place.startswith("flash_forward"))
    name, _, line = place.partition(":")
    return (ROOT / "csrc" / "cuda" / name).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("layout", ["contiguous", "heads last"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_no_transaction_is_wasted(variant: Variant, layout: str) -> None:
    inputs = make_inputs(
        *(1, HEADS, variant.queries + 5, 2 * variant.keys + 3, variant.key_columns),
        value_dim=variant.value_columns,
        dtype=variant.dtype,
    )
    if layout == "heads last":
        inputs = tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs)
    with emulated(variant=variant.name, access_sites=True) as running:
        attn_ext.attention(*inputs, mask=Causal("bottom_right"), return_lse=True)
        sites = running.statistics()["sites"]
    assert {site["bytes"] for site in sites if "cp_async" in source_of(site)} == {16}
    for site in sites:
        transactions = site.get("wavefronts", site.get("sectors"))
        if site["bytes"] == 16 or site["space"] == "shared":
            assert transactions == site["ideal"], site


def source_of(site: dict[str, Any]) -> str:
    """The innermost function that accesses memory."""
    name, _, line = site["where"].split(" < ")[0].partition(":")
    lines = (ROOT / "csrc" / "cuda" / name).read_text().splitlines()[: int(line)]
    return next(text for text in reversed(lines) if text.lstrip().startswith(("DEVICE", "__global__")))


def documents(query_len: int, kv_len: int) -> Segments:
    return Segments(*(torch.arange(length) * 5 // length for length in (query_len, kv_len)))


# Masks whose conjunction is taken.
MASKS: dict[str, Callable[[int, int], tuple[attn_ext.Mask, ...]]] = {
    "none": lambda *lengths: (),
    "causal": lambda *lengths: (Causal(),),
    "bottom-right": lambda *lengths: (Causal("bottom_right"),),
    "window": lambda *lengths: (SlidingWindow(70, 20, "bottom_right"),),
    "key lengths": lambda *lengths: (KeyLengths([170]),),
    "prefix": lambda *lengths: (Prefix(65),),
    "nothing": lambda *lengths: (Prefix(0),),
    "documents": lambda *lengths: (documents(*lengths),),
    "union": lambda *lengths: (SlidingWindow(20, 0, "bottom_right") | Prefix(5),),
    "four ranges": lambda *lengths: (
        SlidingWindow(9, 0) | SlidingWindow(9, 0, "bottom_right") | Prefix(5) | documents(*lengths),
    ),
    "small blocks": lambda *lengths: (make_block_mask((1, HEADS, *lengths), (16, 16), 0.04, 0.0),),
    "blocks": lambda *lengths: (make_block_mask((1, 1, *lengths), (64, 128), 0.5, 0.0),),
    "odd blocks": lambda *lengths: (make_block_mask((1, HEADS, *lengths), (48, 80), 0.2, 0.0),),
    "partial blocks": lambda *lengths: (make_block_mask((1, 1, *lengths), (64, 64), 0.4, 1.0),),
    "causal blocks": lambda *lengths: (
        make_block_mask((1, HEADS, *lengths), (32, 48), 0.3, 0.0),
        Causal("bottom_right"),
    ),
}
# Those of which a tile may be whole for all its queries, and yet is not seen to be.
BY_ELEMENT = {"union", "four ranges", "documents"}


def tiles_of(visible: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, Lq, Lk) -> (H, query tiles, key tiles): whether any pair is visible, and whether all are."""
    query_len, kv_len = visible.shape[1:]
    last = query_len - 1  # queries past the end see what it sees
    rows = torch.arange(-(-query_len // variant.queries) * variant.queries).clamp(max=last)
    visible = torch.nn.functional.pad(visible[:, rows], (0, -kv_len % variant.keys))
    tiles = visible.unflatten(2, (-1, variant.keys)).unflatten(1, (-1, variant.queries))
    return tiles.any(-1).any(2), tiles.all(-1).all(2)


@pytest.mark.parametrize("lengths", [(300, 300), (130, 450), (1, 257)])
@pytest.mark.parametrize("name", ["bf16_64", "f16_64_long", "f32_64"])
@pytest.mark.parametrize("mask", MASKS)
def test_tiles_that_nothing_sees_are_skipped(mask: str, name: str, lengths: tuple[int, int]) -> None:
    """And of the others, those whole are not masked."""
    variant = BY_NAME[name]
    parts = MASKS[mask](*lengths)
    launch, sites = attend(variant, *lengths, mask=functools.reduce(operator.and_, parts) if parts else None)
    visited, whole = tiles_of(torch.ones(HEADS, *lengths, dtype=torch.bool), variant)
    for part in parts:
        any_pair, all_pairs = tiles_of(part.to_dense(1, HEADS, *lengths)[0], variant)
        visited, whole = visited & any_pair, whole & all_pairs
    assert visits(variant, visited.size(1), launch) == visited.sum()
    masked = sum(site["lanes"] for site in sites if is_copy_of_masked_values(site))
    masked //= chunks(variant, variant.keys, variant.value_columns)
    if mask not in BY_ELEMENT:
        assert masked == (visited & ~whole).sum()
    assert masked >= (visited & ~whole).sum()


def is_copy_of_masked_values(site: dict[str, Any]) -> bool:
    return site["space"] == "shared" and "value_copy.clipped" in source_line(site)


@pytest.mark.parametrize("name", ["f16_64", "f32_64"])
def test_barriers_do_not_depend_on_masks(name: str) -> None:
    variant = BY_NAME[name]
    for mask in (Causal(), KeyLengths([100]), MASKS["union"](200, 200)[0]):
        launch, _ = attend(variant, 200, 200, mask=mask)
        blocks = launch["grid"][0]
        tiles = visits(variant, blocks // HEADS, launch)
        assert launch["barriers"] == blocks + 2 * tiles


def test_values_that_are_not_finite_cost_two_barriers_more() -> None:
    """Only in tiles that a mask cuts, where a row may not see them."""
    query, key, value = make_inputs(1, 1, 64, 256, 64, dtype=torch.float16)
    value[:, :, [70, 200]] = torch.inf
    with emulated(variant="f16_64") as running:
        attn_ext.attention(query, key, value, mask=Causal("bottom_right"))
        (launch,) = running.statistics()["launches"]
    assert launch["barriers"] == 1 + 2 * 4 + 2


@pytest.mark.parametrize("name", ["bf16_64", "f32_64"])
def test_maxima_that_grow_are_followed(name: str) -> None:
    """Each tile's scores are far above those of the tile before: every one moves the maximum."""
    variant = BY_NAME[name]
    m, n = variant.queries, variant.keys
    key = torch.linspace(40, -40, 5)[:, None].repeat(1, n).flatten()
    key = key[None, None, :, None].expand(1, 1, 5 * n, 64).to(variant.dtype).contiguous()
    query, value = torch.full((1, 1, m, 64), 1 / 8, dtype=variant.dtype), torch.randn_like(key)
    raises = []
    for order in (key, key.flip(2)):
        with emulated(variant=name) as running:
            attn_ext.attention(query, order, value)
            (launch,) = running.statistics()["launches"]
        raises.append(launch["votes"] // variant.warps - 5)
    assert raises == [5, 1]
