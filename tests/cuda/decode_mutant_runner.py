"""Runs the CUDA decoding kernels, as they are and with a planted defect, and says how the defect shows.

    python tests/cuda/decode_mutant_runner.py INDEX

A process of its own, since a kernel with a defect may do anything.  Prints what was noticed, if anything.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in range(3)]

import torch
from decode_mutants import MUTANTS
from decode_variants import BY_NAME, DecodeVariant, check_means, read_back
from emulated import A100
from mutant_library import Subject, main
from operators import decode_by
from test_decode import Problem, rotate, tables
from test_decode_emulated import check

from attn_ext import attention_decode


def decode(variant: DecodeVariant, lengths: tuple[int, ...], **sizes: Any) -> tuple[Problem, dict]:
    sizes = {"heads": 2, "group": 3, "query_len": 2, "page_size": 16, **sizes}
    return variant.problem(lengths, variant.caches[0], **sizes)


def plain(variant: DecodeVariant) -> None:
    for page_size in (None, 5):
        problem, options = decode(variant, (600, 33, 0), page_size=page_size)
        check(problem, problem.decode(**options))
    problem, options = decode(variant, (900,), heads=1)
    check(problem, problem.decode(**options, num_splits=60))
    check(problem, problem.decode(**options, num_splits=7))


def windows(variant: DecodeVariant) -> None:
    for window, query_len in ((20, 1), (40, 9), (0, 3), (5, 40)):
        problem, options = decode(variant, (300, 50), query_len=query_len)
        check(problem, problem.decode(**options, window=(window, 0)), window)


def odd(variant: DecodeVariant) -> None:
    for columns in (variant.columns - 24, variant.columns - 3):
        problem, options = decode(variant, (90, 20), head_dim=columns, value_dim=columns - 8)
        check(problem, problem.decode(**options))


def scores(variant: DecodeVariant) -> None:
    if variant.quantised:
        return
    problem, options = decode(variant, (90, 20), query_len=5)
    slopes = torch.rand(2, 6)
    problem.check(**options, alibi_slopes=slopes, softcap=3.0, sinks=torch.linspace(-1, 3, 6), window=60)
    problem.check(**options, scale=3e3)
    problem, _ = decode(variant, (190, 21), query_len=1)
    check_means(problem, scale=1e5)


def hidden(variant: DecodeVariant) -> None:
    problem, options = decode(variant, (90, 40), query_len=4)
    before = problem.decode(**options)
    if not variant.quantised:
        for b, length in enumerate((90, 40)):
            at = problem.place(b, torch.tensor([length - 2]))
            problem.key_cache[at], problem.value_cache[at] = torch.nan, torch.inf
        after = problem.decode(**options)
        assert torch.equal(before[0][:, :, :2], after[0][:, :, :2]), "what is hidden is felt"
    for page in (-1, -(2**32), 10**6):
        problem, options = decode(variant, (64,), heads=1)
        problem.table[0, 1] = page
        kept = torch.cat((torch.arange(16), torch.arange(32, 64)))
        results = problem.decode(**options)
        problem.keys, problem.values = ([rows[0][:, kept]] for rows in (problem.keys, problem.values))
        check(problem, results)


def wrong(variant: DecodeVariant) -> None:
    problem, options = decode(variant, (64, 20), appended=3)
    for length in (-40, 10**6):
        problem.seqlens[0] = length
        problem.table[1, 1] = -1
        problem.decode(**options)


def append(variant: DecodeVariant) -> None:
    for interleaved in (False, True):
        problem, options = decode(variant, (40, 21), appended=3, page_size=4)
        cos, sin = tables(50, 8, torch.float32)
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        options |= {"block_table": problem.table, **problem.new}
        query, *caches, lengths = problem.arguments()
        at = problem.place(1, torch.tensor([18]))
        if variant.quantised:
            options["key_scale"][at[0], 0] = 0
        by_cpu = [cache.clone() for cache in caches]
        results = attention_decode(query, *caches, lengths, **options, return_lse=True)
        read_back(problem, options)
        if variant.quantised:
            assert not caches[0][at][:, 0].any(), "what has no scale is stored"
        else:
            by_operator(query, *by_cpu, lengths, **options)
            for one, two in zip(caches, by_cpu, strict=True):
                assert torch.equal(one.nan_to_num(7), two.nan_to_num(7)), "something else is appended"
        for b in range(2):
            start = problem.keys[b].size(1) - 2
            turned = rotate(problem.query[b], start, cos, sin, interleaved)
            problem.query[b] = turned.to(variant.dtype)
        check(problem, results)


ON_CPU = torch.ops.attn_ext.attention_decode.default


def by_operator(*arguments: Any, **options: Any) -> None:
    """The CPU's kernel, whatever `attention_decode` is to call."""
    values = dict(zip(("query", "key_cache", "value_cache", "cache_seqlens"), arguments, strict=True))
    values |= {"scale": 1.0, "softcap": 0.0, **options}
    with torch.inference_mode():  # past what the autograd kernel calls
        ON_CPU(*(values.get(argument.name) for argument in ON_CPU._schema.arguments))


PROBLEMS = (plain, windows, odd, scores, hidden, wrong, append)

if __name__ == "__main__":
    subject = Subject(
        files=("decode.cu", "decode_append.cu", "decode_merge.cu"),
        lines=lambda name: {("DECODE", name)},
        variants=BY_NAME,
        problems=PROBLEMS,
        by=decode_by,
        device=A100._replace(processors=4),
    )
    main(subject, MUTANTS)
