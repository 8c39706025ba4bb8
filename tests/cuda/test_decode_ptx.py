"""The CUDA decoding kernels as nvcc compiles them: their PTX, interpreted, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_decode
import torch
from decode_variants import CASES, DecodeVariant, read_back
from emulated import A100
from interpreted import DEVICES, interpreted
from test_decode import tables
from test_decode_emulated import check

from attn_ext import attention_decode


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
    sizes = {"heads": 1, "group": 3, "query_len": 2, "appended": 2, "page_size": 8}
    problem, options = variant.problem((270, 21), cache, **sizes, head_dim=variant.columns - 16)
    cos, sin = tables(300, 8, torch.float32)
    options |= {"rotary_cos": cos, "rotary_sin": sin, "block_table": problem.table, **problem.new}
    query, *caches, lengths = problem.arguments()
    by_cpu = [store.clone() for store in caches]
    attention_decode(query, *by_cpu, lengths, **options)
    device = DEVICES[arch]._replace(shared_memory=A100.shared_memory)  # some want more than sm_75 has
    with interpreted(arch, directory, device=device) as launches:
        results = attention_decode(query, *caches, lengths, **options, window=(262, 0), return_lse=True)
    assert launches.names == ["decode_append", f"flash_decode_{variant.name}", "decode_merge"]
    for one, two in zip(caches, by_cpu, strict=True):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    problem.key_cache, problem.value_cache = caches
    read_back(problem, options)
    for b in range(2):
        start = problem.keys[b].size(1) - 2
        problem.query[b] = test_decode.rotate(problem.query[b], start, cos, sin, False).to(variant.dtype)
    check(problem, results, window=262)
