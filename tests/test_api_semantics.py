"""The public functions mean what torch's mean: shapes, broadcasting, masks, scale, heads, memory order."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attn_ext
from attn_ext import Causal, Dense, KeyLengths
from attn_ext.testing import assert_within_rule

# (query, key, value) without and with enable_gqa.
SHAPES = {
    "2-D": ((3, 4), (5, 4), (5, 6)),
    "3-D": ((2, 3, 4), (2, 5, 4), (2, 5, 6)),
    "4-D": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    "5-D": ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 4)),
    "6-D": ((2, 1, 3, 2, 5, 4), (2, 1, 3, 2, 7, 4), (2, 1, 3, 2, 7, 4)),
    "equal": ((2, 3, 5, 4),) * 3,
    "ranks 3, 3, 2": ((2, 3, 4), (1, 5, 4), (5, 6)),
    "ranks 4, 3, 2": ((2, 3, 3, 4), (3, 5, 4), (5, 6)),
    "ranks 2, 4, 4": ((3, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
    "ranks 5, 4, 3": ((7, 2, 3, 3, 4), (2, 3, 5, 4), (1, 5, 6)),
    "query batch": ((1, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
    "key batch": ((2, 3, 3, 4), (1, 3, 5, 4), (2, 3, 5, 6)),
    "mixed batch": ((2, 1, 3, 3, 4), (1, 4, 3, 5, 4), (2, 4, 3, 5, 6)),
    "query heads": ((2, 1, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
    "key heads": ((2, 3, 3, 4), (2, 1, 5, 4), (2, 3, 5, 6)),
    "key and value heads": ((2, 3, 3, 4), (2, 1, 5, 4), (2, 1, 5, 6)),
    "no queries": ((2, 3, 0, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
    "no batch": ((0, 3, 2, 4), (0, 3, 5, 4), (0, 3, 5, 6)),
    "no batch, 5-D": ((2, 0, 3, 2, 4), (2, 0, 3, 5, 4), (2, 0, 3, 5, 6)),
    "no heads": ((2, 0, 2, 4), (2, 0, 5, 4), (2, 0, 5, 6)),
}
GQA_SHAPES = {
    "4-D": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)),
    "multi-query": ((2, 4, 3, 4), (2, 1, 5, 4), (2, 1, 5, 6)),
    "no group": ((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6)),
    "3-D": ((4, 3, 4), (2, 5, 4), (2, 5, 6)),
    "5-D": ((3, 2, 4, 3, 4), (3, 2, 2, 5, 4), (3, 2, 2, 5, 6)),
    "batch": ((2, 4, 3, 4), (1, 2, 5, 4), (2, 2, 5, 6)),
    "key and value differ": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 1, 5, 6)),
}


def inputs(*shapes: tuple[int, ...], requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes]


def assert_same_as_torch(shapes: tuple, **kwargs) -> None:
    """Output, its shape, and gradients."""
    tensors = inputs(*shapes, requires_grad=True)
    actual = attn_ext.scaled_dot_product_attention(*tensors, **kwargs)
    expected = F.scaled_dot_product_attention(*tensors, **kwargs)
    torch.testing.assert_close(actual, expected)
    grad_out = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, grad_out), torch.autograd.grad(expected, tensors, grad_out)
    )


def test_signature_is_torchs():
    """As documented; torch's own, in C++, has scale and enable_gqa by keyword only."""
    signature = inspect.signature(attn_ext.scaled_dot_product_attention)
    names_and_defaults = {name: p.default for name, p in signature.parameters.items()}
    assert names_and_defaults == {
        "query": inspect.Parameter.empty,
        "key": inspect.Parameter.empty,
        "value": inspect.Parameter.empty,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    query, key, value = inputs(*SHAPES["4-D"])
    torch.testing.assert_close(
        attn_ext.scaled_dot_product_attention(query, key, value, None, 0.0, True, 0.5, False),
        F.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=0.5, enable_gqa=False),
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, is_causal):
    assert_same_as_torch(shapes, is_causal=is_causal)


@pytest.mark.parametrize("shapes", GQA_SHAPES.values(), ids=GQA_SHAPES)
def test_grouped_heads(shapes):
    assert_same_as_torch(shapes, enable_gqa=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 3, True])
def test_scale(scale):
    assert_same_as_torch(SHAPES["4-D"], scale=scale)


@pytest.mark.parametrize(("query_len", "kv_len"), [(3, 7), (7, 3), (5, 5), (1, 6), (6, 1)])
def test_is_causal_is_aligned_top_left(query_len, kv_len):
    assert_same_as_torch(((2, 2, query_len, 4), (2, 2, kv_len, 4), (2, 2, kv_len, 4)), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize(
    "mask_shape",
    [
        *((5, 7), (1, 7), (5, 1), (1, 1), (3, 5, 7), (1, 5, 7), (3, 1, 7)),
        *((2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 5, 7), (2, 1, 1, 7), (1, 1, 5, 1), (2, 3, 1, 1), (1, 1, 1, 1)),
    ],
)
def test_mask_shapes(mask_shape, dtype):
    mask = torch.rand(mask_shape) > 0.3 if dtype == torch.bool else torch.randn(mask_shape, dtype=dtype)
    assert_same_as_torch(SHAPES["4-D"], attn_mask=mask)


@pytest.mark.parametrize(
    ("shapes", "mask_shape"),
    [
        ("2-D", (3, 5)),
        ("3-D", (3, 5)),
        ("3-D", (2, 3, 5)),
        ("5-D", (5, 7)),
        ("5-D", (2, 3, 2, 5, 7)),
        ("5-D", (2, 1, 1, 5, 7)),
        ("5-D", (1, 3, 1, 1, 7)),
        ("mixed batch", (2, 1, 1, 3, 5)),
        ("mixed batch", (4, 1, 3, 5)),
        ("key batch", (2, 3, 3, 5)),
        ("ranks 5, 4, 3", (7, 1, 3, 1, 5)),
        ("query heads", (2, 3, 3, 5)),
    ],
)
def test_masks_of_any_rank(shapes, mask_shape):
    assert_same_as_torch(SHAPES[shapes], attn_mask=torch.rand(mask_shape) > 0.3)


def test_a_mask_of_one_dimension_is_one_of_keys():
    """torch raises IndexError."""
    query, key, value = inputs(*SHAPES["4-D"])
    mask = torch.tensor([True, False, True, True, False, True, False])
    torch.testing.assert_close(
        attn_ext.scaled_dot_product_attention(query, key, value, mask),
        F.scaled_dot_product_attention(query, key, value, mask[None]),
    )


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_mask_may_have_any_float_dtype(dtype, mask_dtype):
    """torch takes only the dtype of query, and float32."""
    query, key, value = (tensor.to(dtype) for tensor in inputs(*SHAPES["4-D"]))
    mask = torch.tensor([0.0, 1.5, -2.0, -torch.inf, 0.25, 4.0, 0.0], dtype=mask_dtype)
    actual = attn_ext.scaled_dot_product_attention(query, key, value, mask)
    exact, plain = (
        F.scaled_dot_product_attention(*(tensor.to(of) for tensor in (query, key, value, mask[None])))
        for of in (torch.float64, dtype)
    )
    if dtype.itemsize > 2:
        torch.testing.assert_close(actual, plain)
    else:  # rounded in another place than torch's
        assert_within_rule(actual, exact, plain, 2.0)


def test_rows_with_nothing_to_attend_to():
    query, key, value = inputs(*SHAPES["4-D"], requires_grad=True)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out, lse = attn_ext.attention(query, key, value, mask=Dense(mask), return_lse=True)
    assert out[:, :, 2].eq(0).all()
    assert lse[:, :, 2].eq(-torch.inf).all()
    (out.sum() + lse[:, :, 3].sum()).backward()
    assert query.grad[:, :, 2].eq(0).all()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))


def test_no_keys():
    query, key, value = inputs((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 6), requires_grad=True)
    out, lse = attn_ext.attention(query, key, value, return_lse=True)
    assert out.shape == (2, 3, 5, 6)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    out.sum().backward()
    assert query.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_of_the_results(dtype):
    tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs(*SHAPES["4-D"])]
    out, lse = attn_ext.attention(*tensors, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.sum().backward()
    assert all(tensor.grad.dtype == dtype for tensor in tensors)


def test_lse_is_the_logarithm_of_the_sum():
    query, key, value = inputs(*SHAPES["4-D"], requires_grad=True)
    _, lse = attn_ext.attention(query, key, value, scale=0.3, return_lse=True)
    expected = torch.logsumexp(query @ key.mT * 0.3, dim=-1)
    torch.testing.assert_close(lse, expected)
    weights = torch.randn_like(lse)
    torch.testing.assert_close(
        torch.autograd.grad(lse, (query, key), weights), torch.autograd.grad(expected, (query, key), weights)
    )


def test_attention_takes_groups_of_heads_as_they_come():
    query, key, value = inputs(*GQA_SHAPES["4-D"])
    torch.testing.assert_close(
        attn_ext.attention(query, key, value),
        F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
    )


@pytest.mark.parametrize("function", [attn_ext.attention, attn_ext.scaled_dot_product_attention])
def test_results_have_the_memory_order_of_the_inputs(function):
    """(B, L, H, D) transposed to (B, H, L, D) comes back without a copy."""
    tensors = [torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_() for _ in range(3)]
    out = function(*tensors)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)
    assert function(*(tensor.detach().contiguous() for tensor in tensors)).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 1, 7), (5, 7), (1, 1, 2, 1, 7)])
def test_masks_are_not_expanded(mask_shape, dtype, monkeypatch):
    """Heads, rows and columns of size 1 reach the operator as such; so does the batch, if all of it is 1."""
    seen = []

    def attend_output(query, key, value, bias, mask, *rest):
        seen.append(mask if bias is None else bias)
        return torch.ops.attn_ext.attention_output(query, key, value, bias, mask, *rest)

    monkeypatch.setattr(attn_ext.functional, "attend_output", attend_output)
    attn_ext.scaled_dot_product_attention(*inputs(*SHAPES["5-D"]), torch.ones(mask_shape, dtype=dtype))
    (mask,) = seen
    assert mask.dtype == dtype
    assert mask.dim() == 4
    assert mask.shape[1:] == (1, *mask_shape)[-3:]
    assert mask.shape[0] == (6 if mask_shape[0] == 2 else 1)


def test_leading_dimensions_are_views(monkeypatch):
    pointers = []

    def attend_output(query, key, value, *rest):
        pointers.extend(tensor.data_ptr() for tensor in (query, key, value))
        return torch.ops.attn_ext.attention_output(query, key, value, *rest)

    monkeypatch.setattr(attn_ext.functional, "attend_output", attend_output)
    for shapes in ("2-D", "3-D", "5-D", "query batch", "query heads", "key heads"):
        tensors = inputs(*SHAPES[shapes])
        pointers.clear()
        attn_ext.scaled_dot_product_attention(*tensors)
        assert pointers == [tensor.data_ptr() for tensor in tensors], shapes


def test_negated_views_are_resolved():
    """The imaginary part of a conjugate is a real tensor that only remembers to be negated."""
    query = torch.randn(1, 2, 3, 4, dtype=torch.complex128).conj().imag
    assert query.is_neg()
    torch.testing.assert_close(
        attn_ext.scaled_dot_product_attention(query, query, query),
        F.scaled_dot_product_attention(query, query, query),
    )


def test_meta_tensors():
    query, key, value = (tensor.to("meta") for tensor in inputs(*SHAPES["4-D"]))
    out = attn_ext.attention(query, key, value, mask=Causal() & KeyLengths(torch.empty(2, dtype=torch.int64)))
    assert out.shape == (2, 3, 5, 6)
    assert out.device.type == "meta"


def test_subclasses_of_tensor_keep_their_type():
    class Tagged(Tensor):
        pass

    query, key, value = inputs(*SHAPES["4-D"])
    assert type(attn_ext.scaled_dot_product_attention(query.as_subclass(Tagged), key, value)) is Tagged


def test_package_surface():
    assert set(attn_ext.__all__) <= set(dir(attn_ext))
    assert {"nn", "reference", "testing"} <= set(dir(attn_ext))
    assert attn_ext.reference.attention is not attn_ext.attention
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = attn_ext.no_such_name
