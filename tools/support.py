"""``python -m tools.support``: asks the selectors of kernels what they support and writes docs/support.md.

Every cell is an answer of `attn_ext.why_unsupported`: for the CPU as it is, for GPUs with the emulator's
operators, which ask the selector of csrc/cuda about any device.  Needs no GPU and no nvcc.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attn_ext

ROOT = Path(__file__).resolve().parent.parent

Ask = Callable[[int, int], "str | None"]


class Gpu(NamedTuple):
    """What of a device decides which kernel runs on it, as tests/cuda/emulated.py takes it."""

    arch: int  # 10 * compute capability
    shared_memory: int  # bytes that a block may have
    processors: int = 100


GPUS = tuple(
    Gpu(arch, kib << 10)
    for arch, kib in ((75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 1024  # of the interface
QUERIES, KEYS, HEADS, KV_HEADS = 16, 48, 4, 2

INTRODUCTION = """\
# What is supported

Made by `python -m tools.support`, which asks what every call asks. `attn_ext.why_unsupported` tells
beforehand the reason that a call, or its backward pass, would give as a NotImplementedError.

```python
attn_ext.is_supported(query, key, value, mask=attn_ext.Causal(), derivatives=1)     # bool
attn_ext.why_unsupported(query, k, v, lengths, function=attn_ext.attention_decode)  # None, or the reason
```

"""
HEAD_DIMS = """\
## Head dims

The largest head_dim; where keys may be wider than values, the widest keys too, with the widest values. GPUs
go by compute capability and the shared memory that a block may have.

"""
FEATURES = """\
## Features

Forward and backward, in float16 with a head_dim of 64 where nothing else is said.

"""


# --- Questions ----------------------------------------------------------------------------------------------


def _inputs(dtype: torch.dtype, head_dim: int = 64, value_dim: int | None = None) -> list[Tensor]:
    return [
        torch.empty(2, heads, length, columns, dtype=dtype)
        for heads, length, columns in (
            (HEADS, QUERIES, head_dim),
            (KV_HEADS, KEYS, head_dim),
            (KV_HEADS, KEYS, value_dim or head_dim),
        )
    ]


def _why(*arguments: Any, **options: Any) -> str | None:
    """`why_unsupported`; what no device takes is no less unsupported."""
    try:
        return attn_ext.why_unsupported(*arguments, **options)
    except (TypeError, ValueError) as error:
        return str(error)


def _attention(dtype: torch.dtype, **options: Any) -> Ask:
    return lambda key_dim, value_dim: _why(*_inputs(dtype, key_dim, value_dim), **options)


def _decode(dtype: torch.dtype, cache: torch.dtype | None = None) -> Ask:
    options: dict[str, Any] = {"function": attn_ext.attention_decode}
    if cache is not None:
        options |= {name: torch.ones(2, KV_HEADS) for name in ("key_scale", "value_scale")}

    def ask(key_dim: int, value_dim: int) -> str | None:
        query, key, value = _inputs(dtype, key_dim, value_dim)
        caches = [tensor if cache is None else tensor.to(cache) for tensor in (key, value)]
        return _why(query, *caches, torch.tensor([KEYS, 1]), **options)

    return ask


def _operations(dtype: torch.dtype) -> dict[str, Ask]:
    modified = {"softcap": 1.0, "dropout_p": 0.5}
    bias = torch.zeros(QUERIES, KEYS, requires_grad=True)
    return {
        "forward": _attention(dtype),
        "forward, modified scores or dropout": _attention(dtype, **modified),
        "backward": _attention(dtype, derivatives=1),
        "backward, modified scores or dropout": _attention(dtype, **modified, derivatives=1),
        "backward, gradient of a bias": _attention(dtype, bias=bias, derivatives=1),
        "decode": _decode(dtype),
        "decode, int8 cache": _decode(dtype, torch.int8),
        "decode, fp8 cache": _decode(dtype, torch.float8_e4m3fn),
    }


def _largest(is_supported: Callable[[int], bool], least: int = 0) -> int:
    """The largest number for which it is, if all of more than `least` below are too."""
    most = MAX_HEAD_DIM
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if is_supported(middle) else (least, middle - 1)
    return least


def _limit(ask: Ask) -> tuple[str, str | None]:
    """What head dims are supported, and why no larger ones are."""
    square = _largest(lambda columns: ask(columns, columns) is None)
    if square == MAX_HEAD_DIM:
        return str(square), None
    text = str(square) if square else "no"
    if square:
        wider = _largest(lambda columns: ask(columns, square) is None, least=square)
        text += f", {wider} with {square}" if wider > square else ""
    return text, ask(square + 1, square + 1)


def _features() -> dict[str, Callable[[], str | None]]:
    half = torch.float16
    bias = torch.zeros(QUERIES, KEYS, requires_grad=True)
    blocks = attn_ext.BlockMask.from_map(torch.eye(1, 3, dtype=torch.bool), block_size=16)
    ids = torch.zeros(QUERIES, dtype=torch.int32), torch.zeros(KEYS, dtype=torch.int32)
    masks = {
        "`Causal`": attn_ext.Causal(),
        "`SlidingWindow`": attn_ext.SlidingWindow(8, 0),
        "`Prefix`": attn_ext.Causal() | attn_ext.Prefix(4),
        "`KeyLengths`": attn_ext.KeyLengths([3, KEYS]),
        "`Segments`": attn_ext.Segments(*ids),
        "`Dense`, bool": attn_ext.Dense(torch.ones(QUERIES, KEYS, dtype=torch.bool)),
        "`Dense`, added": attn_ext.Dense(bias.detach()),
        "`BlockMask`": blocks,
        "`BlockMask` and `Causal`": blocks & attn_ext.Causal(),
    }
    options: dict[str, dict[str, Any]] = {
        **{name: {"mask": mask} for name, mask in masks.items()},
        "bias": {"bias": bias.detach()},
        "gradient of a bias": {"bias": bias},
        "bias of float64": {"bias": bias.detach().double()},
        "dropout": {"dropout_p": 0.5},
        "softcap": {"softcap": 30.0},
        "ALiBi": {"alibi_slopes": torch.ones(HEADS)},
        "sinks and their gradient": {"sinks": torch.ones(HEADS, requires_grad=True)},
        "lse and its gradient": {"return_lse": True},
        "derivatives beyond the first: double backward, forward mode": {"derivatives": 2},
        "derivatives beyond the first, with dropout": {"derivatives": 2, "dropout_p": 0.5},
    }

    def attention(dtype: torch.dtype = half, key_dim: int = 64, value_dim: int = 64, **more: Any) -> Any:
        return lambda: _why(*_inputs(dtype, key_dim, value_dim), **{"derivatives": 1, **more})

    cu_seqlens = torch.tensor([0, 5, QUERIES])
    packed = [torch.empty(QUERIES, heads, 64, dtype=half) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    varlen = *packed, cu_seqlens, cu_seqlens
    query, key, value = _inputs(half)
    table, lengths = torch.tensor([[0], [1]]), torch.tensor([4, 5])
    new = {name: torch.empty(2, KV_HEADS, 1, 64, dtype=half) for name in ("new_key", "new_value")}
    rotary = {name: torch.empty(KEYS + 8, 16) for name in ("rotary_cos", "rotary_sin")}
    prefix = tuple(torch.empty(1, KV_HEADS, 8, 64, dtype=half) for _ in range(2))
    modifiers = {"softcap": 30.0, "alibi_slopes": torch.ones(HEADS), "sinks": torch.ones(HEADS)}

    def decode(**more: Any) -> Callable[[], str | None]:
        more = {"function": attn_ext.attention_decode, **more}
        return lambda: _why(query, key, value, lengths, **more)

    return {
        **{name: attention(**more) for name, more in options.items()},
        "grouped queries": attention(),
        "head dims that differ, 64 and 24": attention(key_dim=64, value_dim=24),
        "odd head dims, 33": attention(key_dim=33, value_dim=33),
        "`attention_varlen`": lambda: _why(*varlen, function=attn_ext.attention_varlen, derivatives=1),
        "`attention_decode`: pages": decode(block_table=table),
        "`attention_decode`: appending, rotary embedding": decode(**new, **rotary),
        "`attention_decode`: window": decode(window=(16, 0)),
        "`attention_decode`: shared prefix": decode(shared_prefix=prefix),
        "`attention_decode`: softcap, ALiBi, sinks": decode(**modifiers),
    }


# --- The document -------------------------------------------------------------------------------------------


class Notes:
    """Reasons, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, reason: str | None) -> str:
        if reason is None:
            return ""
        return f" [{self._numbers.setdefault(reason, len(self._numbers) + 1)}]"

    def lines(self) -> Iterator[str]:
        for reason, number in self._numbers.items():
            yield f"{number}. {reason}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _name(gpu: Gpu) -> str:
    return f"{gpu.arch // 10}.{gpu.arch % 10}"


def report(emulated: Callable[..., AbstractContextManager[Any]]) -> str:
    """The document.

    Args:
        emulated: ``emulated(device=gpu)`` is the context in which calls ask for the kernels of a GPU.
    """
    contexts = {"CPU": nullcontext}
    contexts |= {f"{_name(gpu)}, {gpu.shared_memory >> 10} KiB": _on(emulated, gpu) for gpu in GPUS}
    notes = Notes()
    operations = list(_operations(DTYPES[0]))
    limits, features = [], {name: [name] for name in _features()}
    for device, context in contexts.items():
        with context():
            for dtype in DTYPES:
                row = [device, str(dtype).removeprefix("torch.")]
                for ask in _operations(dtype).values():
                    text, reason = _limit(ask)
                    row.append(text + notes.mark(reason))
                limits.append(row)
            for name, ask in _features().items():
                reason = ask()
                features[name].append("yes" if reason is None else f"no{notes.mark(reason)}")
    columns = [device.partition(",")[0] for device in contexts]
    return (
        f"{INTRODUCTION}{HEAD_DIMS}{_table(['device', 'dtype', *operations], limits)}\n"
        f"{FEATURES}{_table(['feature', *columns], features.values())}\n"
        "## Reasons\n\n" + "".join(f"{line}\n" for line in notes.lines())
    )


def _on(emulated: Callable[..., AbstractContextManager[Any]], gpu: Gpu) -> Callable[[], Any]:
    return lambda: emulated(device=gpu)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the document."""
    parser = argparse.ArgumentParser(prog="python -m tools.support", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "support.md")
    options = parser.parse_args(arguments)
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]  # the emulator's operators are the tests'
    from emulated import emulated

    options.out.write_text(report(emulated))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
