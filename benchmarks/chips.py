"""The GPUs of the roofline model: every figure with where it is from.

"datasheet" and "whitepaper" are NVIDIA's, "measured" is a published microbenchmark, "recalled" is cited from
memory, and "assumed" is none of these.  Nothing here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from .report import markdown_table


class Figure(NamedTuple):
    """A number and its source or reason."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """A GPU; "a clock" is one of a multiprocessor's.

    Attributes:
        arch: compute capability without the point, which decides registers, shared memory and occupancy.
        multiprocessors: how many.
        clock: Hz.
        memory: bandwidth of HBM or GDDR, bytes a second.
        l2: bytes that the L2 cache gives to all multiprocessors together, a clock.
        tensor: FLOP a clock and multiprocessor of `mma.sync` with 16-bit inputs and fp32 sums, which is what
            these kernels use; not of wgmma (sm_90) or tcgen05 (sm_100).
        fp32: single-precision operations (a fused multiply-add is one) a clock and multiprocessor.
    """

    name: str
    arch: str
    multiprocessors: Figure
    clock: Figure
    memory: Figure
    l2: Figure
    tensor: Figure
    fp32: Figure


_CHIPS = (
    Chip(
        "A100",
        "80",
        Figure(108, "A100 whitepaper, table 4"),
        Figure(1.41e9, "A100 whitepaper, boost clock; 312 TFLOP/s / (108 x 2048)"),
        Figure(2.039e12, "datasheet, A100 80GB SXM"),
        Figure(5120, "A100 whitepaper, p. 35; smallscientist1/cuda_microbenchmark has 3840 with cp.async"),
        Figure(2048, "A100 whitepaper, 1024 FMA; mma.sync has all of it"),
        Figure(64, "A100 whitepaper, table 4: FP32 cores"),
    ),
    Chip(
        "L4",
        "89",
        Figure(58, "fpsbench.com: 7424 cores of 128; others say 60, but 121 TFLOP/s at 2.04e9 are of 58"),
        Figure(2.04e9, "datasheet, 121 TFLOP/s / (58 x 1024); assumed to be held: 72 W may not allow it"),
        Figure(300e9, "datasheet"),
        Figure(973, "assumed: half of an RTX 4090's 1946 (smallscientist1/cuda_microbenchmark), as its bus"),
        Figure(1024, "datasheet, 121 TFLOP/s without sparsity; mma.sync has all of it"),
        Figure(128, "FP32 cores: 7424 / 58"),
    ),
    Chip(
        "H100",
        "90",
        Figure(132, "H100 whitepaper, SXM5"),
        Figure(1.83e9, "datasheet, 989 TFLOP/s / (132 x 4096); smallscientist1/cutlass-kernels saw 1.78e9"),
        Figure(3.35e12, "datasheet, H100 SXM"),
        Figure(4472, "measured on an H800 PCIe: Luo et al., arXiv 2402.13499, table V"),
        Figure(2576, "recalled: mma.sync gets 62.9 % of wgmma's 4096, Luo et al., arXiv 2402.13499"),
        Figure(128, "H100 whitepaper, table 3: FP32 cores"),
    ),
    Chip(
        "B200",
        "100",
        Figure(148, "Chips and Cheese on the B200: 74 in each of two dies"),
        Figure(1.856e9, "datasheet, 2.25 PFLOP/s / (148 x 8192)"),
        Figure(8e12, "datasheet"),
        Figure(5014, "assumed: as much a multiprocessor as the H100"),
        Figure(2048, "8 clocks a quadrant for an m16n8k16, 8.2 to 8.5 measured (public code); tcgen05: 8192"),
        Figure(128, "FP32 cores: 18944 (hmc-tech.com) / 148"),
    ),
)
CHIPS = {chip.name: chip for chip in _CHIPS}

# Of every multiprocessor here, a clock.
EXPONENTIALS = Figure(
    16, "ex2: FlashAttention-4 of H100 and B200; recalled of the others, CUDA Programming Guide"
)
ISSUE = Figure(4, "recalled: four schedulers of one each, A100 and H100 whitepapers; assumed of the others")
SHARED = Figure(128, "bytes: 32 banks of 4, CUDA Programming Guide; FlashAttention-4 of H100 and B200")
# Of instructions.
MMA_FLOPS = Figure(4096, "m16n8k16: 2 x 16 x 8 x 16")
LDMATRIX_BYTES = Figure(512, "ldmatrix.x4: four 8x8 matrices of 16 bits, without bank conflicts")
COMMON = {
    "exponentials": EXPONENTIALS,
    "warp instructions issued": ISSUE,
    "shared memory": SHARED,
    "FLOP of an mma": MMA_FLOPS,
    "bytes of an ldmatrix": LDMATRIX_BYTES,
}


def chip(name: str) -> Chip:
    """A GPU by its name.

    Raises:
        ValueError: a name that is not known.
    """
    if name not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}; got {name!r}")
    return CHIPS[name]


def figures(of: Chip) -> dict[str, Figure]:
    """The figures of a chip by their names."""
    return {field.name: value for field in fields(of) if isinstance(value := getattr(of, field.name), Figure)}


def figures_table(named: dict[str, Figure], title: str) -> str:
    """Figures and their sources as Markdown."""
    rows = [[name, f"{figure.value:g}", figure.source] for name, figure in named.items()]
    return markdown_table([title, "figure", "source or reason"], rows)
