"""Mask objects: what they mean, how they combine, how they are compared, copied and printed."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import attn_ext
from attn_ext import Causal, Dense, KeyLengths, Mask, Prefix, Segments, SlidingWindow
from attn_ext.masks import LoweredMask

B, H, LQ, LK = 3, 2, 4, 6
LENGTHS = [6, 0, 3]
ALLOWED = torch.tensor([True, False, True, True, True, False])
ADDED = torch.linspace(-1, 1, LQ * LK).view(LQ, LK)
row, column = torch.arange(LQ)[:, None], torch.arange(LK)

QUERY_IDS = torch.tensor([[0, 0, 1, 1], [5, -3, 5, -3], [2, 2, 2, 2]])
KV_IDS = torch.tensor([[0, 1, 1, 1, 1, 9], [5, -3, 7, 5, -3, 5], [0, 0, 0, 1, 1, 1]])

MASKS = {
    "top_left": (Causal(), row >= column),
    "bottom_right": (Causal("bottom_right"), column <= row + LK - LQ),
    "window": (SlidingWindow(1, 2), (column - row >= -1) & (column - row <= 2)),
    "bottom-right window": (
        SlidingWindow(0, 1, "bottom_right"),
        (column - row >= LK - LQ) & (column - row <= LK - LQ + 1),
    ),
    "left window": (SlidingWindow(left=2), column >= row - 2),
    "key_lengths": (KeyLengths(LENGTHS), column < torch.tensor(LENGTHS)[:, None, None, None]),
    "prefix": (Prefix(2), column < 2),
    "no prefix": (Prefix(0), column < 0),
    "long prefix": (Prefix(99), column < 99),
    "segments": (Segments(QUERY_IDS, KV_IDS), (QUERY_IDS[:, :, None] == KV_IDS[:, None])[:, None]),
    "shared segments": (Segments(QUERY_IDS[1], KV_IDS[1]), QUERY_IDS[1][:, None] == KV_IDS[1]),
    "either": (Causal() | Prefix(3), (row >= column) | (column < 3)),
    "one of three": (
        SlidingWindow(0, 0) | Prefix(1) | KeyLengths(LENGTHS),
        (column == row) | (column < 1) | (column < torch.tensor(LENGTHS)[:, None, None, None]),
    ),
    "contiguous segments or": (
        Segments(QUERY_IDS[0], KV_IDS[0]) | SlidingWindow(0, 0),
        (QUERY_IDS[0][:, None] == KV_IDS[0]) | (column == row),
    ),
    "dense or": (
        Dense((row + column) % 3 == 0) | Causal() | Dense(column == 5),
        ((row + column) % 3 == 0) | (row >= column) | (column == 5),
    ),
    "allowed": (Dense(ALLOWED), ALLOWED),
    "added": (Dense(ADDED), ADDED),
    "added per head": (Dense(torch.ones(H, 1, 1) * torch.inf * -1), torch.full((H, 1, 1), -torch.inf)),
}


# As many ranges of keys as each has times those of the other, of which there may be four.
MANY_RANGES = "either", "one of three", "contiguous segments or"
CONJUNCTIONS = [
    (first, second)
    for first in MASKS
    for second in MASKS
    if {first, second} == {"either"} or not (first in MANY_RANGES and second in MANY_RANGES)
]


def dense_and(a, b):
    """By the definition of `&`."""
    additive = [torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask for mask in (a, b)]
    if a.dtype == b.dtype == torch.bool:
        return a & b
    return additive[0] + additive[1]


@pytest.mark.parametrize(("mask", "expected"), MASKS.values(), ids=MASKS)
def test_to_dense(mask, expected):
    dense = mask.to_dense(B, H, LQ, LK)
    assert dense.shape == (B, H, LQ, LK)
    assert torch.equal(dense, expected.expand(B, H, LQ, LK))


@pytest.mark.parametrize(("first", "second"), CONJUNCTIONS)
def test_conjunction(first, second):
    (a, dense_a), (b, dense_b) = MASKS[first], MASKS[second]
    expected = dense_and(dense_a, dense_b).expand(B, H, LQ, LK)
    assert torch.equal((a & b).to_dense(B, H, LQ, LK), expected)


@pytest.mark.parametrize(("first", "second"), CONJUNCTIONS)
def test_attention_does_what_to_dense_says(first, second):
    mask = MASKS[first][0] & MASKS[second][0]
    query, key, value = (torch.randn(B, H, length, 8, dtype=torch.float64) for length in (LQ, LK, LK))
    torch.testing.assert_close(
        attn_ext.attention(query, key, value, mask=mask),
        attn_ext.scaled_dot_product_attention(query, key, value, mask.to_dense(B, H, LQ, LK)),
    )
    torch.testing.assert_close(
        attn_ext.attention(query, key, value, mask=mask),
        attn_ext.reference.attention(query, key, value, mask=mask),
    )


def test_conjunction_is_associative():
    a, b, c = Causal(), KeyLengths(LENGTHS), Dense(ALLOWED)
    assert (a & b) & c == a & (b & c)
    assert (a & b & c).parts == (a, b, c)


def test_disjunction_is_associative():
    a, b, c = Causal(), KeyLengths(LENGTHS), Prefix(2)
    assert (a | b) | c == a | (b | c)
    assert (a | b | c).parts == (a, b, c)
    assert a | b != a & b
    assert hash((a | b) | c) == hash(a | (b | c))


@pytest.mark.parametrize("second", MASKS)
@pytest.mark.parametrize("first", MASKS)
def test_disjunction(first, second):
    """What is visible by the definition of `|`, or the reason why there is no such mask."""
    (a, dense_a), (b, dense_b) = MASKS[first], MASKS[second]
    mask = a | b
    if dense_a.is_floating_point() or dense_b.is_floating_point():
        with pytest.raises(TypeError, match=r"masks combined with \| must be boolean"):
            mask.lower(LQ, LK, torch.device("cpu"))
        return
    try:
        dense = mask.to_dense(B, H, LQ, LK)
    except (NotImplementedError, ValueError) as error:
        assert any(text in str(error) for text in ("at most 4 ranges", "contiguous", "larger"))  # noqa: PT017
        return
    assert torch.equal(dense, (dense_a | dense_b).expand(B, H, LQ, LK))
    query, key, value = (torch.randn(B, H, length, 8, dtype=torch.float64) for length in (LQ, LK, LK))
    torch.testing.assert_close(
        attn_ext.attention(query, key, value, mask=mask),
        attn_ext.scaled_dot_product_attention(query, key, value, dense),
    )


def test_distributivity():
    """Nested combinations mean what the operators of sets mean."""
    a, b, c = Causal(), Prefix(2), KeyLengths(LENGTHS)
    for left, right in (((a | b) & c, (a & c) | (b & c)), ((a & b) | c, (a | c) & (b | c))):
        assert torch.equal(left.to_dense(B, H, LQ, LK), right.to_dense(B, H, LQ, LK))


def test_segments_of_both():
    """Equal ids in both, in pairs of any numbers."""
    first = Segments(torch.tensor([1, 1, 2, 2]), torch.tensor([1, 1, 1, 2, 2, 2]))
    second = Segments(QUERY_IDS, KV_IDS)
    dense = first.to_dense(B, H, LQ, LK) & second.to_dense(B, H, LQ, LK)
    assert torch.equal((first & second).to_dense(B, H, LQ, LK), dense)


def test_segments_without_kv_ids():
    ids = torch.tensor([3, 3, 1, 1])
    assert Segments(ids) == Segments(ids, ids) == Segments(ids[None])
    assert Segments(ids) != Segments(ids, ids.flip(0))
    assert Segments(ids).kv_ids.shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_segment_ids_of_any_integer_dtype(dtype):
    ids = torch.tensor([0, 0, 7, 7])
    assert Segments(ids.to(dtype)) == Segments(ids)
    limits = torch.iinfo(torch.int32)
    assert Segments(torch.tensor([limits.min, limits.max])).query_ids.tolist() == [[limits.min, limits.max]]


def test_segments_within_no_keys():
    segments = Segments(torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert segments.to_dense(1, 1, 3, 0).shape == (1, 1, 3, 0)
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 0, 4)
    assert attn_ext.attention(query, key, key, mask=segments).eq(0).all()


def test_scattered_segments_cannot_be_combined_with_or():
    scattered, packed = Segments(QUERY_IDS, KV_IDS), Segments(QUERY_IDS[0], KV_IDS[0])
    with pytest.raises(NotImplementedError, match=r"Segments combined with \| must be contiguous"):
        (scattered | Prefix(1)).lower(LQ, LK, torch.device("cpu"))
    (packed | Prefix(1)).lower(LQ, LK, torch.device("cpu"))


def test_too_many_ranges():
    many = Causal() | Prefix(1) | KeyLengths(LENGTHS) | SlidingWindow(0, 0)
    many.lower(LQ, LK, torch.device("cpu"))
    for mask in (many | Prefix(2), (Causal() | Prefix(1) | Prefix(2)) & (Causal() | Prefix(3))):
        with pytest.raises(ValueError, match=r"at most 4 ranges of keys, got [56]"):
            mask.lower(LQ, LK, torch.device("cpu"))


def test_a_dense_mask_does_not_grow():
    cpu = torch.device("cpu")
    with pytest.raises(NotImplementedError, match=r"needs a tensor of shape \(1, 1, 4, 6\)"):
        (Dense(ALLOWED) | Causal()).lower(LQ, LK, cpu)
    lowered = (Dense(ALLOWED.expand(LQ, LK)) | Causal()).lower(LQ, LK, cpu)
    assert lowered.dense.shape == (1, 1, LQ, LK)
    assert (Dense(ALLOWED) | Prefix(2)).lower(LQ, LK, cpu).dense.shape[-2:] == (1, LK)


def test_masks_stay_small():
    """Only dense parts, and only as large as they are, become tensors of scores."""
    lowered = (Causal() & KeyLengths(LENGTHS) & Causal("bottom_right")).lower(LQ, LK, torch.device("cpu"))
    assert lowered.bias is None
    assert lowered.dense is None
    assert lowered.key_ranges.tolist() == [[[[0, length]]] for length in LENGTHS]
    assert (lowered.band_lower, lowered.band_upper) == (None, 0)
    lowered = (Dense(ALLOWED) & Dense(ALLOWED)).lower(LQ, LK, torch.device("cpu"))
    assert lowered.dense.shape == (1, 1, 1, LK)
    lowered = (Dense(ADDED[:1]) & Dense(ADDED[:, :1])).lower(LQ, LK, torch.device("cpu"))
    assert lowered.bias.shape == (1, 1, LQ, LK)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_lengths_of_any_integer_dtype(dtype):
    assert KeyLengths(torch.tensor(LENGTHS, dtype=dtype)) == KeyLengths(LENGTHS)
    assert KeyLengths(tuple(LENGTHS)) == KeyLengths(LENGTHS)


def test_strided_lengths():
    lengths = torch.tensor([LENGTHS, LENGTHS]).t().contiguous()[:, 1]
    assert not lengths.is_contiguous()
    query, key, value = (torch.randn(B, H, length, 8) for length in (LQ, LK, LK))
    torch.testing.assert_close(
        attn_ext.attention(query, key, value, mask=KeyLengths(lengths)),
        attn_ext.attention(query, key, value, mask=KeyLengths(LENGTHS)),
    )


@pytest.mark.parametrize("name", MASKS)
def test_copies_are_equal(name):
    mask = MASKS[name][0]
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert type(other) is type(mask)
        assert other == mask
        assert hash(other) == hash(mask)
        assert (other & mask) == (mask & other)


def test_equality():
    masks = [mask for mask, _ in MASKS.values()] + [Causal() & KeyLengths(LENGTHS), KeyLengths([1, 2, 3])]
    for i, a in enumerate(masks):
        for j, b in enumerate(masks):
            assert (a == b) == (i == j)
    assert Dense(ADDED) != Dense(ADDED.double())
    assert Causal() != "top_left"


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Causal(), "Causal(align='top_left')"),
        (Causal("bottom_right"), "Causal(align='bottom_right')"),
        (SlidingWindow(3), "SlidingWindow(left=3, right=None, align='top_left')"),
        (KeyLengths(LENGTHS), "KeyLengths([6, 0, 3])"),
        (KeyLengths([1] * 100), "KeyLengths(int64 (100,))"),
        (Prefix(3), "Prefix(length=3)"),
        (Segments(QUERY_IDS, KV_IDS), "Segments((3, 4), (3, 6))"),
        (Dense(ALLOWED), "Dense(bool (6,))"),
        (Dense(ADDED), "Dense(float32 (4, 6))"),
        (
            Causal() & KeyLengths([2]) & Dense(ADDED),
            "Causal(align='top_left') & KeyLengths([2]) & Dense(float32 (4, 6))",
        ),
        (Prefix(1) | Prefix(2) | Prefix(3), "Prefix(length=1) | Prefix(length=2) | Prefix(length=3)"),
        (Prefix(1) | Prefix(2) & Prefix(3), "Prefix(length=1) | Prefix(length=2) & Prefix(length=3)"),
        ((Prefix(1) | Prefix(2)) & Prefix(3), "(Prefix(length=1) | Prefix(length=2)) & Prefix(length=3)"),
        (
            KeyLengths([1]) & (Prefix(2) & Prefix(3) | Prefix(4)),
            "KeyLengths([1]) & (Prefix(length=2) & Prefix(length=3) | Prefix(length=4))",
        ),
    ],
    ids=str,
)
def test_repr(mask, text):
    assert repr(mask) == text


@pytest.mark.parametrize(
    ("mask", "field"),
    [
        (Causal(), "align"),
        (Prefix(1), "length"),
        (KeyLengths([1]), "lengths"),
        (Segments(QUERY_IDS, KV_IDS), "query_ids"),
        (Dense(ADDED), "tensor"),
        (Causal() | Prefix(1), "masks"),
    ],
)
def test_masks_are_immutable(mask, field):
    with pytest.raises(AttributeError):
        setattr(mask, field, None)


@pytest.mark.parametrize("align", ["left", "", None, 1])
@pytest.mark.parametrize("make", [Causal, lambda align: SlidingWindow(1, 1, align)])
def test_bad_alignment(make, align):
    with pytest.raises(ValueError, match="align must be 'top_left' or 'bottom_right', got"):
        make(align)


def test_windows_are_bands():
    cpu = torch.device("cpu")
    assert SlidingWindow().lower(LQ, LK, cpu) == LoweredMask()
    assert SlidingWindow(3, 0).lower(LQ, LK, cpu) == LoweredMask(band_lower=-3, band_upper=0)
    window = SlidingWindow(3, 1, "bottom_right")
    assert window.lower(LQ, LK, cpu) == LoweredMask(band_lower=-1, band_upper=3)
    assert (window & Causal() & SlidingWindow(0)).lower(LQ, LK, cpu) == LoweredMask(
        band_lower=0, band_upper=0
    )
    assert SlidingWindow(0, 0) == SlidingWindow(0, 0) != SlidingWindow(0)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("size", [sys.maxsize, 2**63, 10**30])
@pytest.mark.parametrize(("query_len", "kv_len"), [(LQ, LK), (LK, LQ)])
def test_windows_of_any_size(align, size, query_len, kv_len):
    query, key, value = (torch.randn(B, H, length, 8) for length in (query_len, kv_len, kv_len))
    out = attn_ext.attention(query, key, value, mask=SlidingWindow(size, size, align))
    assert torch.equal(out, attn_ext.attention(query, key, value))


@pytest.mark.parametrize("size", [1.0, "1", True, torch.tensor(1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_that_is_no_int(side, size):
    with pytest.raises(TypeError, match=f"{side} must be an int, or None for no bound, got"):
        SlidingWindow(**{side: size})


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_negative_window(side):
    with pytest.raises(ValueError, match=rf"{side} must not be negative \(None is no bound\), got -1"):
        SlidingWindow(**{side: -1})


def test_compiled_windows():
    def windowed(query, key):
        mask = SlidingWindow(query.shape[2] // 2, 0, "bottom_right") & Causal()
        return attn_ext.attention(query, key, key, mask=mask)

    compiled = torch.compile(windowed, backend="aot_eager", fullgraph=True, dynamic=True)
    for query_len in (LQ, LQ + 3):
        query, key = torch.randn(B, H, query_len, 8), torch.randn(B, H, LK, 8)
        torch.testing.assert_close(compiled(query, key), windowed(query, key))


CAUSAL_BIASES = {"upper_left": causal_upper_left, "lower_right": causal_lower_right}


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
@pytest.mark.parametrize("shape", [(2, 3), (), (1,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("query_len", "kv_len"), [(4, 6), (6, 4), (5, 5), (1, 7)])
@pytest.mark.parametrize("make", CAUSAL_BIASES.values(), ids=CAUSAL_BIASES)
def test_causal_bias(make, query_len, kv_len, shape, monkeypatch):
    bias = make(query_len, kv_len)
    inputs = [
        torch.randn(*shape, length, 8, dtype=torch.float64, requires_grad=True)
        for length in (query_len, kv_len, kv_len)
    ]
    expected = F.scaled_dot_product_attention(*inputs, bias)
    monkeypatch.setattr(CausalBias, "_materialize", None)
    out = attn_ext.scaled_dot_product_attention(*inputs, bias, scale=None)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out)
    )
    with torch.no_grad():
        torch.testing.assert_close(attn_ext.scaled_dot_product_attention(*inputs, bias), expected)


@pytest.mark.parametrize("make", CAUSAL_BIASES.values(), ids=CAUSAL_BIASES)
def test_compiled_causal_bias(make):
    inputs, bias = [torch.randn(B, H, length, 8) for length in (LQ, LK, LK)], make(LQ, LK)

    def biased(*tensors):
        return attn_ext.scaled_dot_product_attention(*tensors)

    compiled = torch.compile(biased, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, bias), F.scaled_dot_product_attention(*inputs, bias))


@pytest.mark.parametrize("make", CAUSAL_BIASES.values(), ids=CAUSAL_BIASES)
def test_causal_bias_for_other_lengths(make):
    query, key = torch.randn(B, H, LQ, 8), torch.randn(B, H, LK, 8)
    message = (
        r"attn_mask must be a CausalBias for the lengths of query and key, \(4, 6\), got one for \(4, 7\)"
    )
    with pytest.raises(ValueError, match=message):
        attn_ext.scaled_dot_product_attention(query, key, key, make(LQ, LK + 1))
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal is True"):
        attn_ext.scaled_dot_product_attention(query, key, key, make(LQ, LK), is_causal=True)


@pytest.mark.parametrize("lengths", [None, 3, 3.0, "12", b"12", {1, 2}, object()])
def test_lengths_that_are_none(lengths):
    with pytest.raises(TypeError, match="lengths must be a tensor or a sequence of int, got"):
        KeyLengths(lengths)


@pytest.mark.parametrize("length", [1.0, "1", True, None])
def test_a_length_that_is_no_int(length):
    with pytest.raises(TypeError, match=rf"lengths\[1\] must be an int, got {type(length).__name__}"):
        KeyLengths([1, length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_lengths_that_are_no_integers(dtype):
    with pytest.raises(TypeError, match=f"lengths must be a tensor of integers, got {dtype}"):
        KeyLengths(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (3, 1), (1, 1, 1)])
def test_lengths_of_other_dimensions(shape):
    with pytest.raises(ValueError, match="lengths must have one dimension"):
        KeyLengths(torch.ones(shape, dtype=torch.int64))


def test_a_negative_length():
    with pytest.raises(ValueError, match=r"lengths\[1\] must not be negative, got -1"):
        KeyLengths([1, -1])


@pytest.mark.parametrize("length", [1.0, "1", True, None, torch.tensor(1)])
def test_a_prefix_that_is_no_int(length):
    with pytest.raises(TypeError, match=f"length must be an int, got {type(length).__name__}"):
        Prefix(length)


def test_a_negative_prefix():
    with pytest.raises(ValueError, match="length must not be negative, got -1"):
        Prefix(-1)


@pytest.mark.parametrize("name", ["query_ids", "kv_ids"])
def test_segment_ids_that_are_none(name):
    ids = {"query_ids": torch.zeros(4, dtype=torch.int64), "kv_ids": torch.zeros(6, dtype=torch.int64)}
    for bad in ([1, 2], 3, "12", *([None] if name == "query_ids" else [])):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got {type(bad).__name__}"):
            Segments(**{**ids, name: bad})
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"{name} must be a tensor of integers, got {dtype}"):
            Segments(**{**ids, name: torch.ones(4, dtype=dtype)})
    for shape in ((), (1, 1, 4)):
        with pytest.raises(ValueError, match=rf"{name} must be \(B, L\) or \(L,\), got shape"):
            Segments(**{**ids, name: torch.zeros(shape, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"query_ids and kv_ids must have the same batch size, got shapes"):
        Segments(QUERY_IDS, KV_IDS[:2])
    for number in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match=f"{name} must fit in 32 bits, got"):
            Segments(**{**ids, name: torch.tensor([0, number])})


@pytest.mark.parametrize("bad", [None, [[True]], 1.0, Causal()])
def test_dense_takes_a_tensor(bad):
    with pytest.raises(TypeError, match=f"tensor must be a torch.Tensor, got {type(bad).__name__}"):
        Dense(bad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_dense_dtypes(dtype):
    with pytest.raises(TypeError, match=rf"tensor must be bool \(True = attend\).*got {dtype}"):
        Dense(torch.ones(2, 2).to(dtype))


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1)])
def test_dense_dimensions(shape):
    with pytest.raises(ValueError, match="tensor must have 1 to 4 dimensions"):
        Dense(torch.ones(shape))


@pytest.mark.parametrize("other", [None, True, ALLOWED, "causal", Causal])
def test_a_combination_with_something_else(other):
    with pytest.raises(TypeError, match=r"unsupported operand|must be"):
        _ = Causal() & other
    with pytest.raises(TypeError, match=r"unsupported operand|must be"):
        _ = Causal() | other


def test_masks_have_a_base():
    for mask, _ in MASKS.values():
        assert isinstance(mask, Mask)
        assert isinstance(mask & mask, Mask)
    with pytest.raises(NotImplementedError):
        Mask().lower(1, 1, torch.device("cpu"))


def test_scattered_segments_that_are_contiguous_together():
    """The keys that two ids share may be one run where those of each are not."""
    first = Segments(torch.tensor([1, 2, 1, 9]))
    second = Segments(torch.tensor([1, 1, 2, 9]))
    expected = (first & second).to_dense(1, 1, 4, 4)
    assert torch.equal(((first & second) | Prefix(0)).to_dense(1, 1, 4, 4), expected)
