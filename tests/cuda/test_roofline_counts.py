"""The roofline model counts what kernels execute in the emulator."""

from __future__ import annotations

import pytest
from emulated import emulated
from forward_variants import BY_NAME
from problems import make_inputs
from programs import ROOT

import attn_ext
from benchmarks.kernel_model import parse_variants, work


def counters(name: str, tiles: int) -> dict[str, int]:
    """Of one block that visits so many tiles."""
    variant = BY_NAME[name]
    lengths = variant.queries, tiles * variant.keys
    sizes = {"value_dim": variant.value_columns, "dtype": variant.dtype}
    inputs = make_inputs(1, 1, *lengths, variant.key_columns, **sizes)
    with emulated(variant=name) as running:
        attn_ext.attention(*inputs)
        (launch,) = running.statistics()["launches"]
    return launch


@pytest.mark.parametrize("name", ["f16_64_long", "bf16_192_128"])
def test_work_of_a_tile_is_what_the_emulator_counts(name: str) -> None:
    kernels, _ = parse_variants((ROOT / "csrc" / "core" / "variants.def").read_text())
    (kernel,) = (kernel for kernel in kernels if (kernel.kind, kernel.name) == ("FORWARD", name))
    two, three = counters(name, 2), counters(name, 3)
    a_tile = {
        counter: three[counter] - two[counter]
        for counter in ("mma_m16n8k16", "ldmatrix", "sfu", "cp_async_bytes")
    }
    counted = work(kernel)
    assert a_tile == {
        "mma_m16n8k16": counted.mma,
        "ldmatrix": counted.ldmatrix,
        "sfu": counted.exponentials,
        "cp_async_bytes": counted.copied,
    }
