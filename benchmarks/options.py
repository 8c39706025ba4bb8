"""``python -m benchmarks.options``: what masks, dropout and score modifiers cost, as a Markdown table.

Each row times a call with the option, the same call without it, and torch's scaled_dot_product_attention with
the same mask where it has such, interleaved on one thread, after a comparison with the float64 reference.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Prefix, Segments, SlidingWindow, reference, testing

from .timing import FULL, QUICK, Plan, clock_for, race, ratios

SEED = 1234


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Attributes:
        shape: (B, H, L, D).
        backward: time the backward alone instead of the forward.
        arguments: makes the arguments of `attn_ext.attention` that the option consists of.
        plain: those of the call that it is compared with; none by default.
        torch_mask: makes what torch is given as attn_mask.
        share: the part of the pairs of queries and keys that is visible; the plain time is multiplied by it.
    """

    name: str
    shape: tuple[int, int, int, int]
    arguments: Callable[[], dict[str, Any]]
    plain: Callable[[], dict[str, Any]] = dict
    backward: bool = False
    torch_mask: Callable[[], Tensor] | None = None
    share: float = 1.0
    dtypes: tuple[str, ...] = field(default=("float32", "bfloat16"))


def _padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    mask[1:, ..., length * 3 // 5 :] = False
    return mask


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def _documents(length: int, count: int) -> Tensor:
    return torch.arange(length) * count // length


def options(length: int) -> list[Option]:
    """The rows, for problems of about `length`."""
    short, usual = (2, 12, length // 2, 64), (1, 8, length, 64)
    long, window = 16 * length, length // 2
    square = (1, 1, length, length)
    return [
        Option(
            "bool key-padding mask",
            short,
            lambda: {"mask": Dense(_padding(2, length // 2))},
            torch_mask=lambda: _padding(2, length // 2),
        ),
        Option(
            "key lengths",
            short,
            lambda: {"mask": KeyLengths([length // 2, length // 2 * 3 // 5])},
            torch_mask=lambda: _padding(2, length // 2),
        ),
        *(
            Option(
                f"float mask (1, 1, L, L), D {head_dim}",
                (1, 8, length, head_dim),
                lambda: {"mask": Dense(_random(*square))},
                torch_mask=lambda: _random(*square),
            )
            for head_dim in (32, 64, 128)
        ),
        Option(
            f"window of {window}, L {long}",
            (1, 4, long, 64),
            lambda: {"mask": SlidingWindow(window - 1, 0)},
            share=(window * long - window * (window - 1) / 2) / long**2,
        ),
        Option(
            f"window of {window} or prefix of 4, L {long}",
            (1, 4, long, 64),
            lambda: {"mask": SlidingWindow(window - 1, 0) | Prefix(4)},
            share=(window * long - window * (window - 1) / 2) / long**2,
        ),
        Option(
            f"16 packed documents, L {4 * length}, causal",
            (1, 8, 4 * length, 64),
            lambda: {"mask": Causal() & Segments(_documents(4 * length, 16))},
            plain=lambda: {"mask": Causal()},
            share=1 / 16,
        ),
        Option("softcap", usual, lambda: {"softcap": 30.0}),
        Option("softcap, backward", usual, lambda: {"softcap": 30.0}, backward=True),
        Option("ALiBi", usual, lambda: {"alibi_slopes": 2.0 ** -torch.arange(1.0, 9)}),
        Option(
            "ALiBi, backward", usual, lambda: {"alibi_slopes": 2.0 ** -torch.arange(1.0, 9)}, backward=True
        ),
        Option("sinks", usual, lambda: {"sinks": _random(8)}),
        Option("sinks, backward", usual, lambda: {"sinks": _random(8).requires_grad_()}, backward=True),
        Option("dropout", usual, lambda: {"dropout_p": 0.1, "dropout_seed": SEED}),
        Option("dropout, backward", usual, lambda: {"dropout_p": 0.1, "dropout_seed": SEED}, backward=True),
        *(
            Option(
                f"gradient of a bias {name}, backward",
                usual,
                lambda shape=shape: {"bias": _random(*shape).requires_grad_()},
                plain=lambda shape=shape: {"bias": _random(*shape)},
                backward=True,
            )
            for name, shape in (
                ("(1, 1, L, L)", square),
                ("(1, H, L, L)", (1, 8, length, length)),
                ("(1, H, 1, L)", (1, 8, 1, length)),
            )
        ),
    ]


def measure(option: Option, dtype: str, plan: Plan) -> list[str]:
    """A row: milliseconds with and without, their ratio, and how much longer torch takes."""
    torch.manual_seed(SEED)
    inputs = [torch.randn(option.shape, dtype=getattr(torch, dtype)) for _ in range(3)]
    arguments, plain = option.arguments(), option.plain()
    _check(inputs, arguments)
    if option.backward:
        contenders = {"with": _backward(inputs, arguments), "without": _backward(inputs, plain)}
    else:
        contenders = {
            "with": lambda: attn_ext.attention(*inputs, **arguments),
            "without": lambda: attn_ext.attention(*inputs, **plain),
        }
        if option.torch_mask is not None:
            mask = option.torch_mask()
            mask = mask if mask.dtype == torch.bool else mask.to(inputs[0].dtype)
            contenders["torch"] = lambda: F.scaled_dot_product_attention(*inputs, mask)
    samples = race(contenders, plan)
    clock = clock_for(1)
    milliseconds = {name: 1e3 * statistics.median(sample.seconds(clock)) for name, sample in samples.items()}
    cost = statistics.median(ratios(samples["with"], samples["without"], clock)) / option.share
    shape = "x".join(map(str, option.shape))
    row = [
        option.name,
        shape,
        dtype,
        f"{milliseconds['with']:.2f}",
        f"{milliseconds['without']:.2f}",
        f"{cost:.2f}",
    ]
    versus = (
        f"{statistics.median(ratios(samples['torch'], samples['with'], clock)):.2f}"
        if "torch" in samples
        else ""
    )
    return [*row, versus]


def _backward(inputs: list[Tensor], arguments: dict[str, Any]) -> Callable[[], object]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attn_ext.attention(*leaves, **arguments)
    leaves += [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    grad_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def _check(inputs: list[Tensor], arguments: dict[str, Any]) -> None:
    """Compares with the reference before anything is timed."""
    if inputs[0].size(2) > 2048:  # the reference would not fit: the same options at a length that does
        inputs = [tensor[:, :, :2048] for tensor in inputs]
        arguments = arguments | {
            name: Causal() & Segments(_documents(2048, 16))
            for name, value in arguments.items()
            if name == "mask" and any(isinstance(part, Segments) for part in value.parts)
        }
    batch, heads, length, _ = inputs[0].shape
    expected = dict(arguments)
    if p := expected.pop("dropout_p", 0.0):
        expected["dropout"] = testing.dropout_mask(
            expected.pop("dropout_seed"), p, batch, heads, length, length
        )
    with torch.no_grad():
        exact = reference.attention(*inputs, **expected)
        error = (attn_ext.attention(*inputs, **arguments) - exact).norm() / exact.norm()
    if not error <= 16 * torch.finfo(inputs[0].dtype).eps:
        raise RuntimeError(f"off by {float(error):.1e} of its norm: {arguments}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems, in a few seconds")
    parser.add_argument("--only", default="", metavar="TEXT", help="only options whose name contains TEXT")
    parsed = parser.parse_args(argv)
    torch.set_num_threads(1)
    header = ("option", "B x H x L x D", "dtype", "ms", "ms without", "cost", "x torch")
    print(f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", sep="\n")
    for option in options(128 if parsed.quick else 1024):
        if parsed.only in option.name:
            for dtype in option.dtypes:
                print(
                    f"| {' | '.join(measure(option, dtype, QUICK if parsed.quick else FULL))} |", flush=True
                )


if __name__ == "__main__":
    main()
