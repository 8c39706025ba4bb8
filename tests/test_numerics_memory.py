"""Memory: O(L) beyond inputs and outputs, and none of it left behind."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from problems import DTYPES, make_inputs, run

import attn_ext

LENGTH, HEADS, HEAD_DIM = 8192, 2, 32

PEAK_SCRIPT = """
import resource, sys, torch, attn_ext
dtype, training, length, heads, head_dim = sys.argv[1], sys.argv[2] == "True", *map(int, sys.argv[3:6])
dtype, threads = getattr(torch, dtype), 1
torch.set_num_threads(threads)

def step(length):
    q, k, v = (torch.randn(1, heads, length, head_dim, dtype=dtype, requires_grad=training) for _ in range(3))
    out = attn_ext.attention(q, k, v, mask=attn_ext.Causal(align="top_left"))
    if training:
        out.sum().backward()

step(16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
def test_peak_is_linear_in_length(dtype: str, training: bool) -> None:
    """In a process of its own, since a peak never falls; inputs, outputs and gradients are 2 MiB a tensor."""
    arguments = (dtype, training, LENGTH, HEADS, HEAD_DIM)
    result = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    peak, scores = int(result.stdout) * 1024, LENGTH * LENGTH * HEADS * 4
    assert peak < scores / 8, f"{peak / 2**20:.0f} MiB; one score matrix has {scores / 2**20:.0f} MiB"


BIAS_SCRIPT = """
import resource, sys, torch, attn_ext
heads, length, *shape = map(int, sys.argv[1:])
torch.set_num_threads(1)

def step(length, shape):
    q, k, v = (torch.randn(1, heads, length, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape, requires_grad=True)
    attn_ext.attention(q, k, v, bias=bias, softcap=9.0, dropout_p=0.1).sum().backward()
    assert bias.grad.shape == bias.shape

step(16, [min(size, 16) for size in shape])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(length, shape)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("shape", [(1, 2048, 2048), (2048,), (16, 1, 2048), (16, 2048, 1), (1,)], ids=str)
def test_gradient_of_a_bias_needs_memory_of_its_own_shape(shape: tuple[int, ...]) -> None:
    """16 heads share a bias of 16 MiB, or one that is smaller: nothing has the 256 MiB of all scores."""
    heads, length = 16, 2048
    arguments = (heads, length, *shape)
    result = subprocess.run(
        [sys.executable, "-c", BIAS_SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    peak, bias = int(result.stdout) * 1024, math.prod(shape) * 4
    inputs = 8 * heads * length * 16 * 4  # and output, and gradients
    # The bias, its gradient as the kernel sums it and as autograd hands it out, and scratch memory.
    limit = 3.5 * bias + inputs + 24 * 2**20
    assert peak < limit, f"{peak / 2**20:.0f} MiB, more than {limit / 2**20:.0f}"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system has no /proc/self/statm")
@pytest.mark.usefixtures("isa")
def test_no_growth() -> None:
    def step(count: int) -> None:
        for number in range(count):
            dtype = DTYPES[number % len(DTYPES)]
            inputs = make_inputs(2, 4, 100, 150, 32, group=2, dtype=dtype)
            options = {"bias": torch.randn(150), "sinks": torch.randn(4), "dropout_p": 0.1}
            options |= {"softcap": 9.0, "alibi_slopes": torch.rand(4)}
            run(*inputs, mask=attn_ext.Causal(align="bottom_right"), **(options if number % 2 else {}))
        gc.collect()

    step(40)
    before = resident_bytes()
    step(200)
    # One leaked output alone would be 200 x 100 KiB.
    assert resident_bytes() - before < 8 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
