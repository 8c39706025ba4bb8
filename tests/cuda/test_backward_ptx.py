"""The CUDA backward kernels as nvcc compiles them: their PTX, interpreted, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import interpreted
from problems import make_block_mask, make_inputs

from attn_ext import Causal, KeyLengths, Prefix, SlidingWindow
from attn_ext.testing import check_attention


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backward_ptx")


SIZES = {  # of heads, and the options that lead to other kernels for them
    "bf16": ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    "f16": ((64, 64), (128, 128)),
    "f32": ((32, 32), (64, 64), (128, 128), (256, 256)),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize(
    ("element", "columns", "arch"),
    [
        *((element, columns, "sm_80") for element, sizes in SIZES.items() for columns in sizes),
        ("f16", (64, 64), "sm_75"),
    ],
)
def test_ptx(element: str, columns: tuple[int, int], arch: str, modified: bool, directory: Path) -> None:
    """Whole tiles, cut ones, blocks; or all terms of the scores, with their gradients."""
    sizes = 1, 2, 137, 133
    inputs = make_inputs(*sizes, columns[0] - 8, value_dim=columns[1], group=2, dtype=DTYPES[element])
    options: dict[str, Any] = {"mask": Causal("bottom_right"), "sinks": torch.tensor([0.5, -1.0])}
    if modified:
        mask = (SlidingWindow(30, 9, "bottom_right") | Prefix(5)) & KeyLengths([sizes[3] - 4])
        options = {
            "mask": mask & make_block_mask(sizes, (32, 48), 0.7),
            "bias": torch.randn(1, 2, 1, sizes[3]).half().requires_grad_(),
            "softcap": 5.0,
            "alibi_slopes": torch.rand(2),
            "dropout_p": 0.3,
            "dropout_seed": 3,
        }
    with interpreted(arch, directory) as launches:
        check_attention(*inputs, **options)
    kernels = {name.removeprefix("flash_").split("_gradient")[0] for name in launches.names}
    assert {"key", "query", f"backward_rows_{element}"} <= kernels
    assert ("bias" in kernels) == modified
