"""The CUDA forward kernels as nvcc compiles them: their PTX, interpreted, against float64.

The emulator runs the source; this is what stands in inline assembly, and what the compiler makes of the rest.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_programs import require_toolkit
from forward_variants import VARIANTS, Variant
from launches import Launch, launched
from problems import make_block_mask, make_inputs
from programs import ROOT, run

from attn_ext import Causal, KeyLengths, Prefix, SlidingWindow
from attn_ext.testing import check_attention
from tools import cuda_build
from tools.ptxrun import Machine, Struct, parse

FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-lineinfo", f"-I{ROOT / 'csrc'}")


@functools.cache
def machine(variant: Variant, arch: str, directory: Path) -> Machine:
    """The kernel of a variant."""
    variants = (ROOT / "csrc" / "core" / "variants.def").read_text()
    source = directory / f"forward_{variant.name}.cu"
    source.write_text(cuda_build.variant_sources(variants)[source.name])
    ptx = source.with_suffix(f".{arch}.ptx")
    run(require_toolkit("nvcc"), *FLAGS, f"-arch={arch}", "-ptx", source, "-o", ptx)
    return Machine(parse(ptx.read_text()))


def check(variant: Variant, machine: Machine, inputs: tuple[torch.Tensor, ...], **options: Any) -> None:
    batch, heads, query_len = inputs[0].shape[:3]
    blocks = batch * heads * -(-query_len // variant.queries)

    def kernel(launch: Launch) -> None:
        arguments = [Struct(launch.params, launch.pointers)]
        machine.launch(blocks, variant.warps * 32, arguments, variant.shared_bytes)

    with launched(kernel):
        check_attention(*inputs, **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forward_ptx")


@pytest.mark.parametrize(
    ("variant", "arch"),
    [
        *((variant, "sm_80") for variant in VARIANTS),
        *((variant, "sm_75") for variant in VARIANTS if variant.dtype == torch.float16),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_ptx(variant: Variant, arch: str, directory: Path) -> None:
    """Whole tiles, cut ones, blocks and, where there are any, all terms of the scores."""
    sizes = 1, 2, variant.queries + 9, 2 * variant.keys + 5
    inputs = make_inputs(
        *sizes,
        variant.key_columns - 8,
        value_dim=variant.value_columns,
        group=2,
        dtype=variant.dtype,
    )
    compiled = machine(variant, arch, directory)
    check(variant, compiled, inputs, mask=Causal("bottom_right"), sinks=torch.tensor([0.5, -1.0]))
    mask = (SlidingWindow(30, 9, "bottom_right") | Prefix(5)) & KeyLengths([sizes[3] - 4])
    options: dict[str, Any] = {"mask": mask & make_block_mask((1, 2, *sizes[2:]), (32, 48), 0.7)}
    if variant.modified:
        options["bias"] = torch.randn(1, 2, 1, sizes[3]).half()
        options |= {"softcap": 5.0, "alibi_slopes": torch.rand(2), "dropout_p": 0.3, "dropout_seed": 3}
    check(variant, compiled, inputs, **options)
