"""The attention function that transformers calls, alone, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_ext import Causal, Dense
from attn_ext.integrations import transformers as integration
from attn_ext.integrations.transformers import attention_forward
from attn_ext.reference import attention, attention_weights

BATCH = 2


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def make_qkv(
    length: int, kv_length: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of 4 and 2 heads, with Dk 8 and Dv 6."""
    shapes = (BATCH, 4, length, 8), (BATCH, 2, kv_length, 8), (BATCH, 2, kv_length, 6)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def attend_written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float = 8**-0.5,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and weights as models write them in eager attention; `factors` are those of dropout."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, dim=1).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    dropped = weights if factors is None else weights * factors
    return (dropped @ value.repeat_interleave(group, dim=1)).transpose(1, 2), weights


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("length", "kv_length"), [(7, 7), (1, 7), (4, 7), (1, 1)])
@pytest.mark.parametrize(
    ("of_call", "of_module", "causal"),
    [(None, True, True), (None, False, False), (None, None, True), (False, True, False), (True, False, True)],
)
def test_without_a_mask(
    of_call: bool | None,
    of_module: bool | None,
    causal: bool,
    length: int,
    kv_length: int,
    window: int | None,
) -> None:
    module = torch.nn.Module()
    if of_module is not None:
        module.is_causal = of_module
    query, key, value = make_qkv(length, kv_length)
    causal = causal and length > 1
    position = torch.arange(length).unsqueeze(1) + (0 if causal else kv_length - length)
    distance = position - torch.arange(kv_length)
    visible = torch.ones(length, kv_length, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    out, weights = attention_forward(
        module, query, key, value, None, is_causal=of_call, sliding_window=window, output_attentions=True
    )
    assert_equal(out, attention(query, key, value, mask=visible).transpose(1, 2))
    assert_equal(weights, attention_weights(query, key, mask=visible))


def test_a_mask_overrules_causality_and_window() -> None:
    query, key, value = make_qkv(5, 5)
    mask = torch.rand(1, 1, 5, 5) < 0.7
    module = torch.nn.Module()
    out, weights = attention_forward(module, query, key, value, mask, is_causal=True, sliding_window=2)
    assert weights is None
    assert_equal(out, attention(query, key, value, mask=mask).transpose(1, 2))


@pytest.mark.parametrize(
    ("attention_mask", "is_causal", "expected"),
    [
        (None, True, Causal()),
        (None, False, None),
        (torch.rand(1, 1, 5, 5) < 0.7, True, None),
        (torch.randn(5), True, None),
    ],
    ids=["causal", "full", "bool", "additive"],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_nothing_is_materialised(
    attention_mask: Tensor | None,
    is_causal: bool,
    expected: Causal | None,
    with_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def record(query: Tensor, key: Tensor, value: Tensor, *, mask: Any, bias: Any, **rest: Any) -> Tensor:
        seen.extend((mask, bias))
        return query

    monkeypatch.setattr(integration, "attention", record)
    bias = torch.randn(1, 4, 5, 5) if with_bias else None
    attention_forward(
        torch.nn.Module(), *make_qkv(5, 5), attention_mask, is_causal=is_causal, position_bias=bias
    )
    mask, seen_bias = seen
    assert seen_bias is bias
    if attention_mask is None:
        assert mask == expected
    else:
        assert isinstance(mask, Dense)
        assert mask.tensor is attention_mask


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_position_bias_is_added(mask: str, is_causal: bool) -> None:
    query, key, value = make_qkv(5, 5)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    attention_mask = {
        "none": None,
        "bool": torch.rand(BATCH, 1, 5, 5) < 0.7,
        "additive": torch.randn(BATCH, 1, 5, 5, dtype=torch.float64),
    }[mask]
    expected = bias
    if mask == "bool":
        expected = torch.where(attention_mask, bias, -torch.inf)
    elif mask == "additive":
        expected = bias + attention_mask
    elif is_causal:
        expected = torch.where(torch.ones(5, 5, dtype=torch.bool).tril(), bias, -torch.inf)
    out, _ = attention_forward(
        torch.nn.Module(), query, key, value, attention_mask, is_causal=is_causal, position_bias=bias
    )
    assert_equal(out, attention(query, key, value, mask=expected).transpose(1, 2))


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("bias_shape", [None, (1, 4, 5, 7), (BATCH, 4, 5, 7), (1, 4, 1, 7), (5, 7)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores_and_gradients_equal_the_formula(
    softcap: float | None, with_sinks: bool, bias_shape: tuple[int, ...] | None, mask: str
) -> None:
    leaves = dict(zip(("query", "key", "value"), make_qkv(5, 7), strict=True))
    if with_sinks:
        leaves["s_aux"] = torch.randn(4, dtype=torch.float64)
    if bias_shape is not None:
        leaves["position_bias"] = torch.randn(bias_shape, dtype=torch.float64)
    if mask == "additive":
        leaves["mask"] = torch.randn(BATCH, 1, 5, 7, dtype=torch.float64)
    for leaf in leaves.values():
        leaf.requires_grad_()
    arguments = {**leaves, "scaling": 0.7, "softcap": softcap}
    if mask == "bool":
        arguments["mask"] = (torch.rand(BATCH, 1, 5, 7) < 0.7) | (torch.arange(7) == 2)
    expected = attend_written_out(**arguments)
    arguments["attention_mask"] = arguments.pop("mask", None)
    actual = attention_forward(torch.nn.Module(), **arguments, is_causal=False, output_attentions=True)
    for result, expected_result in zip(actual, expected, strict=True):
        assert_equal(result, expected_result)
        factor = torch.randn_like(result)
        wanted = [leaf for name, leaf in leaves.items() if name != "value" or result is actual[0]]
        gradients = torch.autograd.grad(result, wanted, factor)
        exact = torch.autograd.grad(expected_result, wanted, factor, retain_graph=True)
        for gradient, exact_gradient in zip(gradients, exact, strict=True):
            assert_equal(gradient, exact_gradient)


@pytest.mark.parametrize("window", [None, 2])
def test_scores_without_a_mask_are_causal(window: int | None) -> None:
    query, key, value = make_qkv(5, 5)
    s_aux, bias = torch.randn(4, dtype=torch.float64), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    options = {"softcap": 1.5, "s_aux": s_aux, "position_bias": bias}
    out, weights = attention_forward(
        torch.nn.Module(), query, key, value, None, sliding_window=window, output_attentions=True, **options
    )
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    if window is not None:
        visible &= visible.triu(1 - window)
    expected = attend_written_out(query, key, value, visible, **options)
    assert_equal(out, expected[0])
    assert_equal(weights, expected[1])


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "attention_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_may_have_another_dtype(name: str, dtype: torch.dtype) -> None:
    query, key, value = make_qkv(5, 7, torch.float32)
    added = torch.randn(4 if name == "s_aux" else (1, 4, 5, 7), dtype=dtype, requires_grad=True)
    options = {"attention_mask": None, "is_causal": False, name: added}
    out, _ = attention_forward(torch.nn.Module(), query, key, value, **options)
    exact_added = added.detach().double().requires_grad_()
    name = {"attention_mask": "mask"}.get(name, name)
    expected, _ = attend_written_out(query.double(), key.double(), value.double(), **{name: exact_added})
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    factor = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, added, factor)
    (exact_gradient,) = torch.autograd.grad(expected, exact_added, factor.double())
    assert gradient.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("scores", ["plain", "capped, with sinks and bias"])
def test_dropout_is_that_of_the_weights(scores: str) -> None:
    module, length = torch.nn.Module(), 40
    shapes = (BATCH, 4, length, 8), (BATCH, 2, length, 8), (BATCH, 2, length, 6)
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    options: dict[str, Any] = {}
    if scores != "plain":
        leaves += [torch.randn(shape, dtype=torch.float64) for shape in ((4,), (1, 4, length, length))]
        options = {"softcap": 1.5, "s_aux": leaves[3], "position_bias": leaves[4]}
    for leaf in leaves:
        leaf.requires_grad_()
    query, key, value = leaves[:3]

    def attend(value: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        dropping = {"dropout": 0.25, "is_causal": False, "output_attentions": True}
        return attention_forward(module, query, key, value, None, **dropping, **options)

    identity = torch.eye(length, dtype=torch.float64).expand(BATCH, 2, -1, -1)
    dropped = attend(identity, seed=5)[0].transpose(1, 2)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.75) < 0.02
    assert not torch.equal(attend(identity, seed=6)[0].transpose(1, 2) != 0, kept)

    factors = kept.double() / 0.75
    out, weights = attend(value, seed=5)
    expected, expected_weights = attend_written_out(query, key, value, **options, factors=factors)
    assert_equal(dropped, expected_weights * factors)
    assert_equal(weights, expected_weights)
    assert_equal(out, expected)
    factor = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, factor)
    exact = torch.autograd.grad(expected, leaves, factor)
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        assert_equal(gradient, exact_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_dtype_of_the_query_and_a_gradient(dtype: torch.dtype) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in make_qkv(5, 5, dtype))
    _, weights = attention_forward(torch.nn.Module(), query, key, value, None, output_attentions=True)
    expected = attention_weights(query, key, mask=Causal())
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    factor = torch.randn(weights.shape, dtype=dtype)
    gradients = torch.autograd.grad(weights, (query, key), factor)
    exact = torch.autograd.grad(expected, (query, key), factor.double())
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, exact_gradient, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_what_is_not_implemented_raises(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name} is not implemented in this release"):
        attention_forward(torch.nn.Module(), *make_qkv(5, 5), None, **{name: torch.zeros(1)})


def test_bad_arguments() -> None:
    query, key, value = make_qkv(5, 5)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        attention_forward(module, query, key, value, None, sliding_window=0)
    with pytest.raises(ValueError, match="mask"):
        attention_forward(module, query, key, value, torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="int64"):
        attention_forward(module, query, key, value, torch.ones(5, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="key"):
        attention_forward(module, query, key.float(), value, None)
    with pytest.raises(ValueError, match=r"bias must .* \(2, 4, 5, 5\), got shape \(1, 2, 5, 5\)"):
        attention_forward(module, query, key, value, None, position_bias=torch.zeros(1, 2, 5, 5))
    with pytest.raises(ValueError, match=r"sinks must have shape \(4,\), got shape \(2,\)"):
        attention_forward(module, query, key, value, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match=r"dropout_p must be from 0 to 1, got 1\.5"):
        attention_forward(module, query, key, value, None, dropout=1.5)
