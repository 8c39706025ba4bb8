"""The kernels on block masks: the listed blocks, all of them, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from problems import BLOCK_SIZES, DTYPES, LENGTHS, assert_same_bits, make_block_mask, make_inputs, run

import attn_ext
from attn_ext import BlockMask, Causal, KeyLengths, Prefix, Segments, SlidingWindow, reference
from attn_ext.testing import check_attention

DENSITIES = (0.0, 0.05, 0.3, 0.8, 1.0)


def full_blocks(length: int, block_size: int, density: float, heads: int = 1) -> BlockMask:
    count = -(-length // block_size)
    return BlockMask.from_map(torch.rand(heads, count, count) < density, block_size=block_size)


@pytest.mark.usefixtures("isa")
@pytest.mark.sample(
    120,
    query_len=LENGTHS,
    kv_len=LENGTHS,
    head_dim=(3, 16, 33, 64, 80),
    dtype=DTYPES,
    query_block=BLOCK_SIZES,
    kv_block=BLOCK_SIZES,
    density=DENSITIES,
    partial=(0.0, 0.5, 1.0),
    group=(1, 2, 4),
    lists=((1, 1), (2, 1), (1, 4), (2, 4)),
)
def test_random_blocks(case: SimpleNamespace) -> None:
    inputs = make_inputs(2, 4, case.query_len, case.kv_len, case.head_dim, group=case.group, dtype=case.dtype)
    sizes = (*case.lists, case.query_len, case.kv_len)
    mask = make_block_mask(sizes, (case.query_block, case.kv_block), case.density, case.partial)
    check_attention(*inputs, mask=mask)


RULES = {
    "causal": Causal("bottom_right"),
    "window": SlidingWindow(40, 3),
    "prefix or causal": Causal() | Prefix(20),
    "lengths": KeyLengths([200, 0]),
    "documents": Segments(torch.arange(260) // 70, torch.arange(230) // 70),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("rule", RULES)
def test_rules_inside_the_blocks(rule: str, block_size: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 4, 260, 230, 32, group=2, dtype=dtype)
    mask = make_block_mask((1, 4, 260, 230), (block_size, block_size), 0.5) & RULES[rule]
    assert isinstance(mask, BlockMask)
    check_attention(*inputs, mask=mask)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one block", "one row", "one column", "diagonal", "last block"])
def test_few_blocks(kind: str, dtype: torch.dtype) -> None:
    block_map = torch.zeros(5, 7, dtype=torch.bool)
    if kind == "one block":
        block_map[2, 3] = True
    elif kind == "one row":
        block_map[3] = True
    elif kind == "one column":
        block_map[:, 5] = True
    elif kind == "diagonal":
        block_map = torch.eye(5, 7, dtype=torch.bool)
    else:
        block_map[4, 6] = True
    mask = BlockMask.from_map(block_map, query_len=140, kv_len=200, block_size=32)
    inputs = make_inputs(1, 2, 140, 200, 24, dtype=dtype)
    results = run(*inputs, mask=mask)
    unseen = ~block_map.any(1).repeat_interleave(32)[:140]
    unused = ~block_map.any(0).repeat_interleave(32)[:200]
    assert (results["out"][:, :, unseen] == 0).all()
    assert (results["lse"][:, :, unseen] == -torch.inf).all()
    assert (results["grad_query"][:, :, unseen] == 0).all()
    assert (results["grad_key"][:, :, unused] == 0).all()
    assert (results["grad_value"][:, :, unused] == 0).all()
    check_attention(*inputs, mask=mask)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_blocks_are_no_mask(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, 300, 300, 32, dtype=dtype)
    mask = BlockMask.from_map(torch.ones(10, 10, dtype=torch.bool), query_len=300, kv_len=300, block_size=32)
    expected, actual = run(*inputs), run(*inputs, mask=mask)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=name)
    check_attention(*inputs, mask=mask)


@pytest.mark.usefixtures("isa")
@pytest.mark.sample(
    24,
    sizes=((1, 1, 700, 900), (2, 4, 130, 2000), (1, 2, 1500, 1500), (3, 2, 1, 700)),
    group=(1, 2),
    dtype=DTYPES,
    block_size=((16, 16), (64, 64), (128, 32)),
    density=(0.1, 0.5),
    shares_batch=(False, True),
)
def test_bits_do_not_depend_on_threads_or_batch(case: SimpleNamespace) -> None:
    batch, heads, query_len, kv_len = case.sizes
    group = case.group if heads % case.group == 0 else 1
    inputs = make_inputs(batch, heads, query_len, kv_len, 32, group=group, dtype=case.dtype)
    lists = (1 if case.shares_batch else batch, heads, query_len, kv_len)
    mask = make_block_mask(lists, case.block_size, case.density)
    expected = run(*inputs, mask=mask)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(run(*inputs, mask=mask), expected)
    dense = mask.to_dense(batch, heads, query_len, kv_len)[-1:]
    alone = BlockMask.from_mask(attn_ext.Dense(dense), query_len, kv_len, block_size=case.block_size)
    last = run(*(tensor[-1:] for tensor in inputs), mask=alone)
    assert_same_bits(last, {name: tensor[-1:] for name, tensor in expected.items()})


def test_is_attention_with_the_mask() -> None:
    inputs = make_inputs(2, 4, 70, 90, 16, group=2)
    mask = make_block_mask((1, 4, 70, 90), (16, 32), 0.5)
    options = {
        "bias": torch.randn(4, 70, 90),
        "softcap": 5.0,
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
        "dropout_p": 0.25,
        "dropout_seed": 3,
        "scale": 0.3,
        "return_lse": True,
    }
    for actual, expected in zip(
        attn_ext.block_sparse_attention(*inputs, mask, **options),
        attn_ext.attention(*inputs, mask=mask, **options),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert torch.equal(attn_ext.block_sparse_attention(*inputs, mask), attn_ext.attention(*inputs, mask=mask))


def test_intersection_of_two_block_masks_within_a_combination() -> None:
    """From either side of `&`, and below another mask."""
    inputs = make_inputs(1, 2, 100, 100, 16)
    masks = [make_block_mask((1, 2, 100, 100), (32, 32), 0.6) for _ in range(2)]
    dense = [mask.to_dense(1, 2, 100, 100) for mask in masks]
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    expected = reference.attention(*inputs, mask=dense[0] & dense[1] & causal)
    for mask in (Causal() & masks[0] & masks[1], masks[0] & (Causal() & masks[1])):
        out = attn_ext.attention(*inputs, mask=mask)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


SMALL = (1, 2, 40, 36)


def small_problem() -> tuple[tuple[torch.Tensor, ...], BlockMask]:
    torch.manual_seed(0)
    inputs = make_inputs(*SMALL, 4, group=2, dtype=torch.float64)
    return inputs, make_block_mask(SMALL, (16, 16), 0.6)


def test_derivatives_of_every_order() -> None:
    inputs, mask = small_problem()
    leaves = tuple(tensor[:, :, ::4].clone().requires_grad_() for tensor in inputs)
    mask = BlockMask.from_mask(attn_ext.Dense(mask.to_dense(*SMALL)[:, :, ::4, ::4]), 10, 9, block_size=16)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = attn_ext.block_sparse_attention(*tensors, mask, return_lse=True)
        return out, torch.where(lse.isinf(), 0, lse)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_vmap_over_the_inputs() -> None:
    mask = make_block_mask((2, 2, 50, 60), (16, 16), 0.5)
    query, key, value = (torch.randn(3, 2, heads, length, 8) for heads, length in ((2, 50), (1, 60), (1, 60)))

    def call(q, k, v):
        return attn_ext.block_sparse_attention(q, k, v, mask)

    expected = torch.stack([call(*tensors) for tensors in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(query, key, value), expected)


def test_compiled() -> None:
    inputs, mask = small_problem()
    leaves = tuple(tensor.float().requires_grad_() for tensor in inputs)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return attn_ext.block_sparse_attention(*tensors, mask & Causal()).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(function(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


def test_compiled_with_symbolic_batch_and_heads() -> None:
    """Masks for every batch entry and head are compared with sizes that are symbols."""
    inputs = make_inputs(3, 4, 40, 36, 8)
    ids = torch.arange(36).expand(3, -1) // 10
    for mask in (
        make_block_mask((3, 4, 40, 36), (16, 16), 0.6),
        make_block_mask((3, 4, 40, 36), (16, 16), 0.6) & Segments(ids.repeat(1, 2)[:, :40], ids),
    ):

        def function(*tensors: torch.Tensor, mask: BlockMask = mask) -> torch.Tensor:
            return attn_ext.block_sparse_attention(*tensors, mask)

        for tensor in inputs:
            for dim in (0, 1):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
        torch._dynamo.reset()


def test_operator_obeys_its_schema() -> None:
    inputs, mask = small_problem()
    options = {f"block_{name}": tensor for name, tensor in mask.blocks._asdict().items()}
    arguments = attn_ext._ops.Options(**options, scale=0.5)
    torch.library.opcheck(torch.ops.attn_ext.attention_forward.default, (*inputs, *arguments))


def process_seconds(call: Callable[[], object]) -> float:
    call()
    begin = time.process_time()
    call()
    return time.process_time() - begin


def test_time_goes_with_the_blocks() -> None:
    """A tenth of the blocks takes far less than half of the time, forward and backward."""
    inputs = make_inputs(1, 2, 4096, 4096, 64)
    tenth, all_of_it = (full_blocks(4096, 128, density) for density in (0.1, 1.0))
    assert process_seconds(lambda: run(*inputs, mask=tenth)) < 0.4 * process_seconds(
        lambda: run(*inputs, mask=all_of_it)
    )


BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[BlockMask], object]]] = {
    "no mask": (TypeError, "block_mask must be an attn_ext.BlockMask, got NoneType", lambda mask: None),
    "a tensor": (TypeError, "got Tensor", lambda mask: torch.ones(40, 36, dtype=torch.bool)),
    "another mask": (TypeError, "got Causal; attention takes other masks", lambda mask: Causal()),
    "other lengths": (
        ValueError,
        "a BlockMask for 36 queries and 36 keys cannot mask 40 queries and 36 keys",
        lambda mask: BlockMask.from_map(torch.ones(1, 1, dtype=torch.bool), query_len=36, kv_len=36),
    ),
    "other heads": (
        ValueError,
        "lists for 1 or 1 batch entries and 1 or 2 heads, got 1 and 3",
        lambda mask: make_block_mask((1, 3, 40, 36), (16, 16), 0.5),
    ),
    "other batch": (
        ValueError,
        "got 2 and 1",
        lambda mask: make_block_mask((2, 1, 40, 36), (16, 16), 0.5),
    ),
    "a rule that does not fit": (
        ValueError,
        "KeyLengths must hold one length",
        lambda mask: mask & KeyLengths([1, 2]),
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments(case: str) -> None:
    error, message, make = BAD_CALLS[case]
    inputs, mask = small_problem()
    with pytest.raises(error, match=message):
        attn_ext.block_sparse_attention(*inputs, make(mask))


def test_a_list_that_was_changed_afterwards_is_refused() -> None:
    """The kernels read no block that is not there, whatever became of the tensors since they were checked."""
    inputs, mask = small_problem()
    mask.blocks.indices[0] = 1000
    with pytest.raises(RuntimeError, match="block_indices of a row must rise and be from 0 to 2, got 1000"):
        attn_ext.block_sparse_attention(*inputs, mask)
