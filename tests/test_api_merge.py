"""`merge`: attention over parts of the keys adds up to attention over all of them."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import pytest
import torch
from problems import make_inputs
from torch import Tensor

import attn_ext

B, H, LQ, LK, D = 2, 4, 5, 12, 8
SPLITS = {"two": (0, 7, LK), "three": (0, 1, 6, LK), "an empty part": (0, 0, 5, LK), "one whole": (0, LK, LK)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_a, out_b = (torch.randn(B, H, LQ, D, dtype=dtype) for _ in range(2))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    lse_a, lse_b = (torch.randn(B, H, LQ, dtype=statistics) for _ in range(2))
    return out_a, lse_a, out_b, lse_b


def merge_all(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return reduce(lambda a, b: attn_ext.merge(*a, *b), states)


def attend_in_parts(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    states = []
    for begin, end in pairwise(bounds):
        mask = None if allowed is None else attn_ext.Dense(allowed[..., begin:end])
        keys, values = key[:, :, begin:end], value[:, :, begin:end]
        states.append(attn_ext.attention(query, keys, values, mask=mask, return_lse=True))
    return merge_all(states)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", SPLITS.values(), ids=SPLITS)
def test_parts_add_up(bounds, masked):
    """Output, lse and all gradients; a masked row has no keys in one part, and another none in any."""
    inputs = [x.requires_grad_() for x in make_inputs(B, H, LQ, LK, D, group=2, dtype=torch.float64)]
    allowed = None
    if masked:
        allowed = torch.rand(LQ, LK) < 0.7
        allowed[0], allowed[1, :7], allowed[2, 7:] = False, False, False
    mask = None if allowed is None else attn_ext.Dense(allowed)
    expected = attn_ext.attention(*inputs, mask=mask, return_lse=True)
    actual = attend_in_parts(*inputs, bounds, allowed)
    torch.testing.assert_close(actual, expected)
    grads = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grads), torch.autograd.grad(expected, inputs, grads)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_every_dtype(dtype):
    inputs = make_inputs(B, H, LQ, LK, D, dtype=dtype)
    out, lse = attend_in_parts(*inputs, SPLITS["three"], None)
    expected, expected_lse = attn_ext.attention(*inputs, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == expected_lse.dtype
    rounding = torch.finfo(dtype).eps * float(inputs[2].abs().max())  # once for each part and each result
    torch.testing.assert_close(out, expected, atol=4 * rounding, rtol=0)
    if dtype.itemsize > 2:
        torch.testing.assert_close(lse, expected_lse)
    else:  # weights may be exact to their dtype only
        torch.testing.assert_close(lse, expected_lse, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_gradients():
    arguments = [x[:1, :1].clone().requires_grad_() for x in parts()]
    assert torch.autograd.gradcheck(attn_ext.merge, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attn_ext.merge, arguments)


@pytest.mark.parametrize("empty", ["a", "b"])
def test_an_empty_part_changes_nothing(empty):
    out, lse, other, other_lse = parts(torch.float32)
    state, nothing = (out, lse), (torch.zeros_like(other), torch.full_like(other_lse, -torch.inf))
    states = (nothing, state) if empty == "a" else (state, nothing)
    arguments = [x.requires_grad_() for pair in states for x in pair]
    results = attn_ext.merge(*arguments)
    assert torch.equal(results[0], out)
    assert torch.equal(results[1], lse)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad(results, arguments, (grad_out, grad_lse))
    (grad_a, grad_lse_a), (grad_b, grad_lse_b) = grads[:2], grads[2:]
    if empty == "a":
        (grad_a, grad_lse_a), (grad_b, grad_lse_b) = (grad_b, grad_lse_b), (grad_a, grad_lse_a)
    assert torch.equal(grad_a, grad_out)
    torch.testing.assert_close(grad_lse_a, grad_lse)
    assert not grad_b.any()
    assert not grad_lse_b.any()


def test_dead_rows():
    arguments = [torch.zeros(B, H, LQ, D), torch.full((B, H, LQ), -torch.inf)] * 2
    arguments = [x.clone().requires_grad_() for x in arguments]
    out, lse = attn_ext.merge(*arguments)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad in torch.autograd.grad((out, lse), arguments, (torch.randn(out.shape), torch.randn(lse.shape))):
        assert not grad.any()


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_large_lse(size):
    out_a, lse_a, out_b, lse_b = parts(torch.float32)
    lse_a, lse_b = lse_a.sign() + size, lse_b.sign() + size
    out, lse = attn_ext.merge(out_a, lse_a, out_b, lse_b)
    expected = attn_ext.merge(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    torch.testing.assert_close(out.double(), expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), expected[1])
    lse_a = lse_a + abs(size)
    assert torch.equal(attn_ext.merge(out_a, lse_a, out_b, lse_b)[0], out_a)


def test_order_and_grouping_do_not_matter():
    a, b = parts()[:2], parts()[:2]
    c = parts()[:2]
    left = attn_ext.merge(*attn_ext.merge(*a, *b), *c)
    torch.testing.assert_close(attn_ext.merge(*a, *attn_ext.merge(*b, *c)), left)
    torch.testing.assert_close(merge_all([c, a, b]), left)


def test_dtypes():
    """out has that of out_a, and one float64 argument makes all of it float64."""
    out_a, lse_a, out_b, lse_b = parts(torch.float32)
    out, lse = attn_ext.merge(out_a.bfloat16(), lse_a, out_b, lse_b)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out, lse = attn_ext.merge(out_a, lse_a, out_b, lse_b.double())
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float64)


def test_memory_order_is_that_of_the_first():
    out_a, lse_a, out_b, lse_b = parts(torch.float32)
    out_a = out_a.transpose(1, 2).contiguous().transpose(1, 2)
    assert attn_ext.merge(out_a, lse_a, out_b, lse_b)[0].stride() == out_a.stride()


def test_nan_stays_in_its_row():
    out_a, lse_a, out_b, lse_b = parts()
    lse_a[0, 1, 2] = torch.nan
    out, lse = attn_ext.merge(out_a, lse_a, out_b, lse_b)
    assert out[0, 1, 2].isnan().all()
    assert lse[0, 1, 2].isnan()
    assert out.isnan().sum() == D
    assert lse.isnan().sum() == 1


def test_vmap_and_compile():
    arguments = parts()
    expected = attn_ext.merge(*arguments)
    stacked = [torch.stack([x, 2 * x]) for x in arguments]
    mapped = torch.vmap(attn_ext.merge)(*stacked)
    torch.testing.assert_close([x[0] for x in mapped], list(expected))
    compiled = torch.compile(attn_ext.merge, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected)


NAMES = ("out_a", "lse_a", "out_b", "lse_b")


@pytest.mark.parametrize("index", range(4), ids=NAMES)
@pytest.mark.parametrize("bad", [None, 1.0, "complex", "half lse"])
def test_bad_types(index, bad):
    arguments = list(parts(torch.float32))
    if bad == "complex":
        arguments[index] = arguments[index].to(torch.complex64)
    elif bad == "half lse":
        arguments[index] = arguments[index].to(torch.float16 if index % 2 else torch.int32)
    else:
        arguments[index] = bad
    with pytest.raises(TypeError, match=f"{NAMES[index]} must be"):
        attn_ext.merge(*arguments)


@pytest.mark.parametrize("index", range(4), ids=NAMES)
@pytest.mark.parametrize(
    "change", [lambda x: x[0], lambda x: x[:1], lambda x: x[:, :, :1], lambda x: x[None]]
)
def test_bad_shapes(index, change):
    arguments = list(parts())
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=r"must be .*got shape \("):
        attn_ext.merge(*arguments)


@pytest.mark.parametrize("index", range(1, 4), ids=NAMES[1:])
def test_bad_devices(index):
    arguments = list(parts())
    arguments[index] = arguments[index].to("meta")
    with pytest.raises(ValueError, match=f"{NAMES[index]} must be on the device of out_a, cpu, got meta"):
        attn_ext.merge(*arguments)
