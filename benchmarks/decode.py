"""``python -m benchmarks.decode``: one step of generation over a long cache, as a Markdown table.

Each row times attn_ext over a contiguous cache, the same in pages of 16 tokens in random order, torch's
scaled_dot_product_attention, and a sum over memory of the cache's size, to tell what reading it costs. They
are interleaved, after a comparison with the float64 reference. "paged" and "x torch" are ratios to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_ext import Causal, attention_decode, reference

from .timing import FULL, QUICK, Plan, clock_for, interleave, ratios

SEED = 1234
PAGE_SIZE = 16
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclass(frozen=True)
class Step:
    """One row: shape is (B, Hq, Hkv, Lq, Lk, D); queries of a quantised cache are bfloat16."""

    shape: tuple[int, int, int, int, int, int]
    cache: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cache in LARGEST else getattr(torch, self.cache)


def steps(length: int) -> list[Step]:
    """The rows, for caches of about `length` tokens."""
    llama = (1, 32, 8, 1, length, 128)
    return [
        Step(llama, "float32"),
        Step(llama, "bfloat16"),
        Step(llama, "float16"),
        Step((8, 32, 8, 1, length // 2, 128), "bfloat16"),
        Step((1, 8, 8, 1, 8 * length, 64), "float32"),
        Step((1, 8, 8, 1, 8 * length, 64), "bfloat16"),
        Step((1, 32, 8, 4, length, 128), "float32"),
        Step((1, 32, 8, 4, length, 128), "bfloat16"),
        Step(llama, "int8"),
        Step(llama, "float8_e4m3fn"),
        Step((1, 8, 8, 1, 16, 64), "float32"),
    ]


def _pages(cache: Tensor, order: Tensor) -> Tensor:
    """(B, Hkv, L, D) -> (B * L / PAGE_SIZE, Hkv, PAGE_SIZE, D), shuffled."""
    pages = cache.unflatten(2, (-1, PAGE_SIZE)).transpose(1, 2).flatten(0, 1)
    return pages[order].contiguous()


def measure(step: Step, threads: int, plan: Plan) -> list[str]:
    """A row: milliseconds, bandwidth, that of a sum, and what pages and torch take in comparison."""
    torch.manual_seed(SEED)
    batch, heads, kv_heads, query_len, length, head_dim = step.shape
    query = torch.randn(batch, heads, query_len, head_dim, dtype=step.dtype)
    caches = [torch.randn(batch, kv_heads, length, head_dim) for _ in range(2)]
    seqlens = torch.full((batch,), length, dtype=torch.int32)
    scales: dict[str, Tensor] = {}
    if step.cache in LARGEST:
        factor = LARGEST[step.cache] / 6
        caches = [(t * factor).clamp(-6 * factor, 6 * factor) for t in caches]
        scales = dict.fromkeys(("key_scale", "value_scale"), torch.full((batch, kv_heads), 1 / factor))
    caches = [t.to(getattr(torch, step.cache)) for t in caches]
    _check(query, caches, seqlens, scales)

    order = torch.randperm(batch * length // PAGE_SIZE)
    paged = [_pages(t, order) for t in caches]
    table = order.argsort().view(batch, -1).int()
    paged_scales = {name: t[:1].expand(order.numel(), -1).contiguous() for name, t in scales.items()}
    memory = torch.zeros(2 * caches[0].nbytes // 4)
    contenders: dict[str, Any] = {
        "contiguous": lambda: attention_decode(query, *caches, seqlens, **scales),
        "paged": lambda: attention_decode(query, *paged, seqlens, block_table=table, **paged_scales),
        "sum": memory.sum,
    }
    if step.cache not in LARGEST:
        mask = None
        if query_len > 1:
            mask = Causal("bottom_right").to_dense(batch, heads, query_len, length)
        contenders["torch"] = lambda: F.scaled_dot_product_attention(query, *caches, mask, enable_gqa=True)
    first = {name: _seconds(function) for name, function in contenders.items()}
    samples = interleave(contenders, first, plan)
    clock = clock_for(threads)
    milliseconds = {name: 1e3 * statistics.median(sample.seconds(clock)) for name, sample in samples.items()}
    row = [
        "x".join(map(str, step.shape)),
        step.cache,
        f"{milliseconds['contiguous']:.3f}",
        *(f"{memory.nbytes / milliseconds[name] / 1e6:.1f}" for name in ("contiguous", "sum")),
    ]
    for name in ("paged", "torch"):
        ratio = ratios(samples[name], samples["contiguous"], clock) if name in samples else None
        row.append(f"{statistics.median(ratio):.2f}" if ratio else "")
    return row


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _check(query: Tensor, caches: list[Tensor], seqlens: Tensor, scales: dict[str, Tensor]) -> None:
    """Compares with the reference before anything is timed."""
    key, value = (
        cache.double() * scales.get(name, torch.ones(()))[..., None, None]
        for cache, name in zip(caches, ("key_scale", "value_scale"), strict=True)
    )
    exact = reference.attention(query, key, value, mask=Causal("bottom_right"))
    error = (attention_decode(query, *caches, seqlens, **scales) - exact).norm() / exact.norm()
    if not error <= 16 * torch.finfo(query.dtype).eps:
        raise RuntimeError(f"off by {float(error):.1e} of its norm: {tuple(query.shape)}, {caches[0].dtype}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short caches, in a few seconds")
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    header = ("B x Hq x Hkv x Lq x Lk x D", "cache", "ms", "GB/s", "GB/s of a sum", "paged", "x torch")
    print(f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", sep="\n")
    for step in steps(64 if parsed.quick else 4096):
        row = measure(step, parsed.threads, QUICK if parsed.quick else FULL)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
