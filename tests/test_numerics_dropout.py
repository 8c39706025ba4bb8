"""Dropout: which weights it takes is random, reproducible, and the same for every kernel."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import DTYPES, assert_same_bits, make_inputs, run
from torch import Tensor

import attn_ext
from attn_ext.testing import available_isas, dropout_mask, use_isa

SIGMAS = 5
MASK_32 = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., 2011), of any number of counters, four words each."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [high_b ^ c[1] ^ np.uint64(key[0]), b & MASK_32, high_a ^ c[3] ^ np.uint64(key[1]), a & MASK_32]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def expected_mask(seed: int, p: float, batch: int, heads: int, query_len: int, kv_len: int) -> Tensor:
    """The layout that csrc/core/dropout.h documents."""
    b, h, i, j = np.meshgrid(*map(np.arange, (batch, heads, query_len, kv_len)), indexing="ij")
    column = j % 32
    words = philox([j // 32 * 4 + column % 8 // 2, i, h, b], seed & (2**64 - 1))
    word = np.choose(column // 8, words)
    bits = word >> (16 * (column % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    threshold = math.floor((1 - p) * 2**16 + 0.5)
    return torch.from_numpy((bits < threshold) * (2**16 / threshold if threshold else 0.0))


# Of Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: int, answer: list[int]) -> None:
    """Of the generator of this file, with which the mask is then compared."""
    assert [int(word) for word in philox(counter, key)] == answer


def test_known_answers_are_the_decisions_of_the_kernels() -> None:
    """Query, head, batch and seed 0, keys 0, 1, 8, 9, ...: the halves of the four words of counter 0."""
    halves = [half for word in KNOWN_ANSWERS[0][2] for half in (word & 0xFFFF, word >> 16)]
    keys = [8 * word + half for word in range(4) for half in range(2)]
    for key, bits in zip(keys, halves, strict=True):
        kept, dropped = (dropout_mask(0, 1 - t / 2**16, 1, 1, 1, 32)[0, 0, 0, key] for t in (bits + 1, bits))
        assert kept > 0
        assert dropped == 0


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.875])
def test_mask_has_the_documented_layout(seed: int, p: float) -> None:
    sizes = (3, 5, 7, 131)
    assert torch.equal(dropout_mask(seed, p, *sizes), expected_mask(seed, p, *sizes))


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.3, 1 / 3, 1 - 2**-16, 1 - 1e-6, 1.0])
def test_factors(p: float) -> None:
    """The probability is a multiple of 2^-16, and so are what stays and its factor."""
    threshold = math.floor((1 - p) * 2**16 + 0.5)
    factors = dropout_mask(1, p, 2, 2, 64, 64)
    assert set(factors.unique().tolist()) <= {0.0, 2**16 / threshold if threshold else 0.0}
    if threshold in (0, 2**16):
        assert (factors == (1.0 if threshold else 0.0)).all()


# --- Statistics ---------------------------------------------------------------------------------------------

STATISTICS_SIZES = (4, 6, 128, 192)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    """Over everything, and over each batch entry, head, row, column and column of each head."""
    kept = (dropout_mask(7, p, *STATISTICS_SIZES) != 0).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (0, 2), (0, 3), (2, 3)):
        count = math.prod(kept.size(dim) for dim in dims)
        sigma = math.sqrt(p * (1 - p) / count)
        error = (kept.mean(dims) - (1 - p)).abs().max()
        assert error <= SIGMAS * sigma + 2**-17, f"over {dims}: {error / sigma:.1f} sigma"


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_neighbours_are_not_correlated(dim: int, distance: int, p: float) -> None:
    """Batch entries, heads, rows, columns."""
    kept = (dropout_mask(7, p, *STATISTICS_SIZES) != 0).double() - (1 - p)
    length = kept.size(dim) - distance
    assert_uncorrelated(kept.narrow(dim, 0, length), kept.narrow(dim, distance, length), p)


@pytest.mark.parametrize("distance", [8, 16, 24, 32, 64])
def test_columns_of_one_call_are_not_correlated(distance: int) -> None:
    kept = (dropout_mask(7, 0.5, *STATISTICS_SIZES) != 0).double() - 0.5
    assert_uncorrelated(kept[..., :-distance], kept[..., distance:], 0.5)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (1, -1), (5, 5 + 2**32), (0, -(2**63))])
def test_seeds_are_not_correlated(one: int, other: int) -> None:
    masks = [(dropout_mask(seed, 0.5, *STATISTICS_SIZES) != 0).double() - 0.5 for seed in (one, other)]
    assert_uncorrelated(*masks, 0.5)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_axes_are_not_interchangeable(a: int, b: int) -> None:
    size = 32
    kept = (dropout_mask(7, 0.5, *(size,) * 4) != 0).double() - 0.5
    index = torch.arange(size)
    along_a, along_b = (index.view([size if dim == axis else 1 for dim in range(4)]) for axis in (a, b))
    above_diagonal = (along_a < along_b).expand_as(kept)
    assert_uncorrelated(kept[above_diagonal], kept.transpose(a, b)[above_diagonal], 0.5)


def assert_uncorrelated(a: Tensor, b: Tensor, p: float) -> None:
    sigma = p * (1 - p) / math.sqrt(a.numel())
    correlation = float((a * b).mean()) / sigma
    assert abs(correlation) <= SIGMAS, f"{correlation:.1f} sigma"


@pytest.mark.parametrize("p", [0.1, 0.7])
def test_mean_over_seeds_is_the_output_without_dropout(p: float) -> None:
    inputs = make_inputs(2, 2, 9, 40, 16)
    expected = attn_ext.attention(*inputs)
    outputs = torch.stack(
        [attn_ext.attention(*inputs, dropout_p=p, dropout_seed=seed) for seed in range(1000)]
    )
    sigma = outputs.std(0) / math.sqrt(len(outputs))
    assert ((outputs.mean(0) - expected).abs() / sigma).max() <= SIGMAS


# --- The kernels --------------------------------------------------------------------------------------------


def masks_felt(
    sizes: tuple[int, ...], group: int, dtype: torch.dtype, p: float, seed: int
) -> dict[str, Tensor]:
    """The factors, as the output, the gradient of value and the gradient of a bias show them."""
    batch, heads, query_len, kv_len = sizes
    query = torch.zeros(batch, heads, query_len, 8, dtype=dtype)  # every weight is 1 / kv_len
    key = torch.zeros(batch, heads // group, kv_len, 8, dtype=dtype)
    options = {"dropout_p": p, "dropout_seed": seed}
    one_hot = torch.eye(kv_len, dtype=dtype).expand(batch, heads // group, kv_len, kv_len).contiguous()
    felt = {"out": attn_ext.attention(query, key, one_hot, **options).double() * kv_len}

    # Each head of a group, and each of its queries, has a column of its own.
    value = torch.ones(batch, heads // group, kv_len, group * query_len, dtype=dtype)
    grad_out = torch.eye(group * query_len, dtype=dtype).view(group, query_len, group * query_len)
    grad_out = grad_out.repeat(batch, heads // group, 1, 1)
    grad_value = run(query, key, value, grad_out=grad_out, **options)["grad_value"].double() * kv_len
    felt["grad_value"] = grad_value.unflatten(3, (group, query_len)).permute(0, 1, 3, 4, 2).flatten(1, 2)

    bias = torch.zeros(sizes, dtype=torch.float64)
    ones = torch.ones(batch, heads // group, kv_len, 1, dtype=dtype)
    results = run(query, key, ones, bias=bias, **options)
    # The gradient is (factor - mean of the row's factors) / kv_len.
    felt["grad_bias"] = results["grad_bias"].double() * kv_len + results["out"].double()
    return felt


@pytest.mark.usefixtures("isa")
@pytest.mark.sample(
    32,
    query_len=(1, 2, 7, 16, 33, 65, 100),
    kv_len=(1, 2, 31, 33, 64, 97, 200, 513),
    heads_and_group=((1, 1), (4, 1), (4, 2), (4, 4), (6, 3)),
    batch=(1, 2, 3),
    dtype=DTYPES,
    p=(0.25, 0.5, 0.75),
)
def test_forward_and_backward_drop_what_the_mask_says(case: SimpleNamespace) -> None:
    heads, group = case.heads_and_group
    sizes = (case.batch, heads, case.query_len, case.kv_len)
    expected = dropout_mask(11, case.p, *sizes)
    for name, felt in masks_felt(sizes, group, case.dtype, case.p, 11).items():
        tolerance = 4 * torch.finfo(case.dtype).eps * float(expected.max())
        if name == "grad_bias":  # a sum of roundings in `out`
            tolerance *= 4
        assert (felt - expected).abs().max() <= tolerance, name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 4, 130, 170, 32, group=2, dtype=dtype)
    options = {"dropout_p": 0.3, "dropout_seed": 5, "bias": torch.randn(170)}
    expected = run(*inputs, **options)
    torch.set_num_threads(2)
    assert_same_bits(run(*inputs, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_drop_the_same(dtype: torch.dtype) -> None:
    felt = []
    for isa in available_isas():
        with use_isa(isa):
            felt.append({name: t != 0 for name, t in masks_felt((2, 4, 40, 100), 2, dtype, 0.5, 3).items()})
    for other in felt[1:]:
        assert_same_bits(other, felt[0], "out", "grad_value")


def test_torch_seed_reproduces() -> None:
    inputs = make_inputs(2, 4, 30, 50, 16)
    functions = (
        lambda: attn_ext.attention(*inputs, dropout_p=0.5),
        lambda: attn_ext.scaled_dot_product_attention(*inputs, dropout_p=0.5),
    )
    for function in functions:
        torch.manual_seed(3)
        first, second = function(), function()
        torch.manual_seed(3)
        assert torch.equal(function(), first)
        assert torch.equal(function(), second)
        assert not torch.equal(first, second)
        torch.manual_seed(4)
        assert not torch.equal(function(), first)


def test_no_dropout_draws_no_seed() -> None:
    inputs = make_inputs(1, 1, 5, 5, 8)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    attn_ext.attention(*inputs, dropout_p=0.0)
    attn_ext.attention(*inputs, dropout_p=0.5, dropout_seed=1)
    attn_ext.scaled_dot_product_attention(*inputs)
    assert torch.equal(torch.rand(()), expected)


def test_seed_as_a_tensor() -> None:
    inputs = make_inputs(1, 2, 20, 30, 8)
    for seed in (0, -1, 2**63 - 1):
        results = run(*inputs, dropout_p=0.5, dropout_seed=torch.tensor(seed))
        assert_same_bits(results, run(*inputs, dropout_p=0.5, dropout_seed=seed))
        masks = (dropout_mask(s, 0.5, 1, 2, 3, 4) for s in (seed, torch.tensor(seed)))
        assert torch.equal(*masks)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decisions_do_not_depend_on_what_else_is_computed(dtype: torch.dtype) -> None:
    """A head, a row and a batch entry keep their weights in a smaller problem with the same indices."""
    query, key, value = make_inputs(3, 4, 70, 150, 16, dtype=dtype)
    options = {"dropout_p": 0.5, "dropout_seed": 9}
    everything = attn_ext.attention(query, key, value, **options)
    part = attn_ext.attention(query[:2, :3, :33], key[:2, :3], value[:2, :3], **options)
    torch.testing.assert_close(part, everything[:2, :3, :33])
    mask = attn_ext.KeyLengths([90] * 3)
    shorter = attn_ext.attention(query, key[:, :, :90], value[:, :, :90], **options)
    torch.testing.assert_close(shorter, attn_ext.attention(query, key, value, mask=mask, **options))
