"""The CUDA decoding kernels as nvcc compiles them: their PTX, interpreted, against float64."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import test_decode
import torch
from cuda_programs import require_toolkit
from decode_launches import DecodeLaunch, decode_launched
from decode_variants import CASES, DecodeVariant, read_back
from programs import ROOT, run
from test_decode import tables
from test_decode_emulated import check
from test_forward_ptx import FLAGS

from attn_ext import attention_decode
from tools import cuda_build
from tools.ptxrun import Machine, Struct, parse


@functools.cache
def compiled(name: str, arch: str, directory: Path) -> Machine:
    """The kernel of a source of csrc/cuda, or of a variant."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    if not source.exists():
        variants = (ROOT / "csrc" / "core" / "variants.def").read_text()
        source = directory / f"{name}.cu"
        source.write_text(cuda_build.variant_sources(variants)[source.name])
    ptx = directory / f"{name}.{arch}.ptx"
    run(require_toolkit("nvcc"), *FLAGS, f"-arch={arch}", "-ptx", source, "-o", ptx)
    return Machine(parse(ptx.read_text()))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decode_ptx")


@pytest.mark.parametrize(
    ("variant", "cache", "arch"),
    [
        *((variant, cache, "sm_80") for variant, cache in CASES),
        *((variant, cache, "sm_75") for variant, cache in CASES if variant.dtype == torch.float16),
    ],
    ids=lambda value: getattr(value, "name", str(value).removeprefix("torch.")),
)
def test_ptx(variant: DecodeVariant, cache: torch.dtype, arch: str, directory: Path) -> None:
    """Append, rotary embedding, a window, pages, two ranges."""

    def kernels(launch: DecodeLaunch) -> None:
        for name, blocks, threads, shared in (
            ("decode_append", launch.append, 128, 0),
            (f"decode_{variant.name}", launch.decode, variant.warps * 32, variant.shared_bytes),
            ("decode_merge", launch.merge, 128, 0),
        ):
            arguments = [Struct(launch.params, launch.pointers)]
            compiled(name, arch, directory).launch(blocks, threads, arguments, shared)

    sizes = {"heads": 1, "group": 3, "query_len": 2, "appended": 2, "page_size": 8}
    problem, options = variant.problem((270, 21), cache, **sizes, head_dim=variant.columns - 16)
    cos, sin = tables(300, 8, torch.float32)
    options |= {"rotary_cos": cos, "rotary_sin": sin, "block_table": problem.table, **problem.new}
    query, *caches, lengths = problem.arguments()
    by_cpu = [store.clone() for store in caches]
    attention_decode(query, *by_cpu, lengths, **options)
    with decode_launched(kernels):
        results = attention_decode(query, *caches, lengths, **options, window=(262, 0), return_lse=True)
    for one, two in zip(caches, by_cpu, strict=True):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    problem.key_cache, problem.value_cache = caches
    read_back(problem, options)
    for b in range(2):
        start = problem.keys[b].size(1) - 2
        problem.query[b] = test_decode.rotate(problem.query[b], start, cos, sin, False).to(variant.dtype)
    check(problem, results, window=262)
