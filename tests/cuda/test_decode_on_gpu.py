"""The CUDA decoding kernels on a GPU: the tests of the CPU's, graphs, waits; skipped where there is none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import test_decode
import torch
from test_decode import HOSTILE, tables, valid
from test_decode_semantics import parameters
from test_on_gpu import DEVICE, no_waiting, pytestmark

import attn_ext
from attn_ext import attention_decode, testing

__all__ = ["pytestmark"]

ON_CPU_ONLY = {  # these look at what the function itself does
    test_decode.test_gradients_are_refused,
    test_decode.test_writes_are_seen_by_autograd,
    test_decode.test_valid_arguments_are_not_examined,
    test_decode.test_caches_that_overlap_are_not_written,
}


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


def decode_on(device: torch.device) -> Callable[..., Any]:
    """`attention_decode` of CPU tensors, elsewhere; caches are written as if it were here."""
    names = tuple(inspect.signature(attention_decode).parameters)

    def decode(*arguments: Any, **options: Any) -> Any:
        given = dict(zip(names, arguments, strict=False)) | options
        there = {name: moved(value, device) for name, value in given.items()}
        results = attention_decode(**there)
        for name in ("key_cache", "value_cache"):
            given[name].copy_(there[name])
        return moved(results, torch.device("cpu"))

    return decode


@pytest.mark.parametrize(("test", "arguments"), list(parameters()))
def test_as_on_the_cpu(
    test: Callable[..., None], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_decode, "attention_decode", attention_decode)
    if test not in ON_CPU_ONLY:
        monkeypatch.setattr(test_decode, "attention_decode", decode_on(DEVICE))
    fixtures = {"isa": "", "monkeypatch": monkeypatch}
    wanted = inspect.signature(test).parameters
    test(**arguments, **{name: value for name, value in fixtures.items() if name in wanted})


def problem(dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Long sequences of different lengths, in pages."""
    lengths, heads, page_size, columns = torch.tensor([5000, 17, 1200]), 4, 16, 128
    pages = 3 * 320
    cos, sin = tables(5120, 32, torch.float32)
    arguments = {
        "query": torch.randn(3, 4 * heads, 2, columns, dtype=dtype),
        "key_cache": torch.randn(pages, heads, page_size, columns, dtype=dtype),
        "value_cache": torch.randn(pages, heads, page_size, columns, dtype=dtype),
        "cache_seqlens": lengths,
        "block_table": torch.randperm(pages).view(3, 320),
        "new_key": torch.randn(3, heads, 2, columns, dtype=dtype),
        "new_value": torch.randn(3, heads, 2, columns, dtype=dtype),
        "rotary_cos": cos,
        "rotary_sin": sin,
    }
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


def test_nothing_waits() -> None:
    arguments = problem()
    with no_waiting():
        attention_decode(**arguments, window=(900, 0), softcap=5.0)
        attention_decode(**arguments, num_splits=7)


def test_graphs_are_replayed_with_what_the_tensors_hold_then() -> None:
    arguments = problem()
    attention_decode(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(**arguments)
    for lengths in ((1, 2, 3), (4999, 300, 0)):
        arguments["cache_seqlens"].copy_(torch.tensor(lengths))
        arguments["query"].normal_()
        arguments["block_table"].copy_(torch.randperm(960).view(3, 320))
        graph.replay()
        assert torch.equal(out, attention_decode(**arguments))


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_wrong_contents(changes: dict[str, Any], message: str) -> None:
    arguments = {name: tensor.to(DEVICE) for name, tensor in {**valid(), **changes}.items()}
    if "fit the cache" not in message:
        assert attention_decode(**arguments).isfinite().all()
    with pytest.raises(ValueError, match=message):
        attention_decode(**arguments, validate=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_caches_on_the_device(dtype: torch.dtype) -> None:
    """They give out pages, and decoding reads them."""
    cache = attn_ext.PagedKVCache(64, 16, 2, 64, max_sequences=3, dtype=dtype, device=DEVICE)
    cache.allocate(3)
    key, value = (torch.randn(3, 2, 50, 64, dtype=torch.float16, device=DEVICE) for _ in range(2))
    cache.append(key, value)
    scales = (
        {} if cache.key_scale is None else {"key_scale": cache.key_scale, "value_scale": cache.value_scale}
    )
    query = torch.randn(3, 4, 1, 64, dtype=torch.float16, device=DEVICE)
    out = attention_decode(
        query, cache.key, cache.value, cache.seqlens, block_table=cache.block_table, **scales
    )
    for b in range(3):
        inputs = [part.cpu().double()[None] for part in (query[b], *cache.read(b))]
        exact = attn_ext.reference.attention(*inputs)
        testing.assert_within_rule(out[b : b + 1].cpu(), exact, exact.half(), testing.FORWARD_FACTOR)
