"""Random attention problems, and the values that the sampled tests draw from."""

from __future__ import annotations

import random
import zlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import attn_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# On, beside and off the boundaries of every register block and tile a kernel may have.
LENGTHS = (
    *(0, 1, 2, 3, 5, 7, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97),
    *(127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 383, 385, 511, 513, 517),
)
HEAD_DIMS = (
    *(1, 2, 3, 5, 7, 8, 16, 20, 24, 31, 32, 33, 40, 48, 64, 72, 80, 96, 100, 128, 160, 192, 256, 257),
    *(512, 1023, 1024),
)
SMALL_HEAD_DIMS = tuple(d for d in HEAD_DIMS if d <= 128)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8)


def sample(count: int, name: str, axes: dict[str, tuple]) -> list[SimpleNamespace]:
    """`count` combinations in which every value of every axis comes up before any comes up again.

    The same arguments give the same combinations; `name` is the seed.
    """
    generator = random.Random(zlib.crc32(name.encode()))
    columns = []
    for values in axes.values():
        column: list[Any] = []
        while len(column) < count:
            column += generator.sample(values, len(values))
        columns.append(column[:count])
    return [SimpleNamespace(**dict(zip(axes, row, strict=True))) for row in zip(*columns, strict=True)]


def describe(case: SimpleNamespace) -> str:
    """A test id: the values of the case."""
    texts = {name: getattr(value, "__name__", str(value)) for name, value in vars(case).items()}
    return "-".join(f"{name}:{text.removeprefix('torch.')}" for name, text in texts.items())


def make_inputs(
    batch: int = 1,
    heads: int = 1,
    query_len: int = 1,
    kv_len: int = 1,
    head_dim: int = 16,
    *,
    value_dim: int | None = None,
    group: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query (B, heads, Lq, D), key and value (B, heads // group, Lk, D or Dv)."""
    value_dim = head_dim if value_dim is None else value_dim
    kv_heads = heads // group
    return (
        torch.randn(batch, heads, query_len, head_dim, dtype=dtype),
        torch.randn(batch, kv_heads, kv_len, head_dim, dtype=dtype),
        torch.randn(batch, kv_heads, kv_len, value_dim, dtype=dtype),
    )


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any = None,
    scale: float | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> dict[str, Tensor]:
    """Forward and backward by the kernels: out, lse, grad_query, grad_key, grad_value."""
    inputs = tuple(t.detach().requires_grad_() for t in (query, key, value))
    out, lse = attn_ext.attention(*inputs, mask=mask, scale=scale, return_lse=True)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    names = ("out", "lse", "grad_query", "grad_key", "grad_value")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], *names: str) -> None:
    """Asserts that the named results (all of them by default) are equal to the last bit."""
    for name in names or expected:
        assert torch.equal(actual[name], expected[name]), f"{name} differs"
