"""What can be said of CUDA tensors without a GPU: shapes of results, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_ext
from attn_ext import _C, _validation
from attn_ext._ops import Options, attention_backward, attention_forward


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had CUDA kernels."""
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": "13.0"})


def inputs(dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    query = torch.empty(2, 5, 4, 16, dtype=dtype, device="cuda").transpose(1, 2)
    return [query, *(torch.empty(2, 2, 7, 16, dtype=dtype, device="cuda") for _ in range(2))]


def check_attention(query: torch.Tensor, *tensors: torch.Tensor, **options: Any) -> None:
    names = "mask", "scale", "bias", "softcap", "alibi_slopes", "sinks", "dropout_p", "dropout_seed"
    values = {**dict.fromkeys(names), "dropout_p": 0.0, **options}
    _validation.check_attention(query, *tensors, *values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results(dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype)
    out, lse = attn_ext.attention(query, key, value, mask=attn_ext.Causal(), softcap=3.0, return_lse=True)
    assert (out.shape, out.dtype, out.device) == (query.shape, dtype, query.device)
    assert out.stride() == query.stride()
    assert (lse.shape, lse.dtype, lse.device) == (query.shape[:3], torch.float32, query.device)
    out = attn_ext.attention(query, key, value)
    assert (out.shape, out.stride(), out.device) == (query.shape, query.stride(), query.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    """Those of the operator: without a GPU, recording a graph of such tensors would abort."""
    query, key, value = inputs(dtype)
    options = Options(
        bias=torch.empty(1, 4, 1, 7, device="cuda"), sinks=torch.empty(4, device="cuda"), scale=0.25
    )
    out, lse, residual = attention_forward(query, key, value, *options)
    results = attention_backward(out, None, query, key, value, out, lse, residual, *options, True, True)
    for result, like in zip(results, (query, key, value, options.bias), strict=False):
        assert (result.shape, result.device) == (like.shape, query.device)
    assert [result.dtype for result in results] == [dtype, dtype, dtype, torch.float32, torch.float64]
    assert results[0].stride() == query.stride()


def test_an_extension_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": None})
    message = "query is on cuda:0, and attn_ext was built without CUDA: .* ATTN_EXT_CUDA=1"
    with pytest.raises(NotImplementedError, match=message):
        check_attention(*inputs())
    lengths = torch.empty(2, dtype=torch.int32, device="cuda")
    for reason in (
        attn_ext.why_unsupported(*inputs()),
        attn_ext.why_unsupported(*inputs(), lengths, function=attn_ext.attention_decode),
    ):
        assert re.match(message, reason)


@pytest.mark.usefixtures("with_cuda")
def test_tensors_of_another_device_are_refused() -> None:
    query, key, value = inputs()
    with pytest.raises(ValueError, match="value must be on the device of query, cuda:0, got cpu"):
        check_attention(query, key, torch.empty(2, 2, 7, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="sinks must be on the device of query, cuda:0, got cpu"):
        check_attention(query, key, value, sinks=torch.empty(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding(dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype)
    lengths = torch.empty(2, dtype=torch.int32, device="cuda")
    out, lse = attn_ext.attention_decode(query, key, value, lengths, window=(0, 0), return_lse=True)
    assert (out.shape, out.stride(), out.device) == (query.shape, query.stride(), query.device)
    assert (lse.shape, lse.dtype, lse.device) == (query.shape[:3], torch.float32, query.device)


@pytest.mark.usefixtures("with_cuda")
def test_decoding_that_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_seqlens must be on the device of query, cuda:0, got cpu"):
        attn_ext.attention_decode(*inputs(), torch.empty(2, dtype=torch.int32))


def test_lengths_of_packed_sequences_are_not_waited_for() -> None:
    tokens = torch.empty(7, 2, 16, device="cuda")
    lengths = torch.empty(3, dtype=torch.int32, device="cuda")
    mask = attn_ext.Causal()
    _validation.check_lengths(tokens, tokens, lengths, lengths, 7, 7, mask)
