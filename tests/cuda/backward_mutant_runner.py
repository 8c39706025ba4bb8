"""Runs the CUDA kernels of one backward pass, as they are and with a planted defect, and says how it shows.

    python tests/cuda/backward_mutant_runner.py INDEX

A process of its own, since a kernel with a defect may do anything.  Prints what was noticed, if anything.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in range(3)]

import torch
from backward_mutants import MUTANTS
from cuda_programs import SOURCES
from forward_mutants import Mutant
from gradient_variants import BIAS_VARIANTS, PASSES, QueryVariant
from launches import Memory
from mutant_runner import (
    DIRECTORY,
    STEPS,
    blocks,
    causal,
    elements,
    inputs,
    lengths,
    modifiers,
    plain,
    ranges,
    scores,
    write,
)
from operators import build_arguments
from problems import BIAS_SHAPES, assert_same_bits, make_bias, make_inputs, run
from programs import ROOT

from attn_ext import Causal, Dense, KeyLengths, SlidingWindow, _ops
from attn_ext.testing import check_attention
from tools import emulation

CALLS = """#include "cuda/kernels.h"

namespace {
constexpr attn_ext::cuda::Device kDevice{.index = 0, .arch = 80, .shared_memory = 163 << 10, .processors = 1};
}
extern "C" int64_t workspace(const attn_ext::BackwardParams* params) {
  return attn_ext::cuda::backward_workspace(*params, kDevice);
}
extern "C" void run(const attn_ext::BackwardParams* params, void* memory) {
  attn_ext::cuda::backward(*params, memory, {.device = kDevice});
}
"""
HOST = ("cuda/backward.cu", "cuda/backward_steps.cu")


def table(name: str) -> tuple[str, list[str]]:
    """variants.def with the kernels of one pass and of its biases only, and their lines."""
    query = PASSES[name].query
    wanted = {("KEY_GRADIENT", variant.name) for variant in PASSES[name].keys} | {("QUERY_GRADIENT", name)}
    fits = (v for v in BIAS_VARIANTS if v.dtype == query.dtype and v.key_columns >= query.key_columns)
    wanted.add(("BIAS_GRADIENT", min(fits, key=lambda variant: variant.key_columns).name))
    text, lines = [], []
    for line in (ROOT / "csrc" / "core" / "variants.def").read_text().splitlines():
        found = re.match(r"([A-Z_]+)\((\w+), ", line)
        if found and found.groups() in wanted:
            lines.append(line)
        if not found or found.groups() in wanted:
            text.append(line)
    return "\n".join(text), lines


def build(name: str, mutant: Mutant | None = None) -> Path:
    """A library with the kernels of a pass; the headers of the mutant come before those of csrc."""
    key = repr((name, mutant)).encode()
    directory = DIRECTORY / f"backward-{hashlib.sha256(key).hexdigest()[:16]}"
    text, lines = table(name)
    write(directory / "core" / "variants.def", text)
    write(directory / "calls.cpp", CALLS)
    instances = []
    for line in lines:  # a translation unit each
        kind, variant = re.match(r"([A-Z_]+)\((\w+)", line).groups()
        instances.append(directory / f"{kind.lower()}_{variant}.cu")
        write(instances[-1], f'#include "cuda/{kind.lower()}_instance.cuh"\n\n{line}\n')
    sources = {file: ROOT / "csrc" / file for file in HOST}
    if mutant is not None:
        genuine = (ROOT / "csrc" / mutant.file).read_text()
        assert genuine.count(mutant.old) == 1, f"{mutant.what}: {mutant.file} has changed"
        write(directory / mutant.file, genuine.replace(mutant.old, mutant.new))
        if mutant.file in sources:
            sources[mutant.file] = directory / mutant.file
    return emulation.build(
        [directory / "calls.cpp", *instances, *sources.values()],
        directory / "kernels.so",
        compile_args=[f"-iquote{directory}", "-Wno-error"],
    )


_Workspace = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(Memory), ctypes.c_int64
)


@functools.cache
def _operators() -> ctypes.CDLL:
    path = ROOT / "build" / "emulation" / "launched_backward.so"
    emulation.build([SOURCES / "launched_backward.cpp"], path, **build_arguments())
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


class Kernels:
    """The kernels of a pass on the emulator, in the place of the CPU's."""

    def __init__(self, library: Path) -> None:
        self.emulator = emulation.Emulator(library)
        self._run = self.emulator.library.run
        self._run.argtypes = ctypes.c_void_p, ctypes.c_void_p
        self._workspace = _Workspace(("workspace", self.emulator.library))
        self.counters: Counter[str] = Counter()  # what launches executed, and what their accesses cost

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """They compute all gradients of attention of CPU tensors; what is wrong is an AssertionError."""
        errors: list[Exception] = []

        @_Callback
        def call(params: int, workspace: int, memory: ctypes.Array, count: int) -> bool:
            try:
                self._launch(params, workspace, memory[:count])
            except Exception as error:
                errors.append(error)
            return not errors

        _operators().attn_ext_launched_backward_by(self._workspace, call)
        operator = torch.ops.attn_ext_launched_backward.attention_backward.default
        try:
            with mock.patch.object(_ops, "attention_backward", operator):
                yield
        except RuntimeError:
            if errors:
                raise errors[0] from None
            raise

    def _launch(self, params: int, workspace: int, memory: list[Memory]) -> None:
        running = self.emulator
        running.start(seed=1, access_sites=True, steps_per_block=STEPS)
        for part in memory:
            access = running.UNDEFINED if part.is_result else running.READ_ONLY
            running.library.attn_ext_emulation_register_memory(
                ctypes.c_void_p(part.address), ctypes.c_size_t(part.bytes), access
            )
        self._run(params, workspace)
        self._count(running.statistics())
        if errors := running.errors():
            raise AssertionError(errors.splitlines()[0])

    def _count(self, statistics: dict[str, Any]) -> None:
        for launch in statistics["launches"]:
            counts = {name: count for name, count in launch.items() if isinstance(count, int)}
            self.counters.update({f"{launch['kernel']}: {name}": count for name, count in counts.items()})
        for site in statistics["sites"]:
            cost = "wavefronts" if site["space"] == "shared" else "sectors"
            self.counters[f"{site['kernel']}: {site['operation']}: {cost}"] += site[cost]


# Problems


def sinks(variant: QueryVariant) -> None:
    tensors = inputs(variant)
    check_attention(*tensors, mask=KeyLengths([0, lengths(tensors)[1]]), sinks=torch.linspace(-1, 3, 4))
    check_attention(*tensors, mask=Causal("bottom_right") & KeyLengths([9, 3]))


def many_tiles(variant: QueryVariant) -> None:
    check_attention(*make_inputs(1, 2, 3, 33 * variant.keys, 8, dtype=variant.dtype))
    keys_of = PASSES[variant.name].keys[0]
    check_attention(*make_inputs(1, 2, 33 * keys_of.queries, 5, 8, group=2, dtype=variant.dtype))


def biases(variant: QueryVariant) -> None:
    if not variant.modified:
        return
    tensors = inputs(variant, columns=8)
    sizes = 2, 4, *lengths(tensors)
    for full in BIAS_SHAPES[1::2]:
        check_attention(*tensors, bias=make_bias(sizes, full, torch.float32), softcap=2.0)
    dropout = {"dropout_p": 0.4, "dropout_seed": 7}
    check_attention(*tensors, bias=make_bias(sizes, (False, True, True, False), torch.bfloat16), **dropout)
    check_attention(*tensors, bias=torch.randn(1), mask=KeyLengths([20, sizes[3] - 9]))


def huge(variant: QueryVariant) -> None:
    """And equal scores, whose weights depend on what rounding lse lost."""
    tensors = inputs(variant)
    out_shape = *tensors[0].shape[:3], tensors[2].size(-1)
    grad_out = torch.randn(out_shape, dtype=variant.dtype) / 64
    for scale in (3e2, 3e3):
        check_attention(*tensors, scale=scale, mask=Causal("bottom_right"), grad_out=grad_out, lse=False)
    check_attention(*inputs(variant, 0.3), mask=KeyLengths([0, 9]), sinks=torch.tensor([3.0, -60, 90, -3e4]))
    query, key = (torch.full((1, 1, rows, 8), 2.0, dtype=variant.dtype) for rows in (20, 70))
    results = run(query, key, torch.randn_like(key), scale=4096 * math.log(2))  # exact in units of log2
    torch.testing.assert_close(results["grad_value"], torch.full_like(key, 20 / 70))


def whole(variant: QueryVariant) -> None:
    """Tiles that no mask cuts, modified as they may be."""
    tensors = inputs(variant, 2, 4)
    options = modifiers(variant, dropout_p=0.4, dropout_seed=7, softcap=0.7, alibi_slopes=torch.rand(4))
    check_attention(*tensors, **options)
    check_attention(*tensors, sinks=torch.randn(4))


def non_finite(variant: QueryVariant) -> None:
    query, key, value = inputs(variant, 1.3, 2)
    query_len, kv_len = lengths((query, key))
    shift = kv_len - query_len
    at, mask = query_len // 2, Causal("bottom_right")
    grad_out = torch.randn(*query.shape[:3], value.size(-1), dtype=variant.dtype)
    options = modifiers(variant, alibi_slopes=torch.rand(4))
    expected = run(query, key, value, mask=mask, grad_out=grad_out, **options)
    for bad in (torch.nan, torch.inf):
        poisoned = grad_out.clone()
        poisoned[:, 1, at, ::2] = bad
        actual = run(query, key, value, mask=mask, grad_out=poisoned, **options)
        for name in ("grad_key", "grad_value"):
            hidden = slice(at + shift + 1, None)
            assert torch.equal(actual[name][:, :, hidden], expected[name][:, :, hidden]), f"{name} feels it"
        seen = actual["grad_value"][:, 0, : at + shift]
        assert not seen[..., ::2].isfinite().any(), "what is not finite is lost"
        assert torch.equal(seen[..., 1::2], expected["grad_value"][:, 0, : at + shift, 1::2]), (
            "in all columns"
        )
        for tensors in ((key.clone(), value), (key, value.clone())):
            changed = tensors[0] if tensors[0] is not key else tensors[1]
            changed[:, :, at + shift] = bad
            actual = run(query, *tensors, mask=mask, grad_out=grad_out, **options)
            same = actual["grad_query"][:, :, :at], expected["grad_query"][:, :, :at]
            assert torch.equal(*same), "rows feel a hidden key"
            assert not actual["grad_query"][:, :, at:].isfinite().all(-1).any(), "a bad key is lost"
    dead = torch.arange(query_len)[:, None] % 3 == 0
    seen = torch.arange(kv_len) < torch.tensor([33, kv_len])[:, None, None, None]
    bad_query, bad_grad, bad_lse = query.clone(), grad_out.clone(), torch.randn(query.shape[:3])
    grad_lse = bad_lse.clone()
    bad_query[:, :, ::3] = bad_grad[:, :, ::3] = torch.nan
    bad_key, bad_value = (torch.where(seen.mT, t, torch.inf) for t in (key, value))
    mask = Dense(seen & ~dead)
    expected = run(query, key, value, mask=mask, grad_out=grad_out, grad_lse=grad_lse, **options)
    actual = run(bad_query, bad_key, bad_value, mask=mask, grad_out=bad_grad, grad_lse=bad_lse, **options)
    assert_same_bits(actual, expected)
    sink = torch.randn(4)
    expected = run(query, key, value, mask=mask, sinks=sink, grad_out=grad_out)
    actual = run(query, key, value, mask=mask, sinks=sink, grad_out=bad_grad)
    assert torch.equal(actual["grad_sinks"], expected["grad_sinks"]), "the sink feels rows without keys"
    bad_grad.fill_(torch.nan)
    actual = run(query, key, value, sinks=torch.full((4,), -torch.inf), grad_out=bad_grad)
    assert not actual["grad_sinks"].any(), "a sink that is none feels something"


def several_tiles_of_a_bias(variant: QueryVariant) -> None:
    """More tiles than blocks worth having: some sum two."""
    if variant.modified:
        tensors = make_inputs(1, 1, 1500, 1500, 8, dtype=variant.dtype)
        check_attention(*tensors, bias=torch.randn(1), mask=SlidingWindow(60, 0))


PROBLEMS = (
    *(plain, causal, whole, ranges, elements, blocks, scores, sinks),
    *(biases, huge, many_tiles, non_finite, several_tiles_of_a_bias),
)


def results(kernels: Kernels, problem: Callable[[QueryVariant], None], name: str) -> tuple[Counter[str], str]:
    """The counters of a problem's launches, and what is wrong."""
    torch.manual_seed(0)
    kernels.counters = Counter()
    try:
        with kernels.in_use():
            problem(PASSES[name].query)
    except AssertionError as error:
        return kernels.counters, str(error) or "wrong"
    return kernels.counters, ""


def noticed(index: int) -> str:
    """How the defect shows first, by results and else by counters; nothing, if it does not."""
    mutant = MUTANTS[index]
    genuine, kernels = Kernels(build(mutant.variant)), Kernels(build(mutant.variant, mutant))
    of_mutant = {}
    for problem in PROBLEMS:
        of_mutant[problem], wrong = results(kernels, problem, mutant.variant)
        if wrong:
            _, of_genuine = results(genuine, problem, mutant.variant)
            assert not of_genuine, f"{problem.__name__}: {of_genuine}"
            return f"{problem.__name__}: {wrong.splitlines()[0]}"
    for problem, counters in of_mutant.items():
        expected, wrong = results(genuine, problem, mutant.variant)
        assert not wrong, f"{problem.__name__}: {wrong}"
        if counters != expected:
            name = min(name for name in counters | expected if counters[name] != expected[name])
            return f"{problem.__name__}: {name}: {counters[name]}, not {expected[name]}"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(noticed(int(sys.argv[1])))
