"""The CUDA forward kernels as nvcc compiles them: their PTX, interpreted, against float64.

The emulator runs the source; this is what stands in inline assembly, and what the compiler makes of the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forward_variants import VARIANTS, Variant
from interpreted import interpreted
from operators import BACKWARD, attention_by
from problems import make_block_mask, make_inputs

from attn_ext import Causal, KeyLengths, Prefix, SlidingWindow
from attn_ext.testing import check_attention


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
    mask = (SlidingWindow(30, 9, "bottom_right") | Prefix(5)) & KeyLengths([sizes[3] - 4])
    options: dict[str, Any] = {"mask": mask & make_block_mask((1, 2, *sizes[2:]), (32, 48), 0.7)}
    if variant.modified:
        options["bias"] = torch.randn(1, 2, 1, sizes[3]).half()
        options |= {"softcap": 5.0, "alibi_slopes": torch.rand(2), "dropout_p": 0.3, "dropout_seed": 3}
    with (
        interpreted(arch, directory, variant=variant.name) as launches,
        attention_by("attn_ext", BACKWARD),  # the CPU's, given what the kernel left
    ):
        check_attention(*inputs, mask=Causal("bottom_right"), sinks=torch.tensor([0.5, -1.0]))
        check_attention(*inputs, **options)
    assert launches.names == 2 * [f"flash_forward_{variant.name}"]
