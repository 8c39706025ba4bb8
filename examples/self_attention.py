"""The self-attention of many tutorials beside `attn_ext.nn.SelfAttention`: same parameters, same results.

Prints the largest difference between the outputs and the gradients of the two, and the time and peak memory
of each as the sequence grows:

    python examples/self_attention.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor, nn

from attn_ext.nn import SelfAttention


class EinsumSelfAttention(nn.Module):
    """Multi-head attention with every step written out; the scores take N x heads x L x L elements."""

    def __init__(self, embed_size: int, heads: int) -> None:
        super().__init__()
        self.embed_size = embed_size
        self.heads = heads
        self.head_dim = embed_size // heads
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.fc_out = nn.Linear(heads * self.head_dim, embed_size)

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        values = self.values(values.unflatten(2, (self.heads, self.head_dim)))
        keys = self.keys(keys.unflatten(2, (self.heads, self.head_dim)))
        queries = self.queries(query.unflatten(2, (self.heads, self.head_dim)))

        energy = torch.einsum("nqhd,nkhd->nhqk", queries, keys)
        if mask is not None:
            energy = energy.masked_fill(mask == 0, -1e20)
        weights = torch.softmax(energy / self.embed_size**0.5, dim=3)
        out = torch.einsum("nhqk,nkhd->nqhd", weights, values)
        return self.fc_out(out.flatten(2))


MODULES: dict[str, Callable[[int, int], nn.Module]] = {
    "einsum": EinsumSelfAttention,
    "attn_ext": SelfAttention,
}
PASSES = {"forward": False, "forward + backward": True}


def run(module: nn.Module, x: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """The output, and with `backward` the gradients of the input and of every parameter."""
    if not backward:
        with torch.no_grad():
            return (module(x, x, x, None),)
    x = x.detach().requires_grad_()
    out = module(x, x, x, None)
    return out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))


def max_differences(modules: dict[str, nn.Module], x: Tensor) -> dict[str, tuple[float, float]]:
    """For the output and each gradient, the largest difference and the largest value to see it beside."""
    expected, actual = (run(modules[name], x, backward=True) for name in MODULES)
    parameters = (name for name, _ in modules["einsum"].named_parameters())
    names = ("output", "gradient of the input", *(f"gradient of {name}" for name in parameters))
    return {
        name: ((a - e).abs().max().item(), e.abs().max().item())
        for name, a, e in zip(names, actual, expected, strict=True)
    }


def peak_memory(name: str, shape: tuple[int, int, int], heads: int, threads: int, backward: bool) -> int:
    """Bytes by which one pass raises the peak size of this process, which is to be a new one."""
    unit = 1 if sys.platform == "darwin" else 1024
    torch.set_num_threads(threads)
    module = MODULES[name](shape[2], heads)
    x = torch.randn(shape)
    run(module, x[:, :16], backward)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(module, x, backward)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def in_new_process(function: Callable[..., int], *arguments: object) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def median_seconds(modules: dict[str, nn.Module], x: Tensor, backward: bool, rounds: int) -> dict[str, float]:
    """Median time of each, measured in turns so that a change of the machine's pace meets both alike."""
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for i in range(rounds + 1):
        for name in sorted(modules, reverse=i % 2 == 0):
            start = time.perf_counter()
            run(modules[name], x, backward)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def compare(einsum: float, fused: float) -> str:
    """Both numbers and their ratio, where there is one: a small problem may not raise the peak at all."""
    ratio = f"{einsum / fused:.1f}x" if fused else "-"
    return f"{einsum:10.1f}{fused:10.1f}{ratio:>10}"


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="L")
    parser.add_argument("--batch", type=int, default=1, help="sequences N (%(default)s)")
    parser.add_argument("--embed-size", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    modules = {name: build(options.embed_size, options.heads) for name, build in MODULES.items()}
    modules["attn_ext"].load_state_dict(modules["einsum"].state_dict())

    shapes = {length: (options.batch, length, options.embed_size) for length in options.lengths}

    print(
        f"N={options.batch}, embed_size={options.embed_size}, heads={options.heads}, "
        f"float32, {options.threads} threads"
    )

    # Memory first, while this process is small: the peak of a new process can start at its parent's.
    mebibytes: dict[tuple[str, int, str], float] = {}
    for title, backward in PASSES.items():
        for length, shape in shapes.items():
            for name in MODULES:
                show_progress(f"measuring memory: {title}, L={length}, {name}")
                peak = in_new_process(peak_memory, name, shape, options.heads, options.threads, backward)
                mebibytes[title, length, name] = peak / 2**20

    length = min(shapes)
    show_progress("")
    print(f"\nLargest difference at L={length}, beside the largest value\n")
    for name, (difference, largest) in max_differences(modules, torch.randn(shapes[length])).items():
        print(f"  {name:28} {difference:8.1e}  of {largest:8.1e}")

    for title, backward in PASSES.items():
        print(f"\n{title.capitalize()} (median of {options.rounds} rounds; peak memory beyond the input)\n")
        print(f"  {'':6}{'time, ms':^30}{'peak memory, MiB':^30}")
        print(f"  {'L':>6}" + f"{'einsum':>10}{'attn_ext':>10}{'ratio':>10}" * 2)
        for length, shape in shapes.items():
            show_progress(f"  {length:6}  measuring time")
            seconds = median_seconds(modules, torch.randn(shape), backward, options.rounds)
            show_progress("")
            times = compare(*(1e3 * seconds[name] for name in MODULES))
            sizes = compare(*(mebibytes[title, length, name] for name in MODULES))
            print(f"  {length:6}{times}{sizes}", flush=True)


if __name__ == "__main__":
    main()
