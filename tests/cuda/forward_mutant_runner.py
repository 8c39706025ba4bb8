"""Runs one CUDA forward kernel, as it is and with a planted defect, and says how the defect shows.

    python tests/cuda/forward_mutant_runner.py INDEX

A process of its own, since a kernel with a defect may do anything.  Prints what was noticed, if anything.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in range(3)]

import torch
from forward_mutants import MUTANTS
from forward_variants import BY_NAME, ONE_PROCESSOR, Variant
from mutant_library import Subject, main
from operators import FORWARD, attention_by
from problems import make_block_mask, make_inputs

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Prefix, Segments, SlidingWindow
from attn_ext.testing import check_attention


def modifiers(variant: Variant, **options: Any) -> dict[str, Any]:
    return options if variant.modified else {}


def inputs(variant: Variant, query_tiles: float = 1.3, key_tiles: float = 2.4, columns: int = 0) -> tuple:
    """Two batch elements and four heads, lengths in tiles, and so many columns less than there may be."""
    return make_inputs(
        *(2, 4, int(variant.queries * query_tiles), int(variant.keys * key_tiles)),
        variant.key_columns - columns,
        value_dim=variant.value_columns - columns,
        group=2,
        dtype=variant.dtype,
    )


def lengths(tensors: tuple) -> tuple[int, int]:
    return tensors[0].size(2), tensors[1].size(2)


def plain(variant: Variant) -> None:
    check_attention(*inputs(variant, 2, 3))


def causal(variant: Variant) -> None:
    dropout = modifiers(variant, dropout_p=0.4, dropout_seed=7)
    tensors = inputs(variant, columns=8)
    check_attention(*tensors, mask=Causal("bottom_right"), **dropout)
    check_attention(*tensors, mask=Causal(), sinks=torch.linspace(-1, 3, 4), **dropout)


def ranges(variant: Variant) -> None:
    tensors = inputs(variant, key_tiles=4.2, columns=16)
    window = SlidingWindow(20, 9, "bottom_right")
    check_attention(*tensors, mask=window)
    check_attention(*tensors, mask=(window | Prefix(5)) & KeyLengths([variant.keys * 2 + 3, 50]))


def elements(variant: Variant) -> None:
    tensors = inputs(variant)
    query_len, kv_len = lengths(tensors)
    segments = Segments(torch.randint(3, (2, query_len)), torch.randint(3, (2, kv_len)))
    check_attention(*tensors, mask=segments, **modifiers(variant, softcap=0.7))
    dense = torch.rand(2, 1, query_len, kv_len) < 0.7
    check_attention(*tensors, mask=Dense((dense * 2).byte().view(torch.bool)))
    check_attention(*tensors, mask=Dense(dense.mT.contiguous().mT))


def blocks(variant: Variant) -> None:
    tensors = inputs(variant, key_tiles=3.3)
    for sizes in ((16, 16), (48, 80), (64, 128)):
        mask = make_block_mask((1, 4, *lengths(tensors)), sizes, 0.5)
        check_attention(*tensors, mask=mask, **modifiers(variant, alibi_slopes=torch.rand(2, 4)))


def scores(variant: Variant) -> None:
    tensors = inputs(variant)
    query_len, kv_len = lengths(tensors)
    bias = torch.randn(2, 4, kv_len, query_len).mT
    check_attention(*tensors, **modifiers(variant, bias=bias, alibi_slopes=torch.rand(4), softcap=30.0))
    check_attention(*tensors, **modifiers(variant, bias=bias[:, :1, :, :1].half()))


def packed(variant: Variant) -> None:
    if not variant.modified:
        return
    tensors = [tensor[0].transpose(0, 1) for tensor in inputs(variant)]
    cuts = [torch.tensor([0, cut, tensors[index].size(0)]) for index, cut in enumerate((20, 50))]
    slopes = torch.tensor([0.3, 0.1, 0.7, 0.2])
    out, lse = attn_ext.attention_varlen(*tensors, *cuts, alibi_slopes=slopes, return_lse=True)
    first = out[:20].transpose(0, 1)[None], lse[None, :, :20]
    alone = (tensor[:cut].transpose(0, 1)[None] for tensor, cut in zip(tensors, (20, 50, 50), strict=True))
    check_attention(*alone, alibi_slopes=slopes, attention=lambda *_, **__: first, grad=False)


def growing(variant: Variant) -> None:
    """The maximum moves in every tile, and the values are nearly too large."""
    query, key, value = inputs(variant, 0.5, 6)
    ones, flat = torch.ones_like(query) / query.size(-1), torch.full_like(key, 4.8)
    flat[:, :, -variant.keys :] = 0  # the first tile; the others exceed it by nearly what moves the maximum
    large = torch.full_like(value, 0.9 * torch.finfo(variant.dtype).max)
    assert attn_ext.attention(ones, flat, large, scale=1.0).isfinite().all(), "the output overflows"
    ramp = torch.linspace(60, -60, key.size(2))[None, None, :, None].to(variant.dtype)
    rising = ramp.expand_as(key)
    for keys in (rising, rising.flip(2)):
        check_attention(ones, keys, value, scale=1.0)


def huge(variant: Variant) -> None:
    check_attention(*inputs(variant), scale=3e3, mask=Causal("bottom_right"))
    check_attention(*inputs(variant, 0.3), mask=KeyLengths([0, 9]), sinks=torch.tensor([3.0, -60, 1e4, -3e4]))
    query, key, value = make_inputs(1, 1, 20, 70, 16, dtype=variant.dtype)
    lowest = torch.zeros(1, 1, 20, 70)
    lowest[:, :, :10] = torch.finfo(torch.float32).min
    check_attention(query, key, value, lse=False, **modifiers(variant, bias=lowest))


def non_finite(variant: Variant) -> None:
    query, key, value = inputs(variant, key_tiles=2)
    mask = Causal("bottom_right")
    expected = attn_ext.attention(query, key, value, mask=mask)
    for bad, at in ((torch.nan, -9), (torch.inf, -20)):
        poisoned = value.clone()
        poisoned[:, :, at, 1::2] = bad
        actual = attn_ext.attention(query, key, poisoned, mask=mask)
        assert torch.equal(actual[:, :, :at], expected[:, :, :at]), "what is not finite is felt"
        wrong = actual[:, :, at:, 1::2]
        assert (wrong.isnan() if bad != bad else wrong == bad).all(), "what is not finite is lost"
        assert torch.equal(actual[:, :, at:, ::2], expected[:, :, at:, ::2]), "it is felt in other columns"
    key, value = key.clone(), value.clone()
    key[:, :, -30:], value[:, :, -30:] = torch.nan, torch.inf
    hidden = KeyLengths([key.size(2) - 30, 3])
    check_attention(query, key, value, mask=hidden)
    row = torch.zeros(key.size(2)).masked_fill_(torch.arange(key.size(2)) >= key.size(2) - 30, -torch.inf)
    if variant.modified:
        check_attention(query, key, value, bias=row)


PROBLEMS = (plain, causal, ranges, elements, blocks, scores, packed, growing, huge, non_finite)

if __name__ == "__main__":
    subject = Subject(
        files=("forward.cu",),
        lines=lambda name: {("FORWARD", name)},
        variants=BY_NAME,
        problems=PROBLEMS,
        by=functools.partial(
            attention_by, names=FORWARD
        ),  # backward is the CPU's, given what the kernel left
        device=ONE_PROCESSOR,
    )
    main(subject, MUTANTS)
