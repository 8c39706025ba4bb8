"""Patterns of the literature: by their definitions, by other implementations, and what they cost."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from problems import make_inputs
from test_block_mask import by_blocks, check, dense_of
from torch import Tensor

import attn_ext
from attn_ext import BlockMask, Causal, Prefix, SlidingWindow, patterns
from attn_ext.patterns import deepspeed

BLOCK_SIZES = (16, (32, 16), (16, 48))
LENGTHS = ((96, None), (100, None), (50, 70), (70, 50), (1, None), (9, 40), (0, None), (0, 5), (5, 0))
# Each pattern with arguments, and whether query i sees key j.
PATTERNS = {
    "sliding_window": (
        lambda *a, **k: patterns.sliding_window(*a, 5, 20, **k),
        lambda i, j: -5 <= j - i <= 20,
    ),
    "causal window": (lambda *a, **k: patterns.sliding_window(*a, 30, **k), lambda i, j: -30 <= j - i <= 0),
    "half window": (lambda *a, **k: patterns.sliding_window(*a, None, 3, **k), lambda i, j: j - i <= 3),
    "dilated": (
        lambda *a, **k: patterns.dilated(*a, 4, 5, **k),
        lambda i, j: abs(j - i) <= 20 and (j - i) % 5 == 0,
    ),
    "no dilation": (lambda *a, **k: patterns.dilated(*a, 40, 1, **k), lambda i, j: abs(j - i) <= 40),
    "diagonal": (lambda *a, **k: patterns.dilated(*a, 0, 9, **k), lambda i, j: i == j),
    "prefix_lm": (lambda *a, **k: patterns.prefix_lm(*a, 37, **k), lambda i, j: j < 37 or j <= i),
    "streaming": (
        lambda *a, **k: patterns.streaming(*a, 4, 10, **k),
        lambda i, j: j <= i and (j < 4 or i - j < 10),
    ),
    "no sinks": (lambda *a, **k: patterns.streaming(*a, 0, 20, **k), lambda i, j: j <= i and i - j < 20),
    "longformer window": (lambda *a, **k: patterns.longformer(*a, 20, **k), lambda i, j: abs(i - j) <= 20),
    "strided": (
        lambda *a, **k: patterns.strided(*a, 20, **k),
        lambda i, j: j <= i and (i - j <= 20 or (i - j) % 20 == 0),
    ),
    "long stride": (
        lambda *a, **k: patterns.strided(*a, 41, **k),
        lambda i, j: j <= i and (i - j <= 41 or (i - j) % 41 == 0),
    ),
    "every key": (lambda *a, **k: patterns.strided(*a, 1, **k), lambda i, j: j <= i),
    "fixed": (
        lambda *a, **k: patterns.fixed(*a, 12, 3, **k),
        lambda i, j: j <= i and (i // 12 == j // 12 or j % 12 >= 9),
    ),
    "fixed, long segments": (
        lambda *a, **k: patterns.fixed(*a, 40, **k),
        lambda i, j: j <= i and (i // 40 == j // 40 or j % 40 >= 32),
    ),
    "fixed, whole segments": (lambda *a, **k: patterns.fixed(*a, 5, 5, **k), lambda i, j: j <= i),
}


def by_definition(sees, query_len: int, kv_len: int) -> Tensor:
    pairs = [[sees(i, j) for j in range(kv_len)] for i in range(query_len)]
    return torch.tensor(pairs, dtype=torch.bool).view(1, 1, query_len, kv_len)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("seq_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("name", PATTERNS)
def test_definition(name, seq_len, kv_len, block_size):
    make, sees = PATTERNS[name]
    mask = make(seq_len, block_size=block_size, kv_len=kv_len)
    assert (mask.query_len, mask.kv_len) == (seq_len, seq_len if kv_len is None else kv_len)
    expected = by_definition(sees, mask.query_len, mask.kv_len)
    assert torch.equal(dense_of(mask), expected)
    assert torch.equal(mask.block_map, by_blocks(expected, mask.block_size).any(-1))
    check(mask.without_rule(), expected)


def test_default_block_size():
    for make, _ in PATTERNS.values():
        assert make(100).block_size == (64, 64)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("seq_len", "kv_len"), [(96, None), (50, 70), (70, 50)])
@pytest.mark.parametrize("tokens", [[0], [3, 17, 42, 49], list(range(16, 32))], ids=str)
def test_longformer(tokens, seq_len, kv_len, block_size):
    mask = patterns.longformer(seq_len, 7, tokens, block_size=block_size, kv_len=kv_len)
    expected = by_definition(
        lambda i, j: abs(i - j) <= 7 or i in tokens or j in tokens, mask.query_len, mask.kv_len
    )
    check(mask, expected)


def test_longformer_takes_a_tensor():
    assert patterns.longformer(99, 3, torch.tensor([4, 1])) == patterns.longformer(99, 3, [1, 4])


def bigbird_by_definition(count: int, window: int, global_blocks: list[int], drawn: Tensor | None) -> Tensor:
    heads = 1 if drawn is None else drawn.size(0)
    block_map = torch.zeros(heads, count, count, dtype=torch.bool)
    for row in range(count):
        block_map[:, row, max(row - window // 2, 0) : row + window // 2 + 1] = True
        for head in range(heads):
            block_map[head, row, [] if drawn is None else drawn[head, row]] = True
    for index in global_blocks:
        block_map[:, index] = block_map[:, :, index] = True
    return block_map


@pytest.mark.parametrize("global_blocks", [(0, -1), (), (2,), (-1, 0, 3)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 5])
def test_bigbird(window, global_blocks):
    drawn = torch.randint(9, (2, 9, 2))
    mask = patterns.bigbird(9 * 16 - 3, window, global_blocks, drawn, block_size=16)
    expected = bigbird_by_definition(9, window, list(global_blocks), drawn)
    assert mask == BlockMask.from_map(expected, query_len=9 * 16 - 3, kv_len=9 * 16 - 3, block_size=16)
    without = patterns.bigbird(9 * 16, window, global_blocks, 0, block_size=16)
    expected = bigbird_by_definition(9, window, list(global_blocks), None)
    assert torch.equal(without.block_map[0], expected)


@pytest.mark.parametrize("count", [0, 1, 3, 6, 20])
def test_random_blocks_of_bigbird(count):
    """As many as asked for, or as there are, among the blocks that are not seen anyway."""
    fixed = bigbird_by_definition(12, 3, [0, -1], None)
    mask = patterns.bigbird(12 * 16, random_blocks=count, heads=50, seed=1, block_size=16)
    drawn = mask.block_map[0] & ~fixed
    expected = (~fixed).sum(-1).clamp(max=count)
    assert torch.equal(drawn.sum(-1), expected.expand(50, -1))
    assert torch.equal(mask.block_map[0] & fixed, fixed.expand(50, -1, -1))
    assert mask == patterns.bigbird(12 * 16, random_blocks=count, heads=50, seed=1, block_size=16)
    other = patterns.bigbird(12 * 16, random_blocks=count, heads=50, seed=2, block_size=16)
    assert (mask == other) == (count in (0, 20))


def test_random_blocks_of_bigbird_are_uniform():
    mask = patterns.bigbird(12 * 16, random_blocks=2, heads=6000, block_size=16)
    shares = mask.block_map[0, :, 5].float().mean(0)
    free = torch.tensor([0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0]).bool()
    # 2 of 7; the standard deviation of such a share is 0.006.
    torch.testing.assert_close(shares[free], torch.full((7,), 2 / 7), rtol=0, atol=0.03)
    assert shares[~free].eq(1).all()


def probe(attend, heads: int, length: int) -> Tensor:
    """Which values reach each output of a self-attention module of uniform scores, (heads, L, L)."""
    hidden = torch.nn.functional.pad(torch.eye(length), (0, (heads - 1) * length))[None]
    return attend(hidden)[0].view(length, heads, length).transpose(0, 1) > 0


def one_value_per_token(module: torch.nn.Module, names: tuple[str, ...], heads: int, length: int) -> None:
    """Projections by which every head sees token j as unit vector j."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for name in names:
            module.get_submodule(name).weight[:, :length] = torch.eye(length).repeat(heads, 1)


@pytest.mark.parametrize("training", [False, True])
def test_bigbird_is_that_of_transformers(training, monkeypatch):
    modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    heads, count, block = 2, 13, 16
    length = count * block
    config = modeling.BigBirdConfig(
        hidden_size=heads * length,
        num_attention_heads=heads,
        block_size=block,
        num_random_blocks=3,
        attention_probs_dropout_prob=0.0,
        use_bias=False,
    )
    module = modeling.BigBirdBlockSparseAttention(config, seed=5).train(training)
    one_value_per_token(module, ("value",), heads, length)
    draws = []
    draw = module._bigbird_block_rand_mask_with_head
    monkeypatch.setattr(
        module, "_bigbird_block_rand_mask_with_head", lambda **k: draws.append(draw(**k)) or draws[-1]
    )
    blocked, band, from_mask, to_mask = modeling.BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, length), block
    )
    seen = probe(lambda hidden: module(hidden, band, from_mask, to_mask, blocked, blocked)[0], heads, length)

    drawn = torch.stack([torch.as_tensor(head).long() for head in draws[0]])
    drawn = torch.nn.functional.pad(drawn, (0, 0, 1, 1))  # the first and the last block see all
    assert bool(drawn.any()) == training
    mask = patterns.bigbird(length, random_blocks=drawn, block_size=block)
    assert torch.equal(dense_of(mask)[0], seen)


@pytest.mark.parametrize("tokens", [[], [0], [0, 20, 63]])
def test_longformer_is_that_of_transformers(tokens):
    modeling = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    heads, length = 2, 64
    config = modeling.LongformerConfig(
        hidden_size=heads * length,
        num_attention_heads=heads,
        attention_window=[16],
        attention_probs_dropout_prob=0.0,
    )
    module = modeling.LongformerSelfAttention(config, layer_id=0)
    one_value_per_token(module, ("value", "value_global"), heads, length)
    attention_mask = torch.zeros(1, length)
    attention_mask[:, tokens] = 10000.0
    seen = probe(
        lambda hidden: module(
            hidden,
            attention_mask=attention_mask,
            is_index_masked=attention_mask < 0,
            is_index_global_attn=attention_mask > 0,
            is_global_attn=bool(tokens),
        )[0],
        heads,
        length,
    )
    mask = patterns.longformer(length, 8, tokens, block_size=16)
    assert torch.equal(dense_of(mask)[0].expand(2, -1, -1), seen)


# What DeepSpeed 0.12.6 makes of these configurations for four heads and ten blocks, of the first heads.
LAYOUTS = {
    "fixed": (
        lambda: deepspeed.fixed(160, 4, attention="unidirectional"),
        "#......... ##........ ###....... ####...... ...##..... ...###.... ...####... ...#####.. ...#...##. "
        "...#...###",
    ),
    "fixed, horizontal": (
        lambda: deepspeed.fixed(160, 4, num_global_blocks=2, horizontal_global_attention=True),
        "####..#### ####..#### ########## ########## ..######## ..######## ########## ########## ########## "
        "##########",
    ),
    "fixed, by head": (
        lambda: deepspeed.fixed(160, 4, different_layout_per_head=True, num_different_global_patterns=3),
        "####...#.# ####...#.# ####...#.# ####...#.# ...#####.# ...#####.# ...#####.# ...#####.# ...#...### "
        "...#...###",
        "####..#..# ####..#..# ####..#..# ####..#..# ..#.####.# ..#.####.# ..#.####.# ..#.####.# ..#...#.## "
        "..#...#.##",
    ),
    "variable": (
        lambda: deepspeed.variable(
            160,
            4,
            local_window_blocks=[1, 3, 2],
            global_block_indices=[1, 8],
            global_block_end_indices=[2, 12],
            attention="unidirectional",
        ),
        "#......... .#........ .##....... .###...... .#..#..... .#..##.... .#....#... .#....##.. .#......## "
        ".#......##",
    ),
    "variable, random": (
        lambda: deepspeed.variable(
            160, 4, num_random_blocks=2, global_block_indices=[3], horizontal_global_attention=True, seed=7
        ),
        "####.#.... ####..#... ####....#. ########## #..#####.# ...######. ##.#####.. ...#####.# .#.#....## "
        ".#.#....##",
    ),
    "bigbird": (
        lambda: deepspeed.bigbird(160, 4, num_random_blocks=2, seed=7),
        "########## ###...#... ####....#. ######.... #..###...# #..####.#. ##...###.. #.....#### ##.#...### "
        "##......##",
    ),
    "bigbird, by head": (
        lambda: deepspeed.bigbird(
            160,
            4,
            different_layout_per_head=True,
            attention="unidirectional",
            num_global_blocks=2,
            seed=7,
        ),
        "#......... ##........ ###....... ####...... ##.##..... ##..##.... ##...##... ##...###.. ##.....##. "
        "##......##",
        "#......... ##........ ###....... ####...... ##.##..... ##..##.... ##...##... ##....##.. ##.....##. "
        "##....#.##",
    ),
    "bslongformer": (
        lambda: deepspeed.bslongformer(160, 4, global_block_indices=[0, 5], global_block_end_indices=[1, 7]),
        "########## ###..##... ####.##... #.#####... #..####... ########## ########## #....####. #....##### "
        "#....##.##",
    ),
    "bslongformer, unidirectional": (
        lambda: deepspeed.bslongformer(
            160, 4, num_sliding_window_blocks=4, global_block_indices=[2], attention="unidirectional"
        ),
        "#......... ##........ ###....... .###...... ..###..... ..####.... ..#.###... ..#..###.. ..#...###. "
        "..#....###",
    ),
    "local_sliding_window": (
        lambda: deepspeed.local_sliding_window(160, 4),
        "#......... ##........ .##....... ..##...... ...##..... ....##.... .....##... ......##.. .......##. "
        "........##",
    ),
    "local_sliding_window, bidirectional": (
        lambda: deepspeed.local_sliding_window(
            160, 4, num_sliding_window_blocks=5, attention="bidirectional"
        ),
        "###....... ####...... #####..... .#####.... ..#####... ...#####.. ....#####. .....##### ......#### "
        ".......###",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_deepspeed(name):
    make, *layouts = LAYOUTS[name]
    mask = make()
    assert (mask.query_len, mask.kv_len, mask.block_size) == (160, 160, (16, 16))
    assert mask.heads == (4 if "by head" in name else 1)
    for head, layout in enumerate(layouts):
        expected = [[character == "#" for character in row] for row in layout.split()]
        assert mask.block_map[0, head].tolist() == expected


def test_deepspeed_of_few_blocks():
    """Windows and global blocks that the sequence is too short for."""
    assert deepspeed.fixed(32, 1, num_local_blocks=8, num_global_blocks=4).density == 1
    assert deepspeed.variable(48, 1, global_block_indices=[5]).density == 1
    assert deepspeed.variable(0, 1).num_blocks == deepspeed.fixed(0, 1).num_blocks == 0
    assert deepspeed.variable(64, 2, different_layout_per_head=True).heads == 2
    assert deepspeed.bslongformer(64, 2, different_layout_per_head=True).heads == 2


SCORES = torch.tensor([[0.3, -1.0, 0.7], [-torch.inf, -torch.inf, 0.1]])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"k": 1}, [[0, 0, 1], [0, 0, 1]]),
        ({"k": 2}, [[1, 0, 1], [0, 0, 1]]),
        ({"k": 9}, [[1, 1, 1], [0, 0, 1]]),
        ({"k": 0}, [[0, 0, 0], [0, 0, 0]]),
        ({"threshold": 0.3}, [[1, 0, 1], [0, 0, 0]]),
        ({"threshold": -math.inf}, [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_from_scores(arguments, expected):
    mask = patterns.from_scores(SCORES, **arguments, query_len=120, block_size=(64, 32), rule=Prefix(80))
    block_map = torch.tensor(expected).bool()
    assert mask == BlockMask.from_map(block_map, query_len=120, block_size=(64, 32), rule=Prefix(80))
    heads = patterns.from_scores(SCORES.expand(2, 3, 2, 3), **arguments)
    assert torch.equal(heads.block_map, block_map.expand(2, 3, 2, 3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [16, (32, 16), (64, 16), (16, 48)], ids=str)
def test_topk_blocks(block_size, causal):
    query, key, _ = make_inputs(2, 4, 100, 100, 8, group=2)
    mask = patterns.topk_blocks(query, key, 3, causal=causal, block_size=block_size)
    query_block, kv_block = mask.block_size
    assert mask.rule == (Causal() if causal else None)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, mask.block_map.shape[:3])).tolist():
        mean = query[b, h].split(query_block)[r].double().mean(0)
        scores = torch.stack([block.double().mean(0) @ mean for block in key[b, h // 2].split(kv_block)])
        if causal:
            begin = torch.arange(len(scores)) * kv_block
            own = (begin + kv_block > r * query_block) & (begin < (r + 1) * query_block)
            scores[own] = torch.inf
            scores[begin >= (r + 1) * query_block] = -torch.inf
        best = scores.topk(max(3, int((scores == torch.inf).sum()))).indices
        assert mask.block_map[b, h, r].nonzero().squeeze(1).tolist() == sorted(
            best[scores[best] > -torch.inf].tolist()
        )


def test_every_query_sees_the_blocks_beside_it():
    """However many blocks of keys a block of queries overlaps, and however few are asked for."""
    query, key, _ = make_inputs(1, 2, 200, 200, 8)
    mask = patterns.topk_blocks(query, key, 1, causal=True, block_size=(64, 16))
    own = torch.arange(200).unsqueeze(1) // 16 == torch.arange(200) // 16
    causal = torch.ones(200, 200).tril().bool()
    assert (dense_of(mask) | ~(own & causal)).all()


def test_blocks_that_differ_in_length():
    query, key, _ = make_inputs(1, 2, 40, 200, 8, dtype=torch.float16)
    mask = patterns.topk_blocks(query, key, 2)
    assert (mask.query_len, mask.kv_len, mask.heads) == (40, 200, 2)
    assert mask.num_blocks == 4


LSH_CASES = {
    "one hash": {"n_buckets": 4},
    "three hashes": {"n_buckets": 8, "n_hashes": 3},
    "causal": {"n_buckets": 6, "n_hashes": 2, "causal": True},
    "one chunk": {"n_buckets": 2, "causal": True, "chunk": 128},
    "small chunks": {"n_buckets": 32, "n_hashes": 2, "chunk": 16},
}


def lsh_by_definition(lsh: patterns.LSH, chunk: int, causal: bool) -> Tensor:
    """Which tokens see each other, (B, H, n_hashes, L, L), from the buckets."""
    batch, heads, hashes, length = lsh.buckets.shape
    seen = torch.zeros(batch, heads, hashes, length, length, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, (batch, heads, hashes))).tolist():
        buckets = lsh.buckets[tuple(index)].tolist()
        places = sorted(range(length), key=lambda token: (buckets[token], token))
        chunk_of = {token: place // chunk for place, token in enumerate(places)}
        for i in range(length):
            others = [
                j
                for j in range(length)
                if j != i and chunk_of[i] - 1 <= chunk_of[j] <= chunk_of[i] and (j <= i or not causal)
            ]
            seen[(*index, i)][others or [i]] = True
    return seen


@pytest.mark.parametrize("length", [96, 70, 17, 1])
@pytest.mark.parametrize("name", LSH_CASES)
def test_lsh(name, length):
    arguments = LSH_CASES[name]
    qk = torch.randn(2, 2, length, 8)
    lsh = patterns.lsh(qk, **arguments, seed=3)
    hashes, buckets = arguments.get("n_hashes", 1), arguments["n_buckets"]
    chunk = arguments.get("chunk", -(-2 * length // (buckets * 16)) * 16)
    chunk = min(chunk, -(-length // 16) * 16)
    assert lsh.buckets.shape == lsh.order.shape == (2, 2, hashes, length)
    assert 0 <= int(lsh.buckets.min()) <= int(lsh.buckets.max()) < buckets
    assert lsh.block_mask.block_size == (chunk, chunk)

    seen = lsh_by_definition(lsh, chunk, arguments.get("causal", False))
    order = lsh.order.unsqueeze(-1).expand_as(seen)
    in_order = seen.gather(3, order).gather(4, order.mT)
    assert torch.equal(dense_of(lsh.block_mask), in_order.transpose(1, 2).flatten(0, 1))

    query, key, value = (torch.randn(2, 2, length, d, dtype=torch.float64) for d in (8, 8, 5))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    parts = [
        attn_ext.reference.attention(*leaves, mask=seen[:, :, n], scale=0.5, softcap=9.0, return_lse=True)
        for n in range(hashes)
    ]
    lses = torch.stack([lse for _, lse in parts])
    expected_lse = lses.logsumexp(0)
    weights = torch.exp(lses - expected_lse).unsqueeze(-1)
    expected = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    out, lse = lsh.attend(*leaves, scale=0.5, softcap=9.0, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    torch.testing.assert_close(
        torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse)),
        torch.autograd.grad((expected, expected_lse), leaves, (grad_out, grad_lse)),
    )
    assert torch.equal(lsh.attend(*leaves, scale=0.5, softcap=9.0), out)


def test_buckets_are_those_of_random_rotations():
    """Angles alone decide; opposite vectors fall in opposite buckets; a seed gives the same again."""
    qk = torch.randn(1, 1, 500, 8)
    buckets = patterns.lsh(qk, 8, 2).buckets
    assert torch.equal(patterns.lsh(3 * qk, 8, 2).buckets, buckets)
    assert torch.equal(patterns.lsh(-qk, 8, 2).buckets, (buckets + 4) % 8)
    assert torch.equal(patterns.lsh(qk, 8, 1).buckets, buckets[:, :, :1])
    assert not torch.equal(patterns.lsh(qk, 8, 2, seed=1).buckets, buckets)
    counts = torch.bincount(buckets.flatten(), minlength=8)
    assert counts.min() > 40  # of 125, were they equally likely


def test_numbers_beyond_any_length():
    """They are as good as the largest that makes a difference."""
    huge = 10**30
    everything, causal = Prefix(130), Causal()
    for mask, expected in (
        (patterns.longformer(130, huge), everything),
        (patterns.dilated(130, huge, 1), everything),
        (patterns.dilated(130, 3, huge), SlidingWindow(0, 0)),
        (patterns.strided(130, huge), causal),
        (patterns.fixed(130, huge, huge), causal),
        (patterns.bigbird(130, huge + 1), everything),
        (patterns.bigbird(130, 1, (), huge), everything),
    ):
        assert torch.equal(dense_of(mask), expected.to_dense(1, 1, 130, 130))


LONG = 131072
LONG_PATTERNS = {
    "sliding_window": lambda n: patterns.sliding_window(n, 512, 512),
    "dilated": lambda n: patterns.dilated(n, 256, 4),
    "prefix_lm": lambda n: patterns.prefix_lm(n, 5000),
    "streaming": lambda n: patterns.streaming(n, 4, 1024),
    "longformer": lambda n: patterns.longformer(n, 256, [0, 1, 77]),
    "strided": lambda n: patterns.strided(n, 362),
    "fixed": lambda n: patterns.fixed(n, 362),
    "bigbird": lambda n: patterns.bigbird(n, heads=12),
    "deepspeed.fixed": lambda n: deepspeed.fixed(n, 12, block=64, attention="unidirectional"),
    "deepspeed.variable": lambda n: deepspeed.variable(n, 12, block=64, num_random_blocks=1),
    "deepspeed.bigbird": lambda n: deepspeed.bigbird(n, 12, block=64, different_layout_per_head=True),
    "deepspeed.bslongformer": lambda n: deepspeed.bslongformer(n, 12, block=64),
    "deepspeed.local_sliding_window": lambda n: deepspeed.local_sliding_window(n, 12, block=64),
}


@pytest.mark.parametrize("name", LONG_PATTERNS)
def test_long_sequences_cost_their_blocks(name):
    """131,072 tokens take moments (0.3 s at most, on one core of 2.5 GHz), and bytes of the lists."""
    LONG_PATTERNS[name](100 * 64)
    begin = time.process_time()
    mask = LONG_PATTERNS[name](LONG)
    assert time.process_time() - begin < 1
    lists = 8 * (mask.num_blocks + mask.blocks.offsets.numel())
    assert mask.blocks.bits.size(0) < 400
    assert sum(tensor.nbytes for tensor in mask.blocks) <= lists + mask.blocks.bits.nbytes


PEAK_SCRIPT = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from test_patterns import LONG, LONG_PATTERNS

torch.set_num_threads(1)
make = LONG_PATTERNS[sys.argv[2]]
make(64 * 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = make(LONG)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, mask.num_blocks)
"""


@pytest.mark.parametrize("name", ["longformer", "strided", "fixed"])
def test_peak_is_linear_in_blocks(name):
    """In a process of its own. What is looked at at once takes tens of MiB, of however many blocks."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(Path(__file__).parent), name],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, blocks = map(int, result.stdout.split())
    limit = 48 * 1024 + 100 * blocks / 1024
    assert peak < limit, f"{peak / 1024:.0f} MiB for {blocks} blocks"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: patterns.sliding_window(-1, 2), ValueError, "seq_len must be at least 0, got -1"),
        (lambda: patterns.sliding_window(9.0, 2), TypeError, "seq_len must be an int, got float"),
        (lambda: patterns.sliding_window(9, -2), ValueError, "left must not be negative"),
        (lambda: patterns.sliding_window(9, 2, kv_len=-1), ValueError, "kv_len must be at least 0, got -1"),
        (
            lambda: patterns.sliding_window(9, 2, block_size=8),
            ValueError,
            "block_size must be of multiples of 16",
        ),
        (lambda: patterns.dilated(9, -1, 2), ValueError, "window must be at least 0, got -1"),
        (lambda: patterns.dilated(9, 1, 0), ValueError, "dilation must be at least 1, got 0"),
        (lambda: patterns.prefix_lm(9, -1), ValueError, "length must not be negative, got -1"),
        (lambda: patterns.streaming(9, -1, 3), ValueError, "sinks must be at least 0, got -1"),
        (lambda: patterns.streaming(9, 1, 0), ValueError, "window must be at least 1, got 0"),
        (lambda: patterns.longformer(9, "2"), TypeError, "window must be an int, got str"),
        (lambda: patterns.longformer(9, 2, [9]), ValueError, r"global_tokens must be from 0 to 8, got \[9\]"),
        (lambda: patterns.longformer(9, 2, [-1]), ValueError, "global_tokens must be from 0 to 8"),
        (lambda: patterns.longformer(9, 2, 1), TypeError, "global_tokens must be a sequence of int or a 1-D"),
        (lambda: patterns.longformer(9, 2, [10**30]), ValueError, "global_tokens must fit in 64 bits"),
        (lambda: patterns.longformer(9, 2, [0.5]), TypeError, "global_tokens must be a sequence of int"),
        (
            lambda: patterns.longformer(9, 2, torch.ones(9).bool()),
            TypeError,
            "global_tokens must be .*torch.bool",
        ),
        (lambda: patterns.strided(9, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: patterns.fixed(9, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: patterns.fixed(9, 4, 0), ValueError, "c must be at least 1, got 0"),
        (lambda: patterns.fixed(9, 4, 5), ValueError, "c must be at most stride, 4, got 5"),
        (lambda: patterns.bigbird(99, 2), ValueError, "window must be an odd number of blocks, got 2"),
        (lambda: patterns.bigbird(99, global_blocks=[2]), ValueError, "global_blocks must be from -2 to 1"),
        (lambda: patterns.bigbird(99, random_blocks=-1), ValueError, "random_blocks must be at least 0"),
        (
            lambda: patterns.bigbird(99, random_blocks=1.5),
            TypeError,
            "random_blocks must be an int, got float",
        ),
        (lambda: patterns.bigbird(99, heads=0), ValueError, "heads must be at least 1"),
        (lambda: patterns.bigbird(99, seed="1"), TypeError, "seed must be an int, got str"),
        (lambda: patterns.bigbird(99, seed=True), TypeError, "seed must be an int, got bool"),
        (lambda: patterns.bigbird(99, seed=2**63), ValueError, "seed must fit in 64 bits"),
        (
            lambda: patterns.bigbird(99, random_blocks=torch.zeros(1, 2, 1)),
            TypeError,
            "random_blocks must be an int or a tensor of integers, got torch.float32",
        ),
        (
            lambda: patterns.bigbird(99, random_blocks=torch.zeros(1, 3, 1).long()),
            ValueError,
            r"random_blocks must be \(H, 2, r\), got shape \(1, 3, 1\)",
        ),
        (
            lambda: patterns.bigbird(99, random_blocks=torch.full((1, 2, 1), 2)),
            ValueError,
            "random_blocks must be from 0 to 1, got 2 to 2",
        ),
        (lambda: patterns.from_scores(SCORES > 0, k=1), TypeError, "scores must be a floating-point tensor"),
        (
            lambda: patterns.from_scores(None, k=1),
            TypeError,
            "scores must be a floating-point .*, got NoneType",
        ),
        (lambda: patterns.from_scores(SCORES[0], k=1), ValueError, r"scores must be \(Qb, Kb\)"),
        (lambda: patterns.from_scores(SCORES * torch.nan, k=1), ValueError, "scores must not be NaN"),
        (lambda: patterns.from_scores(SCORES), ValueError, "either k or threshold must be given, got k=None"),
        (lambda: patterns.from_scores(SCORES, k=1, threshold=1.0), ValueError, "either k or threshold"),
        (lambda: patterns.from_scores(SCORES, k=-1), ValueError, "k must be at least 0, got -1"),
        (
            lambda: patterns.from_scores(SCORES, threshold="1"),
            TypeError,
            "threshold must be a float, got str",
        ),
        (
            lambda: patterns.from_scores(SCORES, threshold=True),
            TypeError,
            "threshold must be a float, got bool",
        ),
        (lambda: patterns.from_scores(SCORES, threshold=math.nan), ValueError, "threshold must not be NaN"),
        (lambda: patterns.from_scores(SCORES, k=1, kv_len=5), ValueError, "kv_len must be cut into 3 blocks"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


QUERY, KEY = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: patterns.topk_blocks(QUERY.long(), KEY, 1),
            TypeError,
            "query must be a floating-point tensor",
        ),
        (
            lambda: patterns.topk_blocks(QUERY, [1], 1),
            TypeError,
            "key must be a floating-point tensor, got list",
        ),
        (lambda: patterns.topk_blocks(QUERY, KEY[0], 1), ValueError, r"key must be \(B, H, L, D\)"),
        (
            lambda: patterns.topk_blocks(QUERY[:, :3], KEY, 1),
            ValueError,
            "query a multiple of the heads of key",
        ),
        (lambda: patterns.topk_blocks(QUERY[:1], KEY, 1), ValueError, "must have the same batch size"),
        (lambda: patterns.topk_blocks(QUERY[..., :4], KEY, 1), ValueError, "and head_dim"),
        (lambda: patterns.topk_blocks(QUERY, KEY, 0), ValueError, "k must be at least 1, got 0"),
        (
            lambda: patterns.topk_blocks(QUERY, KEY.double(), 1),
            TypeError,
            "key must have the dtype of query, torch.float32, got torch.float64",
        ),
        (lambda: patterns.topk_blocks(QUERY, KEY * math.inf, 1), ValueError, "query and key must be finite"),
        (lambda: patterns.topk_blocks(QUERY, KEY, 1, causal=1), TypeError, "causal must be a bool, got int"),
        (
            lambda: patterns.topk_blocks(QUERY[:, :, :9], KEY, 1, causal=True),
            ValueError,
            "query and key must be as long when causal, got 9 and 64",
        ),
        (
            lambda: patterns.lsh(QUERY.long(), 4),
            TypeError,
            "qk must be a floating-point tensor, got torch.int64",
        ),
        (
            lambda: patterns.lsh(QUERY[0], 4),
            ValueError,
            r"qk must be \(B, H, L, D\).*, got shape \(4, 64, 8\)",
        ),
        (lambda: patterns.lsh(QUERY[:0], 4), ValueError, r"neither B nor H 0, got shape \(0, 4, 64, 8\)"),
        (lambda: patterns.lsh(QUERY[:, :0], 4), ValueError, r"neither B nor H 0, got shape \(2, 0, 64, 8\)"),
        (lambda: patterns.lsh(QUERY, 4, seed="a"), TypeError, "seed must be an int, got str"),
        (lambda: patterns.lsh(QUERY, 4, seed=2**70), ValueError, "seed must fit in 64 bits"),
        (lambda: patterns.lsh(QUERY, 4, causal="no"), TypeError, "causal must be a bool, got str"),
        (
            lambda: patterns.lsh(torch.zeros(1, 1, 4097, 1), 2),
            ValueError,
            "chunk must be at most 4096 tokens, got 4112 for 4097 tokens in 2 buckets: give more buckets",
        ),
        (
            lambda: patterns.lsh(QUERY, 4).attend(None, None, None),
            TypeError,
            "query must be a torch.Tensor, got NoneType",
        ),
        (lambda: patterns.lsh(QUERY, 3), ValueError, "n_buckets must be even, got 3"),
        (lambda: patterns.lsh(QUERY, 0), ValueError, "n_buckets must be at least 2, got 0"),
        (lambda: patterns.lsh(QUERY, 4, 0), ValueError, "n_hashes must be at least 1, got 0"),
        (lambda: patterns.lsh(QUERY, 4, chunk=24), ValueError, "chunk must be a multiple of 16, got 24"),
        (
            lambda: patterns.lsh(QUERY, 4).attend(QUERY, KEY, QUERY),
            ValueError,
            r"key must be \(2, 4, 64, D\), as what was hashed, got shape \(2, 2, 64, 8\)",
        ),
    ],
)
def test_errors_of_patterns_by_content(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: deepspeed.fixed(100, 1), ValueError, "seq_len must be a multiple of block, 16, got 100"),
        (lambda: deepspeed.fixed(96, 0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: deepspeed.fixed(96, 1, block=(16, 16)), TypeError, "block must be an int, got tuple"),
        (
            lambda: deepspeed.fixed(96, 1, horizontal_global_attention=1),
            TypeError,
            "horizontal_global_attention must be a bool, got int",
        ),
        *(
            (
                lambda make=make: make(96, 1, different_layout_per_head="no"),
                TypeError,
                "different_layout_per_head must be a bool, got str",
            )
            for make in (deepspeed.fixed, deepspeed.variable, deepspeed.bigbird, deepspeed.bslongformer)
        ),
        (lambda: deepspeed.variable(96, 1, seed=[]), TypeError, "seed must be an int, got list"),
        (lambda: deepspeed.bigbird(96, 1, seed=1.5), TypeError, "seed must be an int, got float"),
        (lambda: deepspeed.fixed(96, 1, block=24), ValueError, "block_size must be of multiples of 16"),
        (
            lambda: deepspeed.fixed(96, 1, attention="causal"),
            ValueError,
            "attention must be 'unidirectional' or",
        ),
        (
            lambda: deepspeed.fixed(96, 1, attention="unidirectional", horizontal_global_attention=True),
            ValueError,
            "horizontal_global_attention must be False when attention is 'unidirectional'",
        ),
        (
            lambda: deepspeed.fixed(96, 1, num_global_blocks=3),
            ValueError,
            "num_local_blocks must be a multiple of num_global_blocks, 3, got 4",
        ),
        (
            lambda: deepspeed.fixed(96, 1, num_different_global_patterns=2),
            ValueError,
            "num_different_global_patterns must be at most 1 for these blocks and heads, got 2",
        ),
        (
            lambda: deepspeed.fixed(96, 1, different_layout_per_head=True, num_different_global_patterns=5),
            ValueError,
            "num_different_global_patterns must be at most 4",
        ),
        (
            lambda: deepspeed.variable(96, 1, local_window_blocks=[]),
            ValueError,
            "local_window_blocks must be one",
        ),
        (lambda: deepspeed.variable(96, 1, global_block_indices=[-1]), ValueError, "must not be negative"),
        (
            lambda: deepspeed.variable(96, 1, global_block_indices=[1, 2], global_block_end_indices=[2]),
            ValueError,
            "global_block_end_indices must be one for each of global_block_indices and larger",
        ),
        (
            lambda: deepspeed.bslongformer(96, 1, global_block_indices=[1], global_block_end_indices=[1]),
            ValueError,
            r"and larger, got \[1\] for \[1\]",
        ),
        (
            lambda: deepspeed.bigbird(96, 1, num_random_blocks=7),
            ValueError,
            "num_random_blocks must be at most .*, 6",
        ),
        (
            lambda: deepspeed.bigbird(96, 1, num_random_blocks=2, attention="unidirectional"),
            ValueError,
            "num_random_blocks must be at most",
        ),
        (
            lambda: deepspeed.bigbird(96, 1, num_global_blocks=7),
            ValueError,
            "num_global_blocks must be at most",
        ),
        (
            lambda: deepspeed.local_sliding_window(32, 1),
            ValueError,
            "num_sliding_window_blocks must be at most the number of blocks, 2, got 3",
        ),
    ],
)
def test_errors_of_deepspeed(make, error, message):
    with pytest.raises(error, match=message):
        make()
