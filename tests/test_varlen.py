"""Packed sequences: each as if it were alone, whatever its lengths; and nested tensors, which are packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, make_block_mask, make_inputs
from torch import Tensor

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Mask, Prefix, Segments, SlidingWindow
from attn_ext.testing import check_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")

LENGTHS = {
    "one": ([70], [70]),
    "equal": ([64, 64, 64], [64, 64, 64]),
    "self": ([5, 130, 1, 64, 33], [5, 130, 1, 64, 33]),
    "short": ([3, 7, 1, 12, 5, 5, 2, 9, 4, 1] * 4, [3, 7, 1, 12, 5, 5, 2, 9, 4, 1] * 4),
    "prefill": ([16, 3, 40, 1], [200, 90, 40, 33]),
    "more queries": ([40, 64, 9], [3, 50, 1]),
    "empty": ([0, 17, 5, 0, 33, 0], [9, 0, 5, 0, 40, 0]),
    "no keys": ([4, 3], [0, 0]),
    "no queries": ([0, 0], [4, 3]),
}


def _per_sequence(mask: Mask) -> Callable:
    return lambda lens_q, lens_k: (mask, [mask] * len(lens_q))


def _key_lengths(lens_q: list[int], lens_k: list[int]) -> tuple[Mask, list[Mask]]:
    lengths = [length * (index % 3) // 2 if index % 3 < 2 else length for index, length in enumerate(lens_k)]
    return KeyLengths(lengths), [KeyLengths([length]) for length in lengths]


def _segments(lens_q: list[int], lens_k: list[int]) -> tuple[Mask, list[Mask]]:
    """Ids that rise in each sequence, and come again in the next one."""
    ids = [
        [torch.arange(length) * 3 // max(length, 1) - 1 for length in lengths] for lengths in (lens_q, lens_k)
    ]
    each = [Segments(*pair) for pair in zip(*ids, strict=True)]
    return Segments(*(torch.cat(part) for part in ids)), each


def _combined(combine: Callable, *makers: Callable) -> Callable:
    def make(lens_q: list[int], lens_k: list[int]) -> tuple[Mask, list[Mask]]:
        packed, each = zip(*(maker(lens_q, lens_k) for maker in makers), strict=True)
        return combine(*packed), [combine(*masks) for masks in zip(*each, strict=True)]

    return make


MASKS: dict[str, Callable[[list[int], list[int]], tuple[Mask | None, list[Mask | None]]]] = {
    "none": lambda lens_q, lens_k: (None, [None] * len(lens_q)),
    "causal": _per_sequence(Causal()),
    "bottom-right": _per_sequence(Causal("bottom_right")),
    "window": _per_sequence(SlidingWindow(9, 4)),
    "bottom-right window": _per_sequence(SlidingWindow(20, 0, "bottom_right")),
    "left window": _per_sequence(SlidingWindow(left=2)),
    "open window": _per_sequence(SlidingWindow()),
    "prefix": _per_sequence(Prefix(3)),
    "endless": _per_sequence(Prefix(2**70) & SlidingWindow(2**70, 2**70)),
    "prefix language model": _per_sequence(Causal() | Prefix(4)),
    "sinks": _per_sequence(SlidingWindow(5, 0, "bottom_right") | Prefix(2)),
    "key lengths": _key_lengths,
    "causal and key lengths": _combined(
        lambda a, b: a & b, _per_sequence(Causal("bottom_right")), _key_lengths
    ),
    "causal or key lengths": _combined(lambda a, b: a | b, _per_sequence(Causal()), _key_lengths),
    "segments": _segments,
    "causal segments": _combined(lambda a, b: a & b, _per_sequence(Causal("bottom_right")), _segments),
    "segments or prefix": _combined(lambda a, b: a | b, _segments, _per_sequence(Prefix(2))),
}


def cu_seqlens(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def block_diagonal(lens_q: list[int], lens_k: list[int], masks: list[Mask | None]) -> Dense:
    """What the sequences' masks let each query see, as one tensor."""
    blocks = [
        torch.ones(q, k, dtype=torch.bool) if mask is None else mask.to_dense(1, 1, q, k)[0, 0]
        for q, k, mask in zip(lens_q, lens_k, masks, strict=True)
    ]
    return Dense(torch.block_diag(*blocks).bool())


def check_varlen(
    lens_q: list[int],
    lens_k: list[int],
    packed: Mask | None,
    each: list[Mask | None],
    inputs: tuple[Tensor, Tensor, Tensor],
    **options: Any,
) -> None:
    """`check_attention` of packed sequences, (1, H, T, D), against one dense mask for all of them."""
    lengths = cu_seqlens(lens_q), cu_seqlens(lens_k)

    def attention(*tensors: Tensor, mask: Mask, alibi_slopes: None, **rest: Any) -> tuple[Tensor, Tensor]:
        tokens = (tensor.squeeze(0).transpose(0, 1) for tensor in tensors)
        out, lse = attn_ext.attention_varlen(*tokens, *lengths, mask=packed, **rest)
        return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    check_attention(*inputs, mask=block_diagonal(lens_q, lens_k, each), attention=attention, **options)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_masks(lengths, name):
    packed, each = MASKS[name](*lengths)
    inputs = make_inputs(1, 2, sum(lengths[0]), sum(lengths[1]), 16, group=2)
    check_varlen(*lengths, packed, each, inputs)


@pytest.mark.sample(
    48,
    lengths=tuple(LENGTHS),
    mask=tuple(MASKS),
    dtype=DTYPES,
    group=(1, 2, 3),
    head_dim=(1, 8, 33, 64, 128),
    value_dim=(3, 16, 64),
    options=(
        {},
        {"softcap": 3.0},
        {"scale": 0.7},
        {"sinks": torch.linspace(-2, 2, 6)},
        {"dropout_p": 0.3, "dropout_seed": 7},
        {"softcap": 5.0, "sinks": torch.linspace(-1, 3, 6), "dropout_p": 0.5, "dropout_seed": 1},
    ),
)
def test_options(case: SimpleNamespace, isa) -> None:
    lengths = LENGTHS[case.lengths]
    packed, each = MASKS[case.mask](*lengths)
    sizes = 1, 6, sum(lengths[0]), sum(lengths[1])
    inputs = make_inputs(*sizes, case.head_dim, value_dim=case.value_dim, group=case.group, dtype=case.dtype)
    check_varlen(*lengths, packed, each, inputs, **case.options)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_a_bias_is_packed(rows, heads):
    lens_q, lens_k = LENGTHS["prefill"]
    tokens = sum(lens_q), sum(lens_k)
    bias = torch.randn(4 if heads else 1, tokens[0] if rows else 1, tokens[1])
    packed, each = MASKS["bottom-right"](lens_q, lens_k)
    inputs = make_inputs(1, 4, *tokens, 16, group=2)
    check_varlen(lens_q, lens_k, packed, each, inputs, bias=bias)
    check_varlen(lens_q, lens_k, packed, each, inputs, bias=bias[0, 0])


@pytest.mark.parametrize("combine", [lambda a, b: a & b, lambda a, b: a | b])
def test_a_dense_mask_is_packed(combine):
    lens_q, lens_k = LENGTHS["self"]
    tokens = sum(lens_q), sum(lens_k)
    allowed = torch.rand(tokens) < 0.5
    blocks = [part.split(lens_k, dim=1)[index] for index, part in enumerate(allowed.split(lens_q, dim=0))]
    each = [combine(Causal(), Dense(block)) for block in blocks]
    inputs = make_inputs(1, 2, *tokens, 16)
    check_varlen(lens_q, lens_k, combine(Causal(), Dense(allowed)), each, inputs)


def test_a_block_mask_is_packed():
    lens_q, lens_k = LENGTHS["self"]
    tokens = sum(lens_q), sum(lens_k)
    mask = make_block_mask((1, 1, *tokens), (16, 32), 0.6)
    rows = mask.to_dense(1, 1, *tokens)[0, 0].split(lens_q, dim=0)
    each = [Dense(part.split(lens_k, dim=1)[index]) & Causal() for index, part in enumerate(rows)]
    inputs = make_inputs(1, 2, *tokens, 16)
    check_varlen(lens_q, lens_k, mask & Causal(), each, inputs)


def packed_inputs(
    lens_q: list[int], lens_k: list[int], heads: int = 2, group: int = 1, **options: Any
) -> tuple[Tensor, ...]:
    """query, key, value (T, H, 8) and the cumulative lengths."""
    tensors = make_inputs(1, heads, sum(lens_q), sum(lens_k), 8, group=group, **options)
    tokens = (tensor[0].transpose(0, 1).contiguous() for tensor in tensors)
    return *tokens, cu_seqlens(lens_q), cu_seqlens(lens_k)


def test_other_sequences_are_never_felt():
    query, key, value, *lengths = packed_inputs([40, 30, 50], [40, 30, 50])
    expected = attn_ext.attention_varlen(query, key, value, *lengths, mask=Causal())
    key[40:70], value[40:70] = torch.nan, torch.inf
    query.requires_grad_()
    out = attn_ext.attention_varlen(query, key, value, *lengths, mask=Causal())
    others = torch.cat((torch.arange(40), torch.arange(70, 120)))
    assert torch.equal(out[others], expected[others])
    (grad,) = torch.autograd.grad(out[others].sum(), query)
    assert grad[others].isfinite().all()
    assert out[40:70].isnan().any()


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_alibi_counts_within_each_sequence(lengths, each):
    """Also in the second derivatives, which torch computes."""
    lens_q, lens_k = lengths
    inputs = packed_inputs(*lengths, heads=4, group=2, dtype=torch.float64)
    slopes = torch.rand(len(lens_q), 4) if each else torch.rand(4)
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    out = attn_ext.attention_varlen(*tensors, *inputs[3:], mask=Causal("bottom_right"), alibi_slopes=slopes)
    parts = (tensor.split(sizes) for tensor, sizes in zip(tensors, (lens_q, lens_k, lens_k), strict=True))
    expected = []
    for index, sequence in enumerate(zip(*parts, strict=True)):
        alone = attn_ext.attention(
            *(tensor.transpose(0, 1).unsqueeze(0) for tensor in sequence),
            mask=Causal("bottom_right"),
            alibi_slopes=slopes[index] if each else slopes,
        )
        expected.append(alone.squeeze(0).transpose(0, 1))
    expected = torch.cat(expected)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    first = [torch.autograd.grad((y * weight).sum(), tensors, create_graph=True) for y in (out, expected)]
    second = [torch.autograd.grad(sum(g.pow(2).sum() for g in grads), tensors) for grads in first]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*second)


def test_results_are_packed_as_the_query_is():
    out, lse = attn_ext.attention_varlen(*packed_inputs([3, 4], [5, 6]), return_lse=True)
    assert (out.shape, lse.shape) == ((7, 2, 8), (2, 7))
    assert out.is_contiguous()


def test_only_lengths_are_examined(monkeypatch):
    def fail(*_):
        raise AssertionError("the arguments were examined")

    monkeypatch.setattr(attn_ext._validation, "check_attention_varlen", fail)
    attn_ext.attention_varlen(*packed_inputs([3, 4], [5, 6]), mask=Causal(), softcap=2.0)


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_lengths_of_either_type(dtypes):
    query, key, value, *lengths = packed_inputs([3, 4], [5, 6])
    expected = attn_ext.attention_varlen(query, key, value, *lengths)
    lengths = (cu.to(dtype) for cu, dtype in zip(lengths, dtypes, strict=True))
    assert torch.equal(attn_ext.attention_varlen(query, key, value, *lengths, 4, max_seqlen_k=6), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("mask", [None, Causal("bottom_right"), SlidingWindow(1, 0) | Prefix(1)])
def test_gradcheck(mask):
    *tensors, cu_q, cu_k = packed_inputs([2, 0, 3], [3, 1, 2], group=2, dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def function(query, key, value):
        return attn_ext.attention_varlen(query, key, value, cu_q, cu_k, mask=mask, return_lse=True)

    # A row that sees nothing has an lse of -inf.
    finite = None if mask is None else lambda *args: function(*args)[0]
    assert torch.autograd.gradcheck(finite or function, tensors)
    assert torch.autograd.gradgradcheck(finite or function, tensors)
    assert torch.autograd.gradcheck(finite or function, tensors, check_forward_ad=True)


@pytest.mark.parametrize("name", ["none", "bottom-right", "sinks", "key lengths"])
def test_compile(name):
    torch.compiler.reset()
    lens_q, lens_k = LENGTHS["prefill"]
    packed, _ = MASKS[name](lens_q, lens_k)

    def function(query, key, value, cu_q, cu_k):
        return attn_ext.attention_varlen(query, key, value, cu_q, cu_k, mask=packed, return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for scale in (1, 2):
        inputs = packed_inputs([n * scale for n in lens_q], [n * scale for n in lens_k], group=2)
        results = []
        for call in (function, compiled):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
            out, lse = call(*leaves, *inputs[3:])
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def test_compiled_functions_read_nothing_beyond_the_packed_tokens():
    """It takes an operator to look at values that are traced: that of the kernels looks at ranges of keys."""
    torch.compiler.reset()
    query, *_, valid = packed_inputs([3, 4], [3, 4])

    def function(cu):
        return attn_ext.attention_varlen(query, query, query, cu, cu)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(valid), function(valid))
    for lengths in ([0, 3, 8], [0, 9, 7], [0, 3, 2**31 - 1], [0, -1, 7], [-9, -5, -1], [0, 2**31 - 1, -2]):
        with pytest.raises(RuntimeError, match="key_ranges must hold 0 to 7, got"):
            compiled(torch.tensor(lengths, dtype=torch.int32))
    for lengths in ([0, 3, 6], [1, 3, 7], [0, 5, 3]):
        assert compiled(torch.tensor(lengths, dtype=torch.int32)).isfinite().all()


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f))])
def test_transforms(transform):
    query, *_, lengths = packed_inputs([3, 4], [3, 4])
    batch = torch.stack((query, query.flip(0), query.square()))

    def function(tokens):
        return attn_ext.attention_varlen(tokens, tokens, tokens, lengths, lengths, mask=Causal()).sum()

    expected = [transform(function)(tokens[None])[0] for tokens in batch]
    assert torch.equal(transform(function)(batch), torch.stack(expected))


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert attn_ext.attention_varlen(*packed_inputs([3, 4], [5, 6])).dtype == torch.bfloat16


# --- Errors -------------------------------------------------------------------------------------------------


def arguments(**replaced: Any) -> dict[str, Any]:
    """Valid arguments: lengths 2, 0, 3 of 4 heads and 1, 4, 2 of 2, head_dim 8."""
    names = "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"
    return dict(zip(names, packed_inputs([2, 0, 3], [1, 4, 2], 4, 2), strict=True)) | replaced


def test_the_arguments_used_here_are_valid():
    attn_ext.attention_varlen(**arguments())


INT32 = torch.iinfo(torch.int32)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0, 2, 2, 4], "must go from 0 to the number of tokens, 5, got 0 to 4"),
        ([0, 2, 2, 6], "must go from 0 to the number of tokens, 5, got 0 to 6"),
        ([1, 2, 2, 5], "must go from 0 to the number of tokens, 5, got 1 to 5"),
        ([-1, 2, 2, 5], "must go from 0 to the number of tokens, 5, got -1 to 5"),
        ([0], "must go from 0 to the number of tokens, 5, got 0 to 0"),
        ([0, 3, 2, 5], "must not decrease, got"),
        ([0, 9, 9, 5], "must not decrease, got"),
        ([0, -4, 2, 5], "must not decrease, got"),
        ([0, INT32.max, INT32.min, 5], "must not decrease, got"),
        ([0, INT32.max, -2, 5], "must not decrease, got"),  # whose differences wrap to positive numbers
        ([], r"must be \(B \+ 1,\), got shape \(0,\)"),
        ([[0, 2, 2, 5]], r"must be \(B \+ 1,\), got shape \(1, 4\)"),
    ],
)
def test_hostile_lengths(name, lengths, message):
    query, *_, valid = packed_inputs([2, 0, 3], [2, 0, 3])
    hostile = torch.tensor(lengths, dtype=torch.int32)
    pair = {"cu_seqlens_q": valid, "cu_seqlens_k": valid} | {name: hostile}
    with pytest.raises(ValueError, match=f"{name} {message}"):
        attn_ext.attention_varlen(query, query, query, **pair)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
        ({"query": torch.randn(1, 4, 5, 8)}, ValueError, r"query must be \(T, H, D\), got shape \(1, 4, 5"),
        ({"key": torch.randn(7, 2, 6)}, ValueError, r"key must have the head_dim .* of query, 8, got shape"),
        ({"key": torch.randn(7, 2, 8).double()}, TypeError, "key must have the dtype of query"),
        ({"value": torch.randn(6, 2, 8)}, ValueError, "value must have as many tokens as key, 7, got shape"),
        ({"value": torch.randn(7, 1, 8)}, ValueError, "value must have as many heads as key, 2, got shape"),
        ({"query": torch.randn(5, 3, 8)}, ValueError, "heads of query must be a multiple of those of key"),
        ({"cu_seqlens_k": [0, 7]}, TypeError, "cu_seqlens_k must be a torch.Tensor, got list"),
        ({"cu_seqlens_k": torch.tensor([0.0, 7.0])}, TypeError, "cu_seqlens_k must be int32 or int64, got"),
        (
            {"cu_seqlens_k": torch.zeros(4, dtype=torch.int32, device="meta")},
            ValueError,
            "cu_seqlens_k must be on the device of query, cpu, got meta",
        ),
        (
            {"max_seqlen_q": 2},
            ValueError,
            "max_seqlen_q must be at least the longest of cu_seqlens_q, 3, got 2",
        ),
        (
            {"max_seqlen_k": 3},
            ValueError,
            "max_seqlen_k must be at least the longest of cu_seqlens_k, 4, got 3",
        ),
        ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k must be an int or None, got float"),
        ({"mask": torch.ones(5, 7)}, TypeError, "mask must be None or an attn_ext mask, got Tensor; wrap"),
        ({"mask": Mask()}, NotImplementedError, "Mask masks of packed sequences are not implemented"),
        (
            {"mask": KeyLengths([1, 4])},
            ValueError,
            "KeyLengths must hold one length per batch entry, 3, got 2",
        ),
        (
            {"mask": Causal() & KeyLengths([1, 4, 3])},
            ValueError,
            r"KeyLengths must hold lengths from 0 to \[1, 4, 2\], got \[1, 4, 3\]",
        ),
        ({"mask": Segments(torch.zeros(7).int())}, ValueError, "Segments must have query_ids of shape"),
        (
            {"mask": Segments(torch.zeros(3, 5).int(), torch.zeros(3, 7).int())},
            ValueError,
            "Segments must have query_ids of shape",
        ),
        ({"mask": Dense(torch.ones(5, 6))}, ValueError, "mask Dense must have .* broadcastable to"),
        ({"bias": torch.randn(3, 5, 7)}, ValueError, "bias must have .* broadcastable to"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number that is not negative"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\), got shape \(2,\)"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p must be from 0 to 1, got 2.0"),
        ({"dropout_p": 0.5, "dropout_seed": 0.5}, TypeError, "dropout_seed must be an int, a tensor or None"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(3, 4\)"),
        (
            {"alibi_slopes": torch.ones(4, requires_grad=True)},
            NotImplementedError,
            "alibi_slopes must not require grad",
        ),
    ],
)
def test_errors(replaced, error, message):
    with pytest.raises(error, match=message):
        attn_ext.attention_varlen(**arguments(**replaced))


# --- Nested tensors -----------------------------------------------------------------------------------------


def nested(lengths: list[int], heads: int = 2, head_dim: int = 8) -> tuple[Tensor, Tensor]:
    """Packed tokens (T, H, D), and (B, H, j, D) of them."""
    tokens = torch.randn(sum(lengths), heads, head_dim, requires_grad=True)
    offsets = cu_seqlens(lengths, torch.int64)
    return tokens, torch.nested.nested_tensor_from_jagged(tokens, offsets).transpose(1, 2)


def test_nested_equal_torch():
    lengths = [3, 9, 1, 20]
    tokens, tensors = zip(*(nested(lengths) for _ in range(3)), strict=True)
    offsets = tensors[0].offsets()
    tensors = [torch.nested.nested_tensor_from_jagged(t, offsets).transpose(1, 2) for t in tokens]
    results = []
    for function in (attn_ext.scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*tensors)
        grads = torch.autograd.grad(out.values().square().sum(), tokens)
        results.append((out, *grads))
    (out, *grads), (expected, *expected_grads) = results
    assert out.shape == expected.shape == tensors[0].shape  # the same lengths, not only as many
    torch.testing.assert_close(out.values(), expected.values())
    for actual, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_are_packed(is_causal):
    """Lengths of their own for queries and keys, some of them 0; fewer heads of keys."""
    (q, query), (k, key), (v, value) = (
        nested([4, 0, 7, 2], 4),
        nested([5, 3, 0, 2]),
        nested([5, 3, 0, 2], 2, 6),
    )
    out = attn_ext.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    lengths = query.offsets(), key.offsets()
    expected = attn_ext.attention_varlen(q, k, v, *lengths, mask=Causal() if is_causal else None, scale=0.3)
    assert out.shape[:3] == query.shape[:3]
    assert out.shape[3] == 6
    packed = out.transpose(1, 2).values()
    assert torch.equal(packed, expected)
    weights = torch.randn_like(packed)
    for actual, wanted in zip(
        torch.autograd.grad(packed, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
        strict=True,
    ):
        assert torch.equal(actual, wanted)


def test_nested_dropout_follows_the_generator():
    _, query = nested([4, 9])
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(attn_ext.scaled_dot_product_attention(query, query, query, dropout_p=0.5).values())
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], attn_ext.scaled_dot_product_attention(query, query, query).values())


def test_nested_with_gaps():
    padded, lengths = torch.randn(3, 6, 2, 8), torch.tensor([3, 0, 4])
    gappy = torch.nested.narrow(padded, 1, torch.tensor([0, 1, 2]), lengths, layout=torch.jagged)
    assert not gappy.is_contiguous()
    tight = torch.nested.nested_tensor([padded[0, :3], padded[1, 1:1], padded[2, 2:6]], layout=torch.jagged)
    results = [
        attn_ext.scaled_dot_product_attention(*[t.transpose(1, 2)] * 3, is_causal=True)
        for t in (gappy, tight)
    ]
    assert torch.equal(results[0].values(), results[1].values())
    assert torch.equal(results[0].offsets(), tight.offsets())


def test_nested_compile():
    torch.compiler.reset()
    _, query = nested([4, 9, 2])

    def function(tensor):
        return attn_ext.scaled_dot_product_attention(tensor, tensor, tensor, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query).values(), function(query).values())


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        (([3, 2], [3], [3]), {}, ValueError, "key must have the batch size of query, 2, got shape"),
        (([3], [3], [2]), {}, ValueError, "value must have the lengths of key"),
        (([3], [3], [3]), {"attn_mask": torch.ones(3, 3)}, ValueError, "attn_mask must be None for nested"),
        (([3], [3], [3]), {"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
        (([3], [3], [3]), {"enable_gqa": None}, TypeError, "enable_gqa must be a bool, got NoneType"),
        (([3], [3], [3]), {"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ],
)
def test_nested_errors(lengths, options, error, message):
    with pytest.raises(error, match=message):
        attn_ext.scaled_dot_product_attention(*(nested(part)[1] for part in lengths), **options)


def test_nested_heads():
    query, key = nested([3, 4], 4)[1], nested([3, 4], 2)[1]
    with pytest.raises(ValueError, match="must have as many heads, without enable_gqa, got 4, 2 and 2"):
        attn_ext.scaled_dot_product_attention(query, key, key)


def test_nested_dimensions():
    query = nested([3, 4])[1]
    for tensor in (query.transpose(1, 2), query.transpose(1, 2).flatten(2)):
        with pytest.raises(ValueError, match=r"query must be \(B, H, j, D\), of different lengths j, got"):
            attn_ext.scaled_dot_product_attention(tensor, tensor, tensor)


def test_nested_of_the_old_layout():
    tensor = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    with pytest.raises(
        TypeError, match=r"query must be a dense tensor, got a nested tensor: .* torch\.jagged"
    ):
        attn_ext.scaled_dot_product_attention(tensor, tensor, tensor)
    jagged = nested([3, 4])[1]
    with pytest.raises(
        TypeError, match=r"key must be a nested tensor of layout torch\.jagged, got torch\.strided"
    ):
        attn_ext.scaled_dot_product_attention(jagged, tensor, tensor)
