"""The judges are judged: the reference against PyTorch, the tolerance helper against wrong results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import DTYPES, make_inputs
from torch.nn import functional as F

import attn_ext
from attn_ext import reference, testing


@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("group", [1, 3])
def test_reference_agrees_with_torch(kind: str, group: int) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(2, 6, 9, 13, 8, group=group, dtype=torch.float64)]
    mask = {"boolean": torch.rand(2, 1, 9, 13) < 0.8, "additive": torch.randn(6, 9, 13).double()}.get(kind)
    call = {"attn_mask": mask, "is_causal": kind == "causal", "scale": 0.3, "enable_gqa": group > 1}
    expected = F.scaled_dot_product_attention(*inputs, **call)
    actual = reference.scaled_dot_product_attention(*inputs, **call)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, inputs, grad) for out in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)
    mask = attn_ext.Causal(align="top_left") if kind == "causal" else mask
    torch.testing.assert_close(reference.attention(*inputs, mask=mask, scale=0.3), expected)


def test_reference_lse_and_weights() -> None:
    query, key, value = make_inputs(1, 4, 5, 7, 8, group=2)
    out, lse = reference.attention(query, key, value, return_lse=True)
    weights = reference.attention_weights(query, key)
    scores = query.double() @ key.double().repeat_interleave(2, dim=1).mT / math.sqrt(8)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(out, weights @ value.double().repeat_interleave(2, dim=1))


@pytest.mark.parametrize("poison", [False, True])
def test_reference_of_hidden_keys_and_dead_rows(poison: bool) -> None:
    query, key, value = make_inputs(1, 1, 6, 6, 4, dtype=torch.float64)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, lse = reference.attention(*leaves, mask=allowed, return_lse=True)
    live = torch.where(lse == -math.inf, 0, lse)
    clean = (out, lse, *torch.autograd.grad(out[:, :, :3].sum() + live[:, :, :3].sum(), leaves))
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == -math.inf).all()
    assert (clean[2][:, :, 0] == 0).all()
    if poison:
        with torch.no_grad():
            key[:, :, 3], value[:, :, 4] = math.nan, math.inf
        out, lse = reference.attention(*leaves, mask=allowed, return_lse=True)
        (grad_query,) = torch.autograd.grad(out[:, :, :4].sum(), leaves[:1])
        torch.testing.assert_close(out[:, :, :4], clean[0][:, :, :4])
        assert out[:, :, 4:].isnan().all()
        assert grad_query[:, :, :4].isfinite().all()


def test_reference_has_no_dropout() -> None:
    with pytest.raises(NotImplementedError, match="dropout"):
        reference.scaled_dot_product_attention(*make_inputs(), dropout_p=0.1)


WRONG = {
    "scale": lambda q, k, v, **call: {**call, "scale": 1.05 / math.sqrt(q.size(-1))},
    "mask": lambda q, k, v, **call: {**call, "mask": attn_ext.Causal(align="top_left")},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_arguments_are_noticed(monkeypatch, mistake: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, 40, 60, 32, dtype=dtype)
    mask = attn_ext.Causal(align="bottom_right")
    testing.check_attention(*inputs, mask=mask)
    right = attn_ext.attention
    monkeypatch.setattr(attn_ext, "attention", lambda *a, **call: right(*a, **WRONG[mistake](*a, **call)))
    with pytest.raises(AssertionError, match="out"):
        testing.check_attention(*inputs, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", range(3))
def test_a_gradient_off_by_five_percent_is_noticed(monkeypatch, wrong: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 2, 40, 60, 32, dtype=dtype)
    right = attn_ext.attention

    def scaled_gradient(*tensors, **call):
        tensors = list(tensors)
        tensors[wrong] = tensors[wrong] * 1.0
        tensors[wrong].register_hook(lambda grad: grad * 1.05)
        return right(*tensors, **call)

    monkeypatch.setattr(attn_ext, "attention", scaled_gradient)
    with pytest.raises(AssertionError, match=("grad_query", "grad_key", "grad_value")[wrong]):
        testing.check_attention(*inputs)


def every_option(dtype: torch.dtype) -> dict[str, Any]:
    """Options for 4 heads, 40 queries and 60 keys."""
    return {
        "mask": attn_ext.Dense(torch.randn(4, 40, 60).to(dtype).requires_grad_()),
        "bias": torch.randn(2, 1, 1, 60),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(4) / 8,
        "sinks": torch.randn(4),
        "dropout_p": 0.2,
        "dropout_seed": 1,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mistake",
    [
        {"mask": None},
        {"bias": None},
        {"softcap": 2.2},
        {"softcap": None},
        {"alibi_slopes": None},
        {"sinks": None},
        {"dropout_p": 0.3},
        {"dropout_seed": 2},
    ],
    ids=str,
)
def test_wrong_options_are_noticed(monkeypatch, mistake: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, options = make_inputs(2, 4, 40, 60, 32, group=2, dtype=dtype), every_option(dtype)
    testing.check_attention(*inputs, **options)
    right = attn_ext.attention
    monkeypatch.setattr(attn_ext, "attention", lambda *a, **call: right(*a, **{**call, **mistake}))
    with pytest.raises(AssertionError, match="out"):
        testing.check_attention(*inputs, **options, grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", ["query", "key", "value", "mask", "bias", "sinks"])
def test_a_gradient_off_by_five_percent_is_noticed_with_every_option(
    monkeypatch, wrong: str, dtype: torch.dtype
) -> None:
    inputs, options = make_inputs(2, 4, 40, 60, 32, group=2, dtype=dtype), every_option(dtype)
    right = attn_ext.attention

    def scaled(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor * 1.0
        tensor.register_hook(lambda grad: grad * 1.05)
        return tensor

    def scaled_gradient(*tensors, **call):
        tensors = dict(zip(("query", "key", "value"), tensors, strict=True))
        if wrong == "mask":
            call["mask"] = attn_ext.Dense(scaled(call["mask"].tensor))
        else:
            where = tensors if wrong in tensors else call
            where[wrong] = scaled(where[wrong])
        return right(*tensors.values(), **call)

    monkeypatch.setattr(attn_ext, "attention", scaled_gradient)
    with pytest.raises(AssertionError, match=f"grad_{wrong}"):
        testing.check_attention(*inputs, **options)


def test_rule_grants_no_tolerance_where_plain_overflows() -> None:
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.0, math.inf], dtype=torch.float16)
    testing.assert_within_rule(expected.half(), expected, plain, 2.0)
    with pytest.raises(AssertionError, match="worst at \\(1,\\)"):
        testing.assert_within_rule(torch.tensor([1.0, 2.1]).half(), expected, plain, 2.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_rule_notices_what_is_not_finite(wrong: float) -> None:
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        testing.assert_within_rule(torch.tensor([1.0, wrong]), expected, expected.float(), 2.0)


def test_rule_wants_infinities_in_their_places() -> None:
    expected = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    testing.assert_within_rule(expected.float(), expected, expected.float(), 2.0)
    with pytest.raises(AssertionError, match="not infinite"):
        testing.assert_within_rule(torch.tensor([1.0, -1e30]), expected, expected.float(), 2.0)


def test_isas() -> None:
    names = testing.available_isas()
    assert names[0] == "baseline"
    current = attn_ext._C.isa_current()
    for name in names:
        with testing.use_isa(name):
            assert attn_ext._C.isa_current() == name
    assert attn_ext._C.isa_current() == current
    with pytest.raises(ValueError, match="abacus"), testing.use_isa("abacus"):
        pass
    with pytest.raises(RuntimeError), testing.use_isa("baseline"):
        raise RuntimeError
    assert attn_ext._C.isa_current() == current
