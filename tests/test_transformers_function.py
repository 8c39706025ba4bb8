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

    def record(query: Tensor, key: Tensor, value: Tensor, *, mask: Any, scale: float | None) -> Tensor:
        seen.append(mask)
        return query

    monkeypatch.setattr(integration, "attention", record)
    bias = torch.randn(1, 4, 5, 5) if with_bias else None
    attention_forward(
        torch.nn.Module(), *make_qkv(5, 5), attention_mask, is_causal=is_causal, position_bias=bias
    )
    parts = () if seen[0] is None else seen[0].parts
    dense = [part.tensor for part in parts if isinstance(part, Dense)]
    given = [tensor for tensor in (attention_mask, bias) if tensor is not None]
    assert len(dense) == len(given)
    assert all(tensor is given_tensor for tensor, given_tensor in zip(dense, given, strict=True))
    assert [part for part in parts if not isinstance(part, Dense)] == ([] if expected is None else [expected])


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


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"indices": torch.zeros(1)},
        {"block_indices": torch.zeros(1)},
        {"position_bias": torch.zeros(1, 4, 5, 5, requires_grad=True)},
        {"attention_mask": torch.zeros(5, 5, requires_grad=True)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_implemented_raises(options: dict[str, Any]) -> None:
    options = {"attention_mask": None, **options}
    with pytest.raises(NotImplementedError, match=f"{list(options)[-1]}.* not implemented in this release"):
        attention_forward(torch.nn.Module(), *make_qkv(5, 5), **options)


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
