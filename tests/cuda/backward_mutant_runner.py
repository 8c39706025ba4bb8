"""Runs the CUDA kernels of one backward pass, as they are and with a planted defect, and says how it shows.

    python tests/cuda/backward_mutant_runner.py INDEX

A process of its own, since a kernel with a defect may do anything.  Prints what was noticed, if anything.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in range(3)]

import torch
from backward_mutants import MUTANTS
from forward_mutant_runner import blocks, causal, elements, inputs, lengths, modifiers, plain, ranges, scores
from forward_variants import ONE_PROCESSOR
from gradient_variants import BIAS_VARIANTS, PASSES, QueryVariant
from mutant_library import Subject, main
from operators import BACKWARD, attention_by
from problems import BIAS_SHAPES, assert_same_bits, make_bias, make_inputs, run

from attn_ext import Causal, Dense, KeyLengths, SlidingWindow
from attn_ext.testing import check_attention


def lines(name: str) -> set[tuple[str, str]]:
    """The kernels of one pass and of its biases."""
    query = PASSES[name].query
    fits = (v for v in BIAS_VARIANTS if v.dtype == query.dtype and v.key_columns >= query.key_columns)
    bias = min(fits, key=lambda variant: variant.key_columns)
    keys = {("KEY_GRADIENT", variant.name) for variant in PASSES[name].keys}
    return keys | {("QUERY_GRADIENT", name), ("BIAS_GRADIENT", bias.name)}


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

if __name__ == "__main__":
    subject = Subject(
        files=("backward.cu", "backward_steps.cu"),
        lines=lines,
        variants={name: kernels.query for name, kernels in PASSES.items()},
        problems=PROBLEMS,
        by=functools.partial(attention_by, names=BACKWARD),
        device=ONE_PROCESSOR,
    )
    main(subject, MUTANTS)
