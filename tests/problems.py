"""Random attention problems, and the values that the sampled tests draw from."""

from __future__ import annotations

import functools
import itertools
import operator
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
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Forward and backward by the kernels: out, lse, grad_query, grad_key, grad_value.

    With a bias or sinks among the options of `attn_ext.attention`, also grad_bias and grad_sinks.
    """
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {name: options[name] for name in ("bias", "sinks") if options.get(name) is not None}
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    leaves = tuple(inputs.values())
    options = {**options, **dict(list(inputs.items())[3:])}
    out, lse = attn_ext.attention(*leaves[:3], **options, return_lse=True)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    names = ("out", "lse", *(f"grad_{name}" for name in inputs))
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))


# What `make_options` knows, and which of it is a mask.
FEATURES = ("bias", "softcap", "alibi", "sinks", "dropout", "additive")
MASKS = ("causal", "window", "prefix", "key_lengths", "segments", "boolean", "blocks")
BLOCK_SIZES = (16, 32, 48, 64, 128, 208, 256)
BIAS_SHAPES = tuple(itertools.product((False, True), repeat=4))


def make_options(
    names: tuple[str, ...], batch: int, heads: int, query_len: int, kv_len: int
) -> dict[str, Any]:
    """Random options of `attn_ext.attention` with these features; each draws its dtype and shape as well."""
    sizes = batch, heads, query_len, kv_len
    generator = random.Random(int(torch.randint(2**31, ())))
    options: dict[str, Any] = {}
    masks = []
    for name in names:
        dtype = generator.choice(DTYPES)
        if name == "bias":
            options["bias"] = make_bias(sizes, generator.choice(BIAS_SHAPES), dtype)
        elif name == "softcap":
            options["softcap"] = generator.choice((0.5, 3.0, 50.0))
        elif name == "alibi":
            shape = generator.choice(((heads,), (batch, heads)))
            options["alibi_slopes"] = torch.rand(shape).to(dtype)
        elif name == "sinks":
            options["sinks"] = (2 * torch.randn(heads)).to(dtype)
        elif name == "dropout":
            options["dropout_p"] = generator.choice((0.1, 0.5, 0.9))
            options["dropout_seed"] = generator.getrandbits(63)
        else:
            masks.append(make_mask(name, sizes, generator, dtype))
    if masks:
        options["mask"] = functools.reduce(operator.and_, masks)
    return options


def make_bias(sizes: tuple[int, ...], full: tuple[bool, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers, one in eight -inf, in a shape that is 1 where `full` is false."""
    shape = tuple(size if is_full else 1 for size, is_full in zip(sizes, full, strict=True))
    bias = torch.randn(shape)
    hidden = (torch.rand(shape) < 0.125) & (torch.tensor(shape).prod() > 1)
    return torch.where(hidden, -torch.inf, bias).to(dtype)


def make_mask(
    name: str, sizes: tuple[int, ...], generator: random.Random, dtype: torch.dtype
) -> attn_ext.Mask:
    batch, _, query_len, kv_len = sizes
    align = generator.choice(("top_left", "bottom_right"))
    if name == "causal":
        return attn_ext.Causal(align=align)
    if name == "window":
        return attn_ext.SlidingWindow(generator.choice((None, 3, 40)), generator.choice((None, 0, 17)), align)
    if name == "prefix":
        return attn_ext.SlidingWindow(9, 0, align) | attn_ext.Prefix(generator.choice((1, 4, 50)))
    if name == "key_lengths":
        return attn_ext.KeyLengths([generator.randint(0, kv_len) for _ in range(batch)])
    if name == "segments":
        return attn_ext.Segments(torch.randint(3, (batch, query_len)), torch.randint(3, (batch, kv_len)))
    if name == "boolean":
        return attn_ext.Dense(torch.rand(batch, 1, query_len, kv_len) < 0.75)
    if name == "blocks":
        sizes = (generator.choice((1, batch)), generator.choice((1, sizes[1])), query_len, kv_len)
        block_size = generator.choice(BLOCK_SIZES), generator.choice(BLOCK_SIZES)
        return make_block_mask(sizes, block_size, density=generator.choice((0.3, 0.7)))
    assert name == "additive"
    return attn_ext.Dense(make_bias(sizes, generator.choice(BIAS_SHAPES), dtype).requires_grad_())


def make_block_mask(
    sizes: tuple[int, ...], block_size: tuple[int, int], density: float, partial: float = 0.5
) -> attn_ext.BlockMask:
    """Random blocks, `density` of them there and `partial` of these with random elements."""
    counts = [-(-length // size) for length, size in zip(sizes[2:], block_size, strict=True)]
    listed = torch.rand(*sizes[:2], *counts) < density
    full = torch.rand(listed.shape) >= partial
    elements = torch.rand(sizes) < 0.5

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Blocks may reach beyond the last query and key: what is said there is not to matter.
        block = b, h, q // block_size[0], k // block_size[1]
        return listed[block] & (full[block] | elements[b, h, q % sizes[2], k % sizes[3]])

    return attn_ext.BlockMask.from_predicate(
        visible, *sizes[2:], batch=sizes[0], heads=sizes[1], block_size=block_size
    )


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], *names: str) -> None:
    """Asserts that the named results (all of them by default) are equal to the last bit."""
    for name in names or expected:
        assert torch.equal(actual[name], expected[name]), f"{name} differs"
