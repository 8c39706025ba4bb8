"""``python -m tools.cuda_report``: compiles every CUDA kernel and writes what it is made of to
docs/cuda_report.md.

Registers, spills, shared memory, theoretical occupancy and the machine instructions of the main loop, for
each kernel of csrc/core/variants.def and each architecture.  Needs nvcc and cuobjdump, and no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import cuda_build, cuda_toolkit, sass_stats
from .occupancy import occupancy, resident_blocks
from .ptxrun import parse

ROOT = Path(__file__).resolve().parent.parent

# The kernels of the lines, in their order: threads and bytes of shared memory.
_SIZES_SOURCE = """
#include "cuda/flash_bias_gradient.cuh"
#include "cuda/flash_decode.cuh"
#include "cuda/flash_forward.cuh"
#include "cuda/flash_key_gradient.cuh"
#include "cuda/flash_query_gradient.cuh"
using namespace attn_ext;
using namespace attn_ext::cuda;
#define SIZES(Traits, ...) Traits<__VA_ARGS__>::kThreads, static_cast<int>(Traits<__VA_ARGS__>::kSharedBytes),
#define FORWARD(name, ...) SIZES(ForwardTraits, __VA_ARGS__)
#define KEY_GRADIENT(name, ...) SIZES(KeyGradientTraits, __VA_ARGS__)
#define QUERY_GRADIENT(name, ...) SIZES(QueryGradientTraits, __VA_ARGS__)
#define BIAS_GRADIENT(name, ...) SIZES(BiasGradientTraits, __VA_ARGS__)
#define DECODE(name, ...) SIZES(DecodeTraits, __VA_ARGS__)
extern "C" __device__ int sizes[] = {
#include "core/variants.def"
};
"""
_COLUMNS = {  # of the table: classes of instructions
    "tensor core": ("HMMA",),
    "ldmatrix": ("LDSM",),
    "cp.async": ("LDGSTS",),
    "exp2": ("MUFU.EX2",),
    "fp32": ("FFMA", "FMUL", "FADD", "FMNMX", "FSEL/FSETP"),
    "convert": ("convert", "half"),
    "integer, moves": ("integer", "MOV"),
    "local memory": ("LDL/STL",),
}


class Kernel(NamedTuple):
    """A compiled variant; `loop` is empty if it uses no tensor cores."""

    name: str
    arch: str
    threads: int
    shared: int
    resources: sass_stats.Resources
    loop: Counter[str]
    turn: int | None = None

    def row(self) -> str:
        """A line of the table of its architecture."""
        sizes = self.arch, self.threads, self.resources.registers, self.shared + self.resources.static_shared
        cells = [
            f"`{self.name}`",
            self.threads,
            self.resources.registers,
            self.resources.spill_stores + self.resources.spill_loads,
            f"{sizes[-1] / 1024:g}",
            f"{resident_blocks(*sizes)} ({occupancy(*sizes):.0%})",
            self.loop.total() - self.loop["padding"] if self.loop else "",
            "" if self.turn is None else self.turn,
            *(sum(self.loop[kind] for kind in kinds) if self.loop else "" for kinds in _COLUMNS.values()),
        ]
        return f"| {' | '.join(map(str, cells))} |"


def main_loop(instructions: list[sass_stats.SassInstruction]) -> tuple[Counter[str], int | None]:
    """The loop over tiles that no mask cuts: what is in it, and what a usual turn executes.

    Of the loops with tensor-core instructions and copies, or with the former if none has both, those with
    most of them; of these the shortest.
    """
    products = sass_stats.tensor_core_loops(instructions)
    loops = sass_stats.tensor_core_loops(instructions, "LDGSTS") or products
    if not loops:
        return Counter(), None
    most = max(loop.counts["HMMA"] for loop in loops)
    loop = min((loop for loop in loops if loop.counts["HMMA"] == most), key=lambda loop: loop.counts.total())
    if any(inner.within(loop) for inner in products):
        return loop.counts, None
    turns = loop.turns()
    return loop.counts, turns[max(turns)]


def report(kernels: Iterable[Kernel]) -> str:
    """The page."""
    tables: dict[str, list[str]] = {}
    for kernel in kernels:
        tables.setdefault(kernel.arch, []).append(kernel.row())
    titles = [
        "kernel",
        "threads",
        "registers",
        "spilled",
        "shared KiB",
        "blocks (occupancy)",
        "loop",
        "turn",
        *_COLUMNS,
    ]
    header = f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}"
    sections = [f"## sm_{arch}\n\n{header}\n{chr(10).join(rows)}\n" for arch, rows in tables.items()]
    return f"{_INTRODUCTION}\n{chr(10).join(sections)}"


_INTRODUCTION = """# What the CUDA kernels are made of

Compiled, not run: `python -m tools.cuda_report`.  A row is a line of csrc/core/variants.def.

- *spilled*: bytes of registers that a thread stores to and loads from local memory.
- *blocks*: how many fit a multiprocessor at a time, by registers, shared memory and threads.
- *loop*: machine instructions of the loop over tiles that no mask cuts, its rare branches and the loops
  inside it included.
- *turn*: how many of them a warp executes for a tile that it copies whole, without rare branches; unknown
  where the loop has loops inside.  Then how many instructions of the loop are of which kind.

The same of others, compiled by nvcc 13.0, where head_dim is 128 unless it is named:

| kernel | queries x keys | registers | spilled | loop | tensor core | ldmatrix |
| --- | --- | --- | --- | --- | --- | --- |
| FlashAttention-2, sm_80, causal | 64 x 64 | 184 | 0 | 494 | 128 | 72 |
| FlashAttention-2, sm_80, causal | 128 x 64 | 255 | 468 | 914 | 256 | 80 |
| FlashAttention-2, sm_80, causal, 64 | 128 x 128 | 255 | 576 | 1167 | 256 | 72 |
| FlashAttention-3, sm_90a | | 168 | 24 | 599 | 16-19 (wgmma) | |

The rest of a loop is for what happens seldom: a row's maximum that grows, scores beyond 2^24 or normalizers
beyond 2^10, which FlashAttention does not tell apart, and copies that are clipped.

FlashAttention-2's backward pass, sm_80, 128, causal, queries x keys 64 x 128, 8 warps: 255 registers, 152
bytes spilled, 977 instructions, of them 32 atomic additions to dQ: 4552 executed by all warps for 64 x 64
pairs.  Here that is four warps' turns of `key_gradient_bf16_128` and of `query_gradient_bf16_128_long`, whose
tile has as many pairs, about 110 more of the first warp, which finds the tiles, and no atomics.
"""


def compile_kernels(archs: tuple[str, ...], only: str, jobs: int) -> list[Kernel]:
    """Compiles the variants whose name contains `only`."""
    toolchain = cuda_build.Toolchain(cuda_toolkit.nvcc(), (0, 0), archs)
    flags = cuda_build.nvcc_flags(toolchain, ROOT)
    variants = (ROOT / "csrc" / "core" / "variants.def").read_text()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sources = cuda_build.variant_sources(variants)
        sizes = _kernel_sizes(directory, list(sources), archs[0])

        def compile_one(name: str) -> list[Kernel]:
            (directory / name).write_text(sources[name])
            return _compile(directory / name, flags, *sizes[name])

        wanted = [name for name in sources if only in name]
        with ThreadPoolExecutor(jobs) as pool:
            kernels = [kernel for several in pool.map(compile_one, wanted) for kernel in several]
    return sorted(kernels, key=lambda kernel: int(kernel.arch))


def _run(*command: str | Path) -> str:
    completed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if completed.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{completed.stdout}")
    return completed.stdout


def _kernel_sizes(directory: Path, names: list[str], arch: str) -> Mapping[str, tuple[int, int]]:
    source = directory / "sizes.cu"
    source.write_text(_SIZES_SOURCE)
    flags = "-std=c++20", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "--expt-relaxed-constexpr", "-ptx"
    _run(cuda_toolkit.nvcc(), *flags, source, "-o", source.with_suffix(".ptx"))
    variables = parse(source.with_suffix(".ptx").read_text()).globals
    data = next(variable.initial for variable in variables if variable.name == "sizes")
    numbers = memoryview(data).cast("i").tolist()
    return dict(zip(names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))


def _compile(source: Path, flags: list[str], threads: int, shared: int) -> list[Kernel]:
    """A kernel for each architecture."""
    output = source.with_suffix(".o")
    log = _run(cuda_toolkit.nvcc(), *flags, "-Xptxas", "-v", "-c", source, "-o", output)
    resources = sass_stats.parse_ptxas_log(log)
    return [
        Kernel(
            source.stem, arch.removeprefix("sm_"), threads, shared, resources[arch, name], *main_loop(code)
        )
        for (arch, name), code in sass_stats.disassemble(output).items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_report", description=__doc__.split("\n")[0])
    parser.add_argument("--archs", default=";".join(cuda_build.DEFAULT_ARCHS), metavar="80;90")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cuda_report.md", metavar="FILE")
    options = parser.parse_args(argv)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    kernels = compile_kernels(tuple(options.archs.split(";")), options.only, jobs)
    options.out.write_text(report(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
