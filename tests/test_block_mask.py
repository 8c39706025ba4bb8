"""Block masks: how they are made, what they show, how they combine, and what they say of mistakes."""

from __future__ import annotations

import copy
import operator
import pickle
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import make_inputs
from test_api_masks import MASKS as EXPRESSIONS
from test_numerics_hypothesis import settings
from torch import Tensor
from torch.nn.attention import flex_attention

import attn_ext
from attn_ext import BlockMask, Causal, Dense, KeyLengths, Mask, Prefix, Segments, SlidingWindow
from attn_ext._blocks import Blocks, intersection
from attn_ext.masks import Conjunction, Disjunction

CPU = torch.device("cpu")
BLOCK_SIZES = (16, 32, (32, 16), (16, 48))
LENGTHS = ((64, 64), (50, 50), (33, 70), (70, 17), (1, 40), (40, 1), (0, 20), (20, 0), (15, 15))


def shown(mask: BlockMask) -> Tensor:
    """(batch, heads, Lq, Lk), by the definition of the lists; the rule aside."""
    offsets, indices, tiles, bits = mask.blocks
    query_block, kv_block = mask.block_size
    bits = ((bits.unsqueeze(-1) >> torch.arange(8)) & 1).flatten(2).mT.bool()
    seen = torch.zeros(mask.batch, mask.heads, mask.query_len, mask.kv_len, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, offsets[..., 1:].shape)).tolist():
        for s in range(offsets[b, h, r], offsets[b, h, r + 1]):
            q, k = r * query_block, int(indices[s]) * kv_block
            block = seen[b, h, q : q + query_block, k : k + kv_block]
            block[:] = True if tiles[s] == -1 else bits[tiles[s], : block.size(0), : block.size(1)]
    return seen


def dense_of(mask: BlockMask) -> Tensor:
    return mask.to_dense(mask.batch, mask.heads, mask.query_len, mask.kv_len)


def by_blocks(seen: Tensor, block_size: tuple[int, int]) -> Tensor:
    """(B, H, Lq, Lk) -> (B, H, Qb, Kb, pairs of a block)."""
    query_block, kv_block = block_size
    padding = (0, -seen.size(3) % kv_block, 0, -seen.size(2) % query_block)
    seen = torch.nn.functional.pad(seen, padding)
    return seen.unflatten(3, (-1, kv_block)).unflatten(2, (-1, query_block)).transpose(3, 4).flatten(4)


def check(mask: BlockMask, visible: Tensor) -> None:
    """That a mask without a rule shows what is visible, in the one way there is to do so."""
    assert mask.rule is None
    assert torch.equal(shown(mask), visible)
    assert torch.equal(mask.to_dense(mask.batch, mask.heads, mask.query_len, mask.kv_len), visible)
    count = by_blocks(visible, mask.block_size).sum(-1)
    area = by_blocks(torch.ones_like(visible), mask.block_size).sum(-1)
    assert torch.equal(mask.block_map, count > 0), "an empty block is listed"
    tiles, bits = mask.blocks.tiles, mask.blocks.bits
    assert torch.equal(tiles == -1, (count == area)[count > 0]), "a full block has bits"
    assert torch.equal(torch.unique(tiles[tiles >= 0]), torch.arange(bits.size(0)).int())
    assert torch.unique(bits, dim=0).size(0) == bits.size(0), "bits are kept twice"


def random_visible(batch: int, heads: int, query_len: int, kv_len: int) -> Tensor:
    """Empty, full and mixed blocks."""
    coarse = torch.rand(batch, heads, query_len // 16 + 1, kv_len // 16 + 1)
    coarse = coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :query_len, :kv_len]
    return (coarse < 0.3) | ((coarse < 0.6) & (torch.rand(batch, heads, query_len, kv_len) < 0.5))


def from_tensor(visible: Tensor, block_size: int | tuple[int, int] = 16) -> BlockMask:
    batch, heads, query_len, kv_len = visible.shape
    return BlockMask.from_predicate(
        lambda b, h, q, k: visible[b, h, q, k],
        query_len,
        kv_len,
        batch=batch,
        heads=heads,
        block_size=block_size,
    )


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("query_len", "kv_len"), LENGTHS)
def test_from_predicate(query_len, kv_len, block_size):
    for visible in (
        random_visible(2, 3, query_len, kv_len),
        torch.zeros(1, 1, query_len, kv_len, dtype=torch.bool),
        torch.ones(1, 2, query_len, kv_len, dtype=torch.bool),
    ):
        check(from_tensor(visible, block_size), visible)


def test_any_nonzero_byte_is_true():
    visible = random_visible(1, 1, 40, 40)
    bytes_ = torch.where(visible, torch.randint(1, 256, visible.shape), 0).to(torch.uint8).view(torch.bool)
    check(from_tensor(bytes_), visible)
    check(BlockMask.from_mask(Dense(bytes_), 40, 40, block_size=16), visible)


def test_tiles_with_the_same_hash_are_told_apart(monkeypatch):
    """With factors that are all 1, words may change places."""
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: torch.zeros(size, dtype=torch.int64))
    visible = torch.zeros(1, 1, 16, 64, dtype=torch.bool)
    visible[..., :4, 0] = visible[..., :4, 16 + 4] = visible[..., :4, 32] = visible[..., :4, 48 + 8] = True
    mask = from_tensor(visible)
    assert mask.blocks.bits.size(0) == 3
    check(mask, visible)


@pytest.mark.parametrize("block_size", [16, 64], ids=["some blocks", "a part of a block"])
def test_a_predicate_is_asked_in_slices(block_size, monkeypatch):
    """The same mask, whatever is looked at at once."""
    visible = random_visible(2, 2, 100, 90)
    expected = from_tensor(visible, block_size)
    flex = expected.to_flex()
    monkeypatch.setattr("attn_ext._block_cover._PAIRS_AT_ONCE", 3000)
    asked = []

    def predicate(b, h, q, k):
        asked.append(torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape).numel())
        return visible[b, h, q, k]

    mask = BlockMask.from_predicate(predicate, 100, 90, batch=2, heads=2, block_size=block_size)
    assert mask == expected
    assert max(asked) <= 3000
    assert BlockMask.from_flex(flex) == expected


LARGE_BLOCKS_SCRIPT = """
import resource, torch
from attn_ext import *

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = BlockMask.from_mask(Causal(), 8192, 8192, block_size=8192).without_rule()
assert mask.blocks.bits.nbytes == 8 * 2**20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_blocks_need_memory_of_their_bits():
    """In a process of its own: not that of all 67 million pairs of a block at once."""
    command = [sys.executable, "-c", LARGE_BLOCKS_SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 256 * 1024, f"{int(result.stdout) / 1024:.0f} MiB"


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (1, 3), (2, 1), (2, 3)], ids=str)
def test_from_map(leading, block_size):
    block_map = torch.rand(*leading, 4, 5) < 0.5
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    full = block_map.repeat_interleave(sizes[0], -2).repeat_interleave(sizes[1], -1)
    full = full[(None,) * (4 - full.dim())]
    mask = BlockMask.from_map(block_map, block_size=block_size)
    check(mask, full)
    assert (mask.query_len, mask.kv_len, mask.block_size) == (4 * sizes[0], 5 * sizes[1], sizes)
    mask = BlockMask.from_map(
        block_map, query_len=full.size(2) - 15, kv_len=full.size(3) - 1, block_size=sizes
    )
    check(mask, full[:, :, :-15, :-1])
    ruled = BlockMask.from_map(block_map, block_size=block_size, rule=Causal())
    assert torch.equal(dense_of(ruled), full & torch.ones_like(full).tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 48)], ids=str)
def test_from_bsr(sizes, dtype):
    visible = random_visible(1, 1, 2 * sizes[0], 3 * sizes[1])
    tensor = torch.where(visible, torch.randint(1, 9, visible.shape), 0).to(dtype)[0, 0]
    check(BlockMask.from_sparse(tensor.to_sparse_bsr(sizes)), visible)
    shorter = BlockMask.from_sparse(tensor.to_sparse_bsr(sizes), query_len=2 * sizes[0] - 3)
    check(shorter, visible[:, :, :-3])


def test_from_batched_bsr():
    values = torch.rand(6, 3, 32, 16) < 0.5
    columns = torch.stack([torch.randperm(4)[:3] for _ in range(6)])
    crow = torch.tensor([0, 2, 3]).expand(6, 3).contiguous()
    columns[:, :2] = columns[:, :2].sort(1).values
    visible = torch.zeros(6, 64, 64, dtype=torch.bool)
    for head, entry in torch.cartesian_prod(torch.arange(6), torch.arange(3)).tolist():
        row, column = (0, 0, 1)[entry], int(columns[head, entry])
        visible[head, 32 * row : 32 * row + 32, 16 * column : 16 * column + 16] = values[head, entry]
    for batch_shape, expected in (((6,), visible[None]), ((2, 3), visible.view(2, 3, 64, 64))):
        parts = (part.view(*batch_shape, *part.shape[1:]) for part in (crow, columns, values))
        tensor = torch.sparse_bsr_tensor(*parts, size=(*batch_shape, 64, 64))
        check(BlockMask.from_sparse(tensor), expected)


def test_from_csr():
    block_map = torch.rand(5, 4) < 0.5
    mask = BlockMask.from_sparse(block_map.float().to_sparse_csr(), block_size=(16, 32), kv_len=100)
    assert mask == BlockMask.from_map(block_map, block_size=(16, 32), kv_len=100)
    zeros = torch.sparse_csr_tensor([0, 2, 3], [0, 1, 1], [1.0, 0.0, 2.0], size=(2, 2))
    mask = BlockMask.from_sparse(zeros, block_size=16)
    assert mask.block_map.squeeze().tolist() == [[True, False], [False, True]]
    stacked = torch.stack([torch.eye(3), torch.ones(3, 3).triu(1)[:, [1, 2, 0]]]).to_sparse_csr()
    mask = BlockMask.from_sparse(stacked, rule=Causal())
    assert mask == BlockMask.from_map(stacked.to_dense() != 0, rule=Causal())


QUERY_LEN, KV_LEN = 50, 70
PACKED = torch.arange(KV_LEN) // 9
MASKS = {
    "causal": Causal(),
    "bottom-right": Causal("bottom_right"),
    "window": SlidingWindow(20, 3),
    "far window": SlidingWindow(5, 0, "bottom_right") & SlidingWindow(None, 40),
    "no window": SlidingWindow(),
    "key_lengths": KeyLengths([70, 0, 33]),
    "prefix": Prefix(17),
    "no prefix": Prefix(0),
    "causal prefix": Causal() | Prefix(33),
    "streaming": SlidingWindow(16, 0) | Prefix(3),
    "three": SlidingWindow(0, 0) | Prefix(1) | KeyLengths([10, 64, 65]),
    "segments": Segments(PACKED[:QUERY_LEN], PACKED),
    "packed": Segments(PACKED[:QUERY_LEN], PACKED) & Causal(),
    "missing segments": Segments(PACKED[:QUERY_LEN] * 2, PACKED),
    "scattered": Segments(torch.arange(QUERY_LEN) % 7, torch.arange(KV_LEN) // 3 % 5),
    "two segments": Segments(PACKED[:QUERY_LEN], PACKED) & Segments(PACKED[:QUERY_LEN] // 2, PACKED // 2),
    "dense": Dense(torch.arange(KV_LEN) % 3 == 0),
    "dense per head": Dense(torch.arange(2 * KV_LEN).view(2, 1, KV_LEN) % 5 == 0) & Causal(),
    "dense or": Dense(torch.arange(QUERY_LEN * KV_LEN).view(QUERY_LEN, KV_LEN) % 31 == 0) | Causal(),
}


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_from_mask(name, block_size):
    mask = MASKS[name]
    blocks = BlockMask.from_mask(mask, QUERY_LEN, KV_LEN, block_size=block_size)
    visible = mask.to_dense(blocks.batch, blocks.heads, QUERY_LEN, KV_LEN)
    assert torch.equal(dense_of(blocks), visible)
    assert torch.equal(blocks.block_map, by_blocks(visible, blocks.block_size).any(-1))
    assert (blocks.rule is None) == ("dense" in name)
    if blocks.rule is not None:
        assert blocks.rule == mask
        assert blocks.blocks.tiles.eq(-1).all()
    check(blocks.without_rule(), visible)


@pytest.mark.parametrize("combine", [operator.and_, operator.or_])
@pytest.mark.parametrize("second", MASKS)
@pytest.mark.parametrize("first", MASKS)
def test_from_combined_masks(first, second, combine):
    mask = combine(MASKS[first], MASKS[second])
    try:
        mask.lower(QUERY_LEN, KV_LEN, CPU)
    except (NotImplementedError, ValueError):
        return  # there is no such mask
    blocks = BlockMask.from_mask(mask, QUERY_LEN, KV_LEN, block_size=16)
    visible = mask.to_dense(blocks.batch, blocks.heads, QUERY_LEN, KV_LEN)
    assert torch.equal(dense_of(blocks), visible)
    check(blocks.without_rule(), visible)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("query_len", "kv_len"), LENGTHS)
def test_from_mask_of_any_lengths(query_len, kv_len, block_size):
    for mask in (Causal(), Causal("bottom_right"), SlidingWindow(9, 20) | Prefix(18), Prefix(3)):
        blocks = BlockMask.from_mask(mask, query_len, kv_len, block_size=block_size)
        check(blocks.without_rule(), mask.to_dense(1, 1, query_len, kv_len))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        SlidingWindow(512, 512),
        SlidingWindow(1023, 0) | Prefix(4),
        Causal() | Prefix(5000),
        KeyLengths([131072, 1000]) & SlidingWindow(99, 99),
        Segments(torch.arange(131072) // 1000) & Causal(),
    ],
    ids=str,
)
def test_from_mask_costs_its_blocks(mask):
    """A long sequence takes moments; its pairs would take minutes."""
    begin = time.process_time()
    blocks = BlockMask.from_mask(mask, 131072, 131072)
    assert time.process_time() - begin < 1
    assert sum(tensor.nbytes for tensor in blocks.blocks) < 8 * blocks.num_blocks + 2**16


PEAK_SCRIPT = """
import resource, torch, attn_ext
from attn_ext import *

def step(length):
    BlockMask.from_mask(SlidingWindow(512, 0) | Prefix(4), length, length)
    packed = Segments(torch.arange(length) // 1000) & Causal()
    BlockMask.from_mask(packed, length, length) | SlidingWindow(9, 9)

torch.set_num_threads(1)
step(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(2**17)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_from_mask_needs_memory_of_lengths_and_blocks():
    """In a process of its own: scratch memory of the slices and of L, not the 17 GB of L x L bits."""
    result = subprocess.run([sys.executable, "-c", PEAK_SCRIPT], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 160 * 1024, f"{int(result.stdout) / 1024:.0f} MiB"


@pytest.mark.parametrize("sizes", [((2, 3), (2, 3)), ((1, 3), (2, 1)), ((1, 1), (2, 3)), ((2, 1), (2, 3))])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_unions_and_intersections(block_size, sizes):
    a, b = (random_visible(*size, 70, 50) for size in sizes)
    first, second = from_tensor(a, block_size), from_tensor(b, block_size)
    check(first | second, a | b)
    check(first & second, a & b)
    check(first & first, a)
    check(first | first, a)
    nothing = from_tensor(torch.zeros(1, 1, 70, 50, dtype=torch.bool), block_size)
    check(first | nothing, a)
    assert (first & nothing).num_blocks == 0
    check(first | from_tensor(~a, block_size), torch.ones_like(a))


@pytest.mark.parametrize("name", MASKS)
def test_combinations_with_other_masks(name):
    """From either side; what comes out is a block mask, with a rule or with bits."""
    mask = MASKS[name]
    visible = random_visible(1, 2, QUERY_LEN, KV_LEN)
    blocks = from_tensor(visible, (16, 32))
    other = mask.to_dense(3, 2, QUERY_LEN, KV_LEN)
    for both in (blocks & mask, mask & blocks):
        assert isinstance(both, BlockMask)
        assert both.rule == mask
        assert torch.equal(both.to_dense(3, 2, QUERY_LEN, KV_LEN), visible & other)
        plain = both.without_rule()
        check(plain, (visible & other)[: plain.batch])
    for either in (blocks | mask, mask | blocks):
        check(either, (visible | other)[: either.batch])
    ruled = blocks & Causal("bottom_right")
    hidden = visible & Causal("bottom_right").to_dense(3, 2, QUERY_LEN, KV_LEN)
    either = ruled | mask
    check(either, (hidden | other)[: either.batch])
    if name not in ("three", "dense or"):
        assert torch.equal((ruled & mask).to_dense(3, 2, QUERY_LEN, KV_LEN), hidden & other)


def test_rules_meet():
    visible = random_visible(1, 1, 40, 40)
    blocks = from_tensor(visible)
    both = (blocks & Causal()) & (blocks & Prefix(30))
    assert both.rule == Causal() & Prefix(30)
    assert (blocks & (blocks & Causal())).rule == ((blocks & Causal()) & blocks).rule == Causal()
    assert both.parts == (both, Causal(), Prefix(30))
    added = blocks & Dense(torch.randn(40, 40))
    assert added.to_dense(1, 1, 40, 40).dtype == torch.float32
    assert torch.equal(added.to_dense(1, 1, 40, 40) != -torch.inf, visible)


def leaves():
    masks = st.sampled_from(
        [MASKS[name] for name in ("causal", "window", "prefix", "packed", "dense per head")]
    )
    blocks = st.tuples(st.sampled_from([(1, 1), (1, 2), (3, 1)]), st.integers(0, 99))
    return st.one_of(masks, blocks)


def build(tree, dense: bool):
    if isinstance(tree, Mask):
        return tree.to_dense(3, 2, QUERY_LEN, KV_LEN) if dense else tree
    if len(tree) == 3:
        combine, first, second = tree
        return combine(build(first, dense), build(second, dense))
    torch.manual_seed(tree[1])
    visible = random_visible(*tree[0], QUERY_LEN, KV_LEN)
    return visible.expand(3, 2, -1, -1) if dense else from_tensor(visible, (16, 32))


OPERATORS = st.sampled_from([operator.and_, operator.or_])


@given(
    tree=st.recursive(leaves(), lambda inner: st.tuples(OPERATORS, inner, inner), max_leaves=5),
    last=st.integers(0, 99),
)
@settings(max_examples=60)
def test_expressions(tree, last):
    """Whatever is combined, the pairs are those of the same operators on boolean tensors."""
    blocks = from_tensor(random_visible(1, 1, QUERY_LEN, KV_LEN), (16, 32))
    visible = shown(blocks).expand(3, 2, -1, -1)
    try:
        other = build(tree, dense=False)
        either, both = blocks | other, blocks & other
        both.lower(QUERY_LEN, KV_LEN, CPU)
    except (NotImplementedError, ValueError):
        return  # plain masks that cannot be combined among themselves
    dense = build(tree, dense=True)
    assert torch.equal(either.to_dense(3, 2, QUERY_LEN, KV_LEN), visible | dense)
    assert torch.equal(both.to_dense(3, 2, QUERY_LEN, KV_LEN), visible & dense)
    assert torch.equal(both.without_rule().to_dense(3, 2, QUERY_LEN, KV_LEN), visible & dense)


def test_lowered_block_masks_combine():
    """The parts of a combination made by hand are intersected too."""
    a, b = random_visible(1, 2, 40, 50), random_visible(2, 1, 40, 50)
    both = Conjunction((from_tensor(a), from_tensor(b), Causal()))
    assert torch.equal(both.to_dense(2, 2, 40, 50), a & b & torch.ones(40, 50).tril().bool())
    with pytest.raises(TypeError, match=r"a BlockMask within \| must be combined by its own operator"):
        Disjunction((from_tensor(a), Causal())).lower(40, 50, CPU)
    with pytest.raises(
        ValueError, match=r"as many blocks of queries, of the same size.*3 of \(16, 16\) and 2 of"
    ):
        intersection(from_tensor(a).blocks, from_tensor(a, 32).blocks)


@pytest.mark.parametrize("begin", [0, 1, 15, 16, 47])
@pytest.mark.parametrize("rows", [1, 2, 20, 100])
def test_rows_of_a_lowered_mask(begin, rows):
    visible = random_visible(2, 2, 100, 90)
    lowered = (from_tensor(visible, (32, 16)) & Causal()).lower(100, 90, CPU)
    end = min(begin + rows, 100)
    assert torch.equal(lowered.visible(begin, end, 90), visible.tril()[:, :, begin:end])


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("query_len", "kv_len"), LENGTHS)
def test_transposed(query_len, kv_len, block_size):
    """Lists by block of keys: those of the transposed mask, and each entry stands for the same block."""
    mask = from_tensor(random_visible(2, 3, query_len, kv_len), block_size)
    offsets, indices, entries = mask.transposed
    block_map = mask.block_map
    assert offsets.shape == (2, 3, block_map.size(3) + 1)
    expected = block_map.mT.nonzero()
    assert torch.equal(indices, expected[:, 3].int())
    assert torch.equal(offsets.diff(), block_map.sum(2))
    assert (int(offsets[0, 0, 0]), int(offsets[-1, -1, -1])) == (0, mask.num_blocks)
    assert torch.equal(mask.blocks.indices[entries], expected[:, 2].int())
    assert torch.equal(torch.sort(entries).values, torch.arange(mask.num_blocks))


def dense_of_flex(mask: flex_attention.BlockMask, batch: int, heads: int) -> Tensor:
    """By its mask_mod and, apart from that, by its lists."""
    query_len, kv_len = mask.seq_lengths
    mod = flex_attention.create_mask(mask.mask_mod, batch, heads, query_len, kv_len, device="cpu")
    listed = mask.to_dense().bool()
    for dim, size in zip((2, 3), mask.BLOCK_SIZE, strict=True):
        listed = listed.repeat_interleave(size, dim)
    assert not (mod & ~listed[:, :, :query_len, :kv_len]).any()
    return mod


@pytest.mark.parametrize("block_size", [16, (32, 16)], ids=str)
def test_to_flex(block_size):
    visible = random_visible(1, 2, QUERY_LEN, KV_LEN)
    mask = from_tensor(visible, block_size)
    for rule in (None, Causal(), KeyLengths([70, 0, 33]), MASKS["scattered"], MASKS["dense per head"]):
        ruled = mask if rule is None else mask & rule
        flex = ruled.to_flex()
        expected = ruled.to_dense(3, 2, QUERY_LEN, KV_LEN)
        assert torch.equal(dense_of_flex(flex, 3, 2), expected)
        batch = 3 if isinstance(rule, KeyLengths) else 1
        assert torch.equal(flex.to_dense().bool(), mask.block_map.expand(batch, -1, -1, -1))
        full = flex.full_kv_num_blocks.sum()
        assert full == (mask.blocks.tiles.eq(-1).sum() if rule is None else 0)


def test_to_flex_has_the_sizes_of_the_rule():
    """Its lists, as functions that use them take batch and heads from there."""
    mask = BlockMask.from_map(torch.ones(4, 5).bool(), query_len=QUERY_LEN, kv_len=KV_LEN, block_size=16)
    for rule, sizes in ((KeyLengths([70, 0, 33]), (3, 1)), (MASKS["dense per head"], (1, 2))):
        ruled = mask & rule
        flex = ruled.to_flex()
        assert flex.shape[:2] == flex.kv_indices.shape[:2] == sizes
        assert BlockMask.from_flex(flex) == ruled.without_rule()


def test_flex_attention_gives_the_same():
    visible = random_visible(2, 2, 64, 96)
    visible[0, 0, 5] = True  # so that no query is without keys, which flex_attention leaves undefined
    visible[..., 0] = True
    mask = from_tensor(visible) & SlidingWindow(None, 64)
    query, key, value = make_inputs(2, 2, 64, 96)
    out = flex_attention.flex_attention(query, key, value, block_mask=mask.to_flex())
    expected = attn_ext.reference.attention(query, key, value, mask=mask, dtype=torch.float32)
    torch.testing.assert_close(out, expected)


FLEX_MASK_MODS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q - k).abs() <= 5 + 20 * h,
    "table": lambda b, h, q, k: torch.tensor([[3, 40], [70, 0]])[b][h] > k,
    "all": lambda b, h, q, k: q.new_ones((), dtype=torch.bool),
    "none": lambda b, h, q, k: q < 0,
}


@pytest.mark.parametrize("sizes", [(16, 16), (32, 16)])
@pytest.mark.parametrize("name", FLEX_MASK_MODS)
def test_from_flex(name, sizes):
    mod = FLEX_MASK_MODS[name]
    flex = flex_attention.create_block_mask(mod, 2, 2, QUERY_LEN, KV_LEN, device="cpu", BLOCK_SIZE=sizes)
    visible = flex_attention.create_mask(mod, 2, 2, QUERY_LEN, KV_LEN, device="cpu")
    mask = BlockMask.from_flex(flex)
    check(mask, visible.expand(2, 2, -1, -1))
    assert mask.block_size == sizes
    assert BlockMask.from_flex(mask.to_flex()) == mask


def test_from_flex_without_full_blocks():
    flex = flex_attention.BlockMask.from_kv_blocks(
        torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [1, 0]]]]), BLOCK_SIZE=16
    )
    block_map = torch.tensor([[False, True], [True, True]])
    assert BlockMask.from_flex(flex) == BlockMask.from_map(block_map, block_size=16)


def test_properties():
    mask = BlockMask.from_map(torch.eye(4).bool() | torch.tensor([1, 0, 0, 0]).bool(), query_len=250)
    assert (mask.batch, mask.heads, mask.block_size, mask.num_blocks) == (1, 1, (64, 64), 7)
    assert mask.density == 7 / 16
    assert mask.device == CPU
    assert mask.to("cpu") is mask
    assert mask.to(CPU) == mask
    assert mask.parts == (mask,)
    on_meta = (mask & Causal()).to("meta")
    assert (on_meta.device.type, on_meta.num_blocks, on_meta.rule) == ("meta", 7, Causal())
    assert BlockMask.from_map(torch.ones(2, 3, 0, 4).bool()).density == 0


def test_a_mask_is_for_its_lengths():
    mask = BlockMask.from_mask(Causal(), 30, 40, block_size=16)
    with pytest.raises(ValueError, match="for 30 queries and 40 keys cannot mask 40 queries and 40 keys"):
        mask.to_dense(1, 1, 40, 40)


def test_copies_are_equal():
    mask = from_tensor(random_visible(2, 2, 40, 40)) & KeyLengths([3, 40])
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask
        assert hash(other) == hash(mask)
    assert mask != mask.without_rule()
    assert mask != mask & Causal()
    assert mask != from_tensor(random_visible(2, 2, 40, 40)) & KeyLengths([3, 40])
    assert BlockMask.from_map(torch.ones(2, 2).bool()) != BlockMask.from_map(
        torch.ones(2, 2).bool(), query_len=99
    )
    with pytest.raises(AttributeError):
        mask.rule = None


def test_repr():
    block_map = torch.eye(4).bool() | torch.tensor([1, 0, 0, 0]).bool()
    assert repr(BlockMask.from_map(block_map, rule=Causal())).splitlines() == [
        "BlockMask(query_len=256, kv_len=256, block_size=(64, 64), batch=1, heads=1, density=0.438, "
        "rule=Causal(align='top_left'))",
        "█   ",
        "██  ",
        "█ █ ",
        "█  █",
    ]
    thin = BlockMask.from_mask(SlidingWindow(0, 0), 40, 40, block_size=16).without_rule()
    assert repr(thin).splitlines()[1:] == ["░  ", " ░ ", "  ░"]
    long = repr(BlockMask.from_mask(Causal(), 10**5, 10**5)).splitlines()
    assert len(long) == 17
    assert {len(line) for line in long[1:]} == {32}
    assert repr(BlockMask.from_map(torch.ones(0, 4).bool())).startswith("BlockMask(query_len=0")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 5}, ValueError, "batch must be from 0 to 1, got 5"),
        ({"batch": -1}, ValueError, "batch must be at least 0, got -1"),
        ({"head": 3}, ValueError, "head must be from 0 to 2, got 3"),
        ({"head": 1.0}, TypeError, "head must be an int, got float"),
    ],
)
def test_plots_that_there_are_not(arguments, error, message):
    with pytest.raises(error, match=message):
        from_tensor(random_visible(2, 3, 40, 60), 16).plot(**arguments)


def test_plot(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    mask = from_tensor(random_visible(2, 3, 40, 60), 16)
    axes = mask.plot(batch=1, head=2)
    image = torch.tensor(axes.images[0].get_array().tolist())
    area = by_blocks(torch.ones(1, 1, 40, 60).bool(), (16, 16)).sum(-1)[0, 0]
    torch.testing.assert_close(image, by_blocks(shown(mask), (16, 16)).sum(-1)[1, 2] / area)
    assert mask.plot(axes) is axes
    matplotlib.pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        mask.plot()


def test_reference_attention():
    visible = random_visible(2, 4, 40, 50)
    query, key, value = make_inputs(2, 4, 40, 50, group=2)
    mask = from_tensor(visible, (32, 16)) & Prefix(45)
    visible[..., 45:] = False
    torch.testing.assert_close(
        attn_ext.reference.attention(query, key, value, mask=mask),
        attn_ext.reference.attention(query, key, value, mask=visible),
        rtol=0,
        atol=0,
    )


GOOD = BlockMask.from_map(torch.ones(2, 3, 2, 3).bool(), block_size=16).blocks


def with_field(name: str, change) -> Blocks:
    return GOOD._replace(**{name: change(getattr(GOOD, name).clone())})


def set_at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (tuple(GOOD), TypeError, "blocks must be attn_ext.block_mask.Blocks, got tuple"),
        (
            with_field("offsets", lambda t: t.tolist()),
            TypeError,
            "blocks.offsets must be a torch.Tensor, got list",
        ),
        (
            with_field("offsets", lambda t: t.int()),
            TypeError,
            "blocks.offsets must be torch.int64, got torch.int32",
        ),
        (with_field("indices", lambda t: t.long()), TypeError, "blocks.indices must be torch.int32"),
        (with_field("tiles", lambda t: t.long()), TypeError, "blocks.tiles must be torch.int32"),
        (
            with_field("bits", lambda t: t.bool()),
            TypeError,
            "blocks.bits must be torch.uint8, got torch.bool",
        ),
        (with_field("tiles", lambda t: t.to("meta")), ValueError, "blocks.tiles must be on the device of"),
        (
            with_field("offsets", lambda t: t[..., 1:]),
            ValueError,
            r"blocks.offsets must be .*, 3\), one more than",
        ),
        (
            with_field("offsets", lambda t: t[0]),
            ValueError,
            r"blocks.offsets must be \(B or 1, .*, got shape \(3, 3\)",
        ),
        (
            with_field("indices", lambda t: t[1:]),
            ValueError,
            r"the same size, got shapes \(35,\) and \(36,\)",
        ),
        (with_field("bits", lambda t: t.view(0, 32, 2)), ValueError, "blocks.indices must be from 0 to 1"),
        (with_field("bits", lambda t: t[:, :8]), ValueError, r"multiples of 16, got \(16, 8\)"),
        (with_field("bits", lambda t: t[0:0, 0]), ValueError, "blocks.bits must be"),
        (
            with_field("offsets", set_at((0, 0, 0), 1)),
            ValueError,
            "blocks.offsets must rise from 0 to .*, 36",
        ),
        (with_field("offsets", set_at((0, 0, 1), 7)), ValueError, "blocks.offsets must rise"),
        (with_field("offsets", set_at((0, 1, 0), 5)), ValueError, "blocks.offsets must rise"),
        (with_field("offsets", set_at((1, 2, 2), 37)), ValueError, "blocks.offsets must rise"),
        (with_field("indices", set_at(2, 3)), ValueError, "blocks.indices must be from 0 to 2, got 0 to 3"),
        (with_field("indices", set_at(0, -1)), ValueError, "blocks.indices must be from 0 to 2, got -1 to 2"),
        (with_field("indices", set_at(1, 0)), ValueError, "blocks.indices must rise within each row"),
        (with_field("tiles", set_at(5, 0)), ValueError, "blocks.tiles must be from -1 to -1, got -1 to 0"),
        (with_field("tiles", set_at(5, -2)), ValueError, "blocks.tiles must be from -1 to -1, got -2 to -1"),
    ],
)
def test_bad_blocks(blocks, error, message):
    with pytest.raises(error, match=message):
        BlockMask(blocks, 32, 48)


OF_OTHER_LENGTHS = {
    "dense": (Dense(torch.ones(7, 7).bool()), r"mask Dense must .* broadcastable to \(1, 1, 50, 70\)"),
    "dense in a batch": (Dense(torch.ones(2, 3, 50, 7).bool()), r"broadcastable to \(2, 3, 50, 70\)"),
    "dense of keys": (Dense(torch.ones(50).bool()), r"got shape \(50,\)"),
    "queries of segments": (Segments(PACKED), r"mask Segments must have query_ids of shape .* or \(50,\)"),
    "keys of segments": (Segments(PACKED[:50]), r"mask Segments must have kv_ids of shape .* or \(70,\)"),
    "lengths": (KeyLengths([3, 71]), "mask KeyLengths must hold lengths from 0 to 70"),
    "a part": (Causal() & KeyLengths([71]), "mask KeyLengths must hold lengths from 0 to 70"),
}


@pytest.mark.parametrize("name", OF_OTHER_LENGTHS)
def test_masks_of_other_lengths(name):
    mask, message = OF_OTHER_LENGTHS[name]
    blocks = from_tensor(random_visible(1, 1, QUERY_LEN, KV_LEN))
    for use in (
        lambda: BlockMask.from_mask(mask, QUERY_LEN, KV_LEN),
        lambda: blocks | mask,
        lambda: (blocks & mask).without_rule(),
        lambda: (blocks & mask).to_flex(),
        lambda: (blocks & mask) | Causal(),
    ):
        with pytest.raises(ValueError, match=message):
            use()


ONES = torch.ones(2, 2).bool()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockMask.from_map([[True]]), TypeError, "block_map must be a torch.Tensor, got list"),
        (lambda: BlockMask.from_map(ONES.float()), TypeError, "block_map must be bool .*, got torch.float32"),
        (lambda: BlockMask.from_map(ONES[0]), ValueError, r"block_map must be \(Qb, Kb\).*got shape \(2,\)"),
        (
            lambda: BlockMask.from_map(ONES, query_len=64),
            ValueError,
            "query_len must be cut into 2 blocks of 64",
        ),
        (
            lambda: BlockMask.from_map(ONES, kv_len=129),
            ValueError,
            "kv_len must be cut into 2 blocks of 64, got 129",
        ),
        (lambda: BlockMask.from_map(ONES, kv_len=1.5), TypeError, "kv_len must be an int, got float"),
        (
            lambda: BlockMask.from_map(ONES, block_size=24),
            ValueError,
            "block_size must be of multiples of 16, got 24",
        ),
        (
            lambda: BlockMask.from_map(ONES, block_size=(16, 0)),
            ValueError,
            "block_size must be of multiples of 16",
        ),
        (
            lambda: BlockMask.from_map(ONES, block_size=65552),
            ValueError,
            "block_size must be at most 65536, got 65552",
        ),
        (
            lambda: BlockMask.from_map(ONES.expand(0, 1, 2, 2)),
            ValueError,
            r"block_map must have at least one batch entry and one head, got shape \(0, 1, 2, 2\)",
        ),
        (
            lambda: BlockMask.from_map(ONES, block_size="16"),
            TypeError,
            "block_size must be an int or a pair of int",
        ),
        (lambda: BlockMask.from_map(ONES, rule=ONES), TypeError, "rule must be an attn_ext mask, got Tensor"),
        (
            lambda: BlockMask.from_map(ONES, rule=BlockMask.from_map(ONES)),
            TypeError,
            "rule must not be a BlockMask or hold one",
        ),
        (
            lambda: BlockMask.from_sparse(ONES),
            TypeError,
            "torch.sparse_bsr or torch.sparse_csr, got torch.strided",
        ),
        (lambda: BlockMask.from_sparse(None), TypeError, "torch.sparse_csr, got NoneType"),
        (
            lambda: BlockMask.from_sparse(torch.ones(2, 2, 2, 2, 2).to_sparse_csr()),
            ValueError,
            "tensor must have 2 to 4 sparse dimensions, got shape",
        ),
        (
            lambda: BlockMask.from_sparse(torch.ones(16, 16).to_sparse_bsr((8, 16))),
            ValueError,
            r"block_size must be of multiples of 16, got \(8, 16\)",
        ),
        (
            lambda: BlockMask.from_sparse(torch.ones(16, 16).to_sparse_bsr((16, 16)), block_size=32),
            ValueError,
            r"block_size must be that of tensor, \(16, 16\), or None, got 32",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, q, k: q - k, 9, 9),
            TypeError,
            "visible must return a bool tensor, got torch.int64",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, q, k: True, 9, 9),
            TypeError,
            "visible must return a bool tensor, got bool",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, q, k: torch.ones(3, 3).bool(), 9, 9),
            ValueError,
            r"that broadcasts to the shape of its arguments, \(1, 64, 64\), got shape \(3, 3\)",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, q, k: (q == k)[None], 9, 9),
            ValueError,
            r"got shape \(1, 1, 64, 64\)",
        ),
        (
            lambda: BlockMask.from_predicate(None, 9, 9),
            TypeError,
            "visible must be a function, got NoneType",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, q, k: q == k, 9, 9, heads=0),
            ValueError,
            "heads must be at least 1, got 0",
        ),
        (lambda: BlockMask.from_mask(ONES, 9, 9), TypeError, "mask must be an attn_ext mask, got Tensor"),
        (lambda: BlockMask.from_mask(Causal(), -1, 9), ValueError, "query_len must be at least 0, got -1"),
        (lambda: BlockMask.from_mask(Causal(), 9, True), TypeError, "kv_len must be an int, got bool"),
        (
            lambda: BlockMask.from_mask(Dense(torch.zeros(9, 9)), 9, 9),
            TypeError,
            "mask must be boolean to become blocks, got a floating-point part in Dense",
        ),
        (
            lambda: BlockMask.from_mask(BlockMask.from_map(ONES), 128, 128),
            TypeError,
            "mask must not be a BlockMask or hold one",
        ),
        (
            lambda: BlockMask.from_flex(ONES),
            TypeError,
            "flex_block_mask must be a torch.nn.attention.*, got Tensor",
        ),
        (
            lambda: BlockMask.from_flex(
                flex_attention.BlockMask.from_kv_blocks(
                    torch.ones(1).int(), torch.zeros(1, 1).int(), BLOCK_SIZE=16
                )
            ),
            ValueError,
            "flex_block_mask must have kv_indices of shape",
        ),
        (
            lambda: (BlockMask.from_map(ONES) & Dense(torch.zeros(128, 128))).without_rule(),
            TypeError,
            "mask must be boolean to become blocks",
        ),
        (
            lambda: BlockMask.from_map(ONES) | BlockMask.from_map(ONES, query_len=100),
            ValueError,
            r"same lengths and block size, got 128 x 128 in \(64, 64\) and 100 x 128 in",
        ),
        (
            lambda: BlockMask.from_map(ONES) & BlockMask.from_map(ONES, block_size=32),
            ValueError,
            "block masks that are combined must have the same lengths and block size",
        ),
        (
            lambda: BlockMask.from_map(ONES.expand(2, 1, 2, 2)) & BlockMask.from_map(ONES.expand(3, 1, 2, 2)),
            ValueError,
            "masks that are combined must have as many batch entries, or 1, got 2 and 3",
        ),
        (
            lambda: BlockMask.from_map(ONES.expand(2, 3, 2, 2)) | BlockMask.from_map(ONES.expand(2, 2, 2)),
            ValueError,
            "masks that are combined must have as many heads, or 1, got 3 and 2",
        ),
        (
            lambda: (BlockMask.from_map(ONES.expand(2, 1, 2, 2)) & KeyLengths([1, 2, 3])).without_rule(),
            ValueError,
            "as many batch entries, or 1, got 2 and 3",
        ),
        (lambda: BlockMask.from_map(ONES) & 3, TypeError, "unsupported operand"),
        (lambda: 3 | BlockMask.from_map(ONES), TypeError, "unsupported operand"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_masks_from_few_tokens(name):
    """Less than a block."""
    mask, visible = EXPRESSIONS[name]
    if visible.is_floating_point():
        return
    blocks = BlockMask.from_mask(mask, 4, 6, block_size=16).without_rule()
    check(blocks, visible.expand(3, 2, 4, 6)[: blocks.batch, : blocks.heads])


def test_making_a_mask_does_not_load_the_compiler():
    script = (
        "import sys, attn_ext; attn_ext.patterns.fixed(9, 3, 1); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
