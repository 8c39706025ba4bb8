"""The CUDA decoding kernels, run by the emulator: each of them, edges, wrong contents, counters."""

from __future__ import annotations

from typing import Any

import pytest
import test_decode
import torch
from decode_variants import (
    CASES,
    IDS,
    LEAST_KEYS,
    MOST_RANGES,
    ROWS,
    TILE,
    VARIANTS,
    DecodeVariant,
    check_means,
    read_back,
)
from emulated import A100, Device, emulated
from test_decode import HOSTILE, LARGEST, Problem, operator_arguments, tables, valid
from torch import Tensor

import attn_ext
from attn_ext import Causal, SlidingWindow, attention_decode, testing

each_case = pytest.mark.parametrize(("variant", "cache"), CASES, ids=IDS)


def check(problem: Problem, results: tuple[Tensor, Tensor], window: int | None = None) -> None:
    """Against float64; numbers that are no multiples of what their dtype has, as float32 products."""
    mask = Causal("bottom_right")
    if window is not None:
        mask &= SlidingWindow(window, None, "bottom_right")
    for b, (out, lse) in enumerate(zip(*results, strict=True)):
        inputs = [t[None] for t in (problem.query[b], problem.keys[b], problem.values[b])]
        if problem.query.dtype == problem.keys[b].dtype:
            given = (out[None], lse[None])
            testing.check_attention(*inputs, mask=mask, grad=False, attention=lambda *_, _r=given, **__: _r)
            continue
        exact = attn_ext.reference.attention(*inputs, mask=mask, return_lse=True)
        plain = attn_ext.reference.attention(*inputs, mask=mask, dtype=torch.float32).to(out.dtype)
        testing.assert_within_rule(out[None], exact[0], plain, testing.FORWARD_FACTOR)
        testing.assert_within_rule(lse[None], exact[1], exact[1].float(), testing.FORWARD_FACTOR, "lse", 1e-6)


# --- Every kernel -------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("page_size", [None, 16, 5])
def test_kernels(variant: DecodeVariant, cache: torch.dtype, page_size: int | None) -> None:
    """Lengths at the edges of tiles, pages and ranges; one row and many."""
    for lengths, group, query_len in (
        ((0, 1, 2, 15, 16), 1, 1),
        ((17, 31, 32, 33, 255), 4, 1),
        ((256, 257, 300), 3, 5),
        ((40, 9), 2, 16),
    ):
        sizes = {"group": group, "query_len": query_len, "page_size": page_size, "heads": 1}
        problem, options = variant.problem(lengths, cache, **sizes)
        with emulated(seed=query_len) as emulator:
            results = problem.decode(**options)
            names = [launch["kernel"] for launch in emulator.statistics()["launches"]]
        assert names == [f"flash_decode_{variant.name}", "decode_merge"]
        check(problem, results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [1, 4, 16, 32])
def test_page_edges(page_size: int, dtype: torch.dtype) -> None:
    lengths = {max(0, pages * page_size + off) for pages in (0, 1, 2, 3) for off in (-1, 0, 1)}
    problem = Problem(tuple(sorted(lengths)), heads=1, group=2, head_dim=64, page_size=page_size, dtype=dtype)
    with emulated():
        check(problem, problem.decode())


@pytest.mark.parametrize("query_len", [1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_rows(group: int, query_len: int) -> None:
    """Any number of them: 16 to a block."""
    problem = Problem((50, 7), heads=1, group=group, query_len=query_len, head_dim=64, dtype=torch.bfloat16)
    with emulated() as emulator:
        check(problem, problem.decode())
        launch = emulator.statistics()["launches"][0]
    assert launch["grid"][0] == 2 * -(-group * query_len // ROWS)


@each_case
def test_windows(variant: DecodeVariant, cache: torch.dtype) -> None:
    for window, query_len in ((0, 1), (15, 1), (16, 3), (100, 20), (299, 2)):
        problem, options = variant.problem((300, 20), cache, heads=1, query_len=query_len, page_size=16)
        with emulated():
            check(problem, problem.decode(**options, window=(window, 0)), window)


@each_case
def test_what_a_query_does_not_see_never_reaches_it(variant: DecodeVariant, cache: torch.dtype) -> None:
    """NaN in keys and values that only later queries see; the rest of the cache is full of it."""
    if cache == torch.int8:
        return  # has no NaN
    problem, options = variant.problem((90, 40), cache, heads=1, group=2, query_len=4, page_size=16)
    with emulated():
        before = problem.decode(**options)
        for b, length in enumerate((90, 40)):
            at = problem.place(b, torch.tensor([length - 2]))
            for store in (problem.key_cache, problem.value_cache):
                bits = store.view(torch.uint8) if cache in LARGEST else store
                bits[at] = 0x7F if cache in LARGEST else torch.nan
        after = problem.decode(**options)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[:, :, :2], two[:, :, :2])
        assert two[:, :, 2:].isnan().all()


@pytest.mark.parametrize("cache", LARGEST)
@pytest.mark.parametrize("exponent", [-30, -4, 12, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_size(dtype: torch.dtype, exponent: int, cache: torch.dtype) -> None:
    """Weights keep their range: they are multiplied relative to the largest scale."""
    problem = Problem((130,), heads=1, head_dim=32, page_size=16)
    scales = test_decode.quantise(problem, cache)
    scales["value_scale"] *= 2.0**exponent
    with emulated():
        out, _ = problem.decode(**scales)
        problem.query = problem.query.to(dtype)
        narrow, _ = problem.decode(**scales)
    finite = out.abs() <= torch.finfo(dtype).max
    error = (narrow.float() - out.to(dtype).float())[finite].abs().max() if finite.any() else torch.tensor(0)
    assert error <= 4 * torch.finfo(dtype).eps * out.abs().max() + torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e30])
def test_huge_equal_scores(scale: float, dtype: torch.dtype) -> None:
    """Parts of a row weigh by their number of keys, though that is lost in the sum of the logarithm."""
    problem = Problem((700, 90), heads=1, head_dim=64, dtype=dtype, page_size=16)
    with emulated():
        check_means(problem, scale)


# --- The same bits ------------------------------------------------------------------------------------------


@each_case
def test_schedules_give_the_same_bits(variant: DecodeVariant, cache: torch.dtype) -> None:
    results = []
    for seed in (0, 1, 2):
        torch.manual_seed(5)
        appended = 0 if cache in LARGEST else 2
        problem, options = variant.problem(
            (700, 30), cache, heads=1, group=3, query_len=2, appended=appended, page_size=16
        )
        with emulated(seed=seed):
            results.append((*problem.decode(**options), problem.key_cache.float().nan_to_num(7)))
    for others in results[1:]:
        for one, two in zip(results[0], others, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_do_not_matter(dtype: torch.dtype) -> None:
    """Nor do the device, and how long sequences could be."""
    problem = Problem((900, 40, 300), heads=2, group=2, head_dim=64, dtype=dtype, page_size=16)
    with emulated():
        out, lse = problem.decode()
    for b, processors in ((0, 1), (1, 1000), (2, 1)):
        one = slice(b, b + 1)
        query, keys, values, lengths = problem.arguments()
        table = torch.cat((problem.table[one], torch.full((1, 1000), -1)), dim=1)
        with emulated(device=A100._replace(processors=processors)):
            alone = attention_decode(
                query[one], keys, values, lengths[one], block_table=table, return_lse=True
            )
        assert torch.equal(alone[0], out[one])
        assert torch.equal(alone[1], lse[one])


# --- Append and rotary embedding ----------------------------------------------------------------------------


@each_case
def test_append(variant: DecodeVariant, cache: torch.dtype) -> None:
    """What it leaves in the cache is, to the bit, what the CPU leaves there; and attention reads it."""
    sizes = {"heads": 2, "group": 2, "query_len": 3, "appended": 3, "page_size": 4}
    problem, options = variant.problem((20, 3, 33), cache, **sizes)
    cos, sin = tables(40, variant.columns // 4, torch.float32)
    options |= {"rotary_cos": cos, "rotary_sin": sin, **problem.new, "block_table": problem.table}
    query, *caches, lengths = problem.arguments()
    by_cpu = [cache.clone() for cache in caches]
    attention_decode(query, *by_cpu, lengths, **options)
    with emulated() as emulator:
        results = attention_decode(query, *caches, lengths, **options, return_lse=True)
        assert emulator.statistics()["launches"][0]["kernel"] == "decode_append"
    for one, two in zip(caches, by_cpu, strict=True):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    read_back(problem, options)
    for b in range(3):
        start = problem.keys[b].size(1) - 3
        problem.query[b] = test_decode.rotate(problem.query[b], start, cos, sin, False).to(variant.dtype)
    check(problem, results)


# --- Wrong contents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_contents_are_harmless(changes: dict[str, Any], message: str, dtype: torch.dtype) -> None:
    """The emulator reports what would be read or written outside of tensors; `validate` finds the rest."""
    arguments = {**valid(), **changes}
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}
    if "fit the cache" in message:
        with emulated(), pytest.raises(ValueError, match=message):
            attention_decode(**arguments)
        return
    with emulated():
        out, lse = attention_decode(**arguments, return_lse=True)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    with pytest.raises(ValueError, match=message):
        attn_ext.decode._check(*_in_order(arguments))


def _in_order(arguments: dict[str, Any]) -> tuple[Any, ...]:
    names = (
        *("query", "key_cache", "value_cache", "cache_seqlens", "block_table", "new_key", "new_value"),
        *("rotary_cos", "rotary_sin", "rotary_interleaved", "key_scale", "value_scale", "shared_prefix"),
        *("window", "softcap", "alibi_slopes", "sinks", "scale", "num_splits"),
    )
    return tuple(arguments.get(name, False if name == "rotary_interleaved" else None) for name in names)


def test_wrong_lengths_are_brought_to_what_there_is() -> None:
    arguments = valid()
    for given, meant in ((-5, 0), (-(2**62), 0), (12, 11), (2**62, 11)):
        results = []
        for length in (given, meant):
            copies = {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
            lengths = torch.tensor([length, 3])
            with emulated():
                out = attention_decode(**{**arguments, **copies, "cache_seqlens": lengths})
            results.append((out, *copies.values()))
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


def test_lengths_beyond_the_rotary_table() -> None:
    arguments = {**valid(), "cache_seqlens": torch.tensor([9, 3])}
    cos, sin = tables(7, 4, torch.float32)
    with emulated():
        out = attention_decode(**arguments, rotary_cos=cos, rotary_sin=sin)
        arguments = {**arguments, "cache_seqlens": torch.tensor([6, 3])}
        assert torch.equal(out, attention_decode(**arguments, rotary_cos=cos, rotary_sin=sin))
        prefix = [torch.randn(1, 2, 3, 8) for _ in range(2)]
        arguments = {**arguments, "cache_seqlens": torch.tensor([2**40, -(2**40)])}
        out = attention_decode(**arguments, rotary_cos=cos, rotary_sin=sin, shared_prefix=prefix)
        assert out.isfinite().all()


@pytest.mark.parametrize("page", [-1, -(2**31), 6, 2**31 - 1])
@pytest.mark.parametrize("wide", [False, True])
def test_pages_that_are_not_there_hold_nothing(page: int, wide: bool) -> None:
    """Their tokens are hidden, and nothing is written for them."""
    problem = Problem((64,), heads=1, group=2, head_dim=32, page_size=16)
    problem.table = problem.table.long() if wide else problem.table.int()
    pages = problem.key_cache.shape[0]
    hidden = problem.table.clone()
    hidden[0, 1] = page if page < 0 else max(page, pages)
    kept = torch.cat((torch.arange(16), torch.arange(32, 64)))
    arguments = problem.arguments()
    with emulated():
        out, lse = attention_decode(*arguments, block_table=hidden, return_lse=True)
    problem.keys, problem.values = ([rows[0][:, kept]] for rows in (problem.keys, problem.values))
    check(problem, (out, lse))

    new = {name: torch.randn(1, 1, 20, 32) for name in ("new_key", "new_value")}
    before = [cache.clone() for cache in arguments[1:3]]
    hidden[:] = page if page < 0 else max(page, pages)
    lengths = torch.tensor([30])
    with emulated():
        out, lse = attention_decode(*arguments[:3], lengths, block_table=hidden, **new, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for cache, unchanged in zip(arguments[1:3], before, strict=True):
        assert torch.equal(cache.nan_to_num(7), unchanged.nan_to_num(7))


@pytest.mark.parametrize("cache", LARGEST)
def test_a_scale_of_zero_is_harmless(cache: torch.dtype) -> None:
    problem = Problem((20, 33), heads=1, appended=2, page_size=4)
    scales = test_decode.quantise(problem, cache)
    problem.new["new_value"][:, :, :, 0] = 0
    for scale in scales.values():
        scale.zero_()
    with emulated():
        out, lse = problem.decode(**scales)
    assert not out.any()
    assert lse.isfinite().all()


# --- What runs ----------------------------------------------------------------------------------------------


@each_case
def test_instructions(variant: DecodeVariant, cache: torch.dtype) -> None:
    """Each key and value is read once for all rows, in pieces of 16 bytes past the registers."""
    length, heads = 5 * TILE * variant.warps + 3, 2
    problem, options = variant.problem((length, TILE), cache, heads=heads, group=4, page_size=16)
    with emulated(access_sites=True) as emulator:
        problem.decode(**options)
        statistics = emulator.statistics()
    launch = statistics["launches"][0]
    tiles = -(-length // TILE) + 1
    chunks = variant.columns * cache.itemsize // 16
    assert launch["cp_async"] == 2 * heads * tiles * TILE * chunks
    assert launch["cp_async_bytes"] == 16 * 2 * heads * (length + TILE) * chunks  # none for what is not there
    assert {site["bytes"] for site in statistics["sites"] if is_copy(site)} == {16}
    steps = variant.columns // 16
    tensor_cores = variant.dtype != torch.float32
    ranges = sum(-(-n // LEAST_KEYS) for n in (length, TILE))
    products = 2 * (steps + steps)
    assert launch["mma_m16n8k16"] == tensor_cores * heads * tiles * products
    blocks = launch["grid"][0]
    assert blocks == 2 * heads * -(-(problem.table.shape[1] * 16) // LEAST_KEYS)
    working = heads * ranges  # each block has a range of its own, or none
    assert launch["ldmatrix"] == tensor_cores * heads * tiles * (2 * steps + steps)  # queries, too
    assert launch["barriers"] == working * (3 + 1)
    assert launch["atomics"] == 0


def is_copy(site: dict[str, Any]) -> bool:
    return site["space"] == "global" and "decode_copy" in site["where"]


@each_case
def test_no_transaction_is_wasted(variant: DecodeVariant, cache: torch.dtype) -> None:
    problem, options = variant.problem((300, 20), cache, heads=2, group=4, page_size=16)
    with emulated(access_sites=True) as emulator:
        problem.decode(**options)
        sites = emulator.statistics()["sites"]
    for site in sites:
        transactions = site.get("wavefronts", site.get("sectors"))
        if is_copy(site) or (site["space"] == "shared" and site["bytes"] == 16):
            assert transactions == site["ideal"], site


def test_splits() -> None:
    """As many blocks as the cache has room for ranges, and the device for blocks."""
    problem = Problem((40,), heads=1, head_dim=64, dtype=torch.bfloat16, page_size=16)

    def blocks(pages: int, processors: int = 108, **options: Any) -> int:
        table = torch.full((1, pages), -1)
        table[:, : problem.table.shape[1]] = problem.table
        with emulated(device=A100._replace(processors=processors)) as emulator:
            check(problem, problem.decode(block_table=table, **options))
            return emulator.statistics()["launches"][0]["grid"][0]

    assert blocks(16) == 1
    assert blocks(17) == 2
    assert blocks(10**5) == MOST_RANGES
    assert blocks(10**5, processors=2) == 16
    assert blocks(10**5, num_splits=3) == 3
    assert blocks(4, num_splits=100) == 4
    assert blocks(10**4, processors=2, num_splits=10**4) == 16


# --- Selection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "columns", "message"),
    [
        (A100, torch.float64, 16, "^float64 is not computed on CUDA devices$"),
        (Device(arch=70), torch.float16, 16, "compute capability 7.5"),
        (Device(arch=75), torch.bfloat16, 16, "bfloat16 needs compute capability 8.0"),
        (A100, torch.float16, 257, "heads of this size"),
        (Device(arch=75, shared_memory=1024), torch.float16, 16, "heads of this size"),
    ],
)
def test_what_a_device_cannot_do(device: Device, dtype: torch.dtype, columns: int, message: str) -> None:
    cache = torch.randn(1, 1, 4, columns, dtype=dtype)
    with emulated(device=device), pytest.raises(NotImplementedError, match=message):
        attention_decode(cache[:, :, :1], cache, cache, torch.tensor([3]))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_shared_memory(variant: DecodeVariant) -> None:
    """What each asks for, and that it fits: the 99 KiB of sm_86."""
    assert variant.shared_bytes <= 99 << 10
    columns = variant.columns
    cache = torch.zeros(1, 1, 4, columns).to(variant.caches[0])
    scale = torch.ones(1, 1) if variant.quantised else None
    arguments = torch.zeros(1, 1, 1, columns, dtype=variant.dtype), cache, cache, torch.tensor([3])
    with emulated(device=A100._replace(shared_memory=variant.shared_bytes)) as emulator:
        attention_decode(*arguments, key_scale=scale, value_scale=scale)
        assert emulator.statistics()["launches"][0]["kernel"] == f"flash_decode_{variant.name}"
    others = [v for v in VARIANTS if (v.dtype, v.quantised) == (variant.dtype, variant.quantised)]
    if all(v.shared_bytes >= variant.shared_bytes for v in others if v.columns >= columns):
        device = A100._replace(shared_memory=variant.shared_bytes - 1)
        with emulated(device=device), pytest.raises(RuntimeError, match="heads of this size"):
            attention_decode(*arguments, key_scale=scale, value_scale=scale)


def test_rows_that_lie_badly_are_read_as_they_are() -> None:
    """A cache is not copied: what does not start and end at multiples of 16 bytes is read by elements."""
    problem = Problem((70, 33), group=2, head_dim=40, value_dim=24, dtype=torch.float16, page_size=16)
    with emulated() as emulator:
        check(problem, problem.decode())
        assert emulator.statistics()["launches"][0]["cp_async"] > 0
    problem.key_cache = torch.nn.functional.pad(problem.key_cache, (1, 2))[..., 1:-2]
    problem.value_cache = torch.nn.functional.pad(problem.value_cache, (1, 2))[..., 1:-2]
    with torch.profiler.profile() as profile, emulated() as emulator:
        results = problem.decode()
        assert emulator.statistics()["launches"][0]["cp_async"] == 0
    assert not any(event.name == "aten::copy_" for event in profile.events())
    check(problem, results)


# --- Arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 4, 8)}, "query must have 4 dimensions"),
        ({"query": torch.zeros(2, 3, 1, 8)}, "multiple of those of key_cache"),
        ({"value_cache": torch.zeros(6, 2, 5, 8)}, "value_cache must have shape"),
        ({"block_table": None}, "key_cache must hold 2 sequences"),
        ({"block_table": torch.zeros(2, 3)}, "block_table must be int32 or int64"),
        ({"block_table": torch.zeros(3, 3).int()}, "block_table must have 2 rows"),
        ({"cache_seqlens": torch.ones(2).short()}, "cache_seqlens must be int32 or int64"),
        ({"new_key": None}, "new_key and new_value go together"),
        ({"rotary_cos": torch.zeros(9, 4)}, "rotary_cos and rotary_sin go together"),
        ({"key_scale": torch.ones(6, 2)}, "key_scale goes with caches of int8"),
        ({"num_splits": 0}, "num_splits must be positive"),
        ({"window_left": -1}, "window_left must not be negative"),
        ({"block_table": torch.zeros(2, 0).int()}, "cache_seqlens must hold 0 to -1"),
    ],
)
def test_what_the_operator_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = operator_arguments({**valid(), **changes})
    with emulated(), pytest.raises(RuntimeError, match=message):
        torch.ops.attn_ext_emulated.attention_decode(*arguments)


def test_validate_waits_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU contents are always checked; there it changes nothing."""
    calls = []
    monkeypatch.setattr(attn_ext.decode, "_check", lambda *arguments: calls.append(arguments))
    attention_decode(**valid(), validate=True)
    assert calls == []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    with emulated():
        attention_decode(**valid())
        assert calls == []
        attention_decode(**valid(), validate=True)
    assert len(calls) == 1
    with pytest.raises(TypeError, match="validate must be a bool, got int"):
        attention_decode(**valid(), validate=1)
