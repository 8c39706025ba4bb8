"""Random shapes, strides and masks, drawn by hypothesis, and laws that attention obeys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import DTYPES, make_inputs
from torch import Tensor

import attn_ext
from attn_ext.testing import check_attention

pytestmark = pytest.mark.usefixtures("isa")

# The instruction set stays the same through the examples of a test: one fixture serves them all.
bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

lengths = st.integers(0, 140)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each with an order of dimensions and an offset of its own."""
    group = draw(st.integers(1, 4))
    kv_heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    tensors = make_inputs(
        batch,
        kv_heads * group,
        draw(lengths),
        draw(lengths),
        draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        group=group,
        dtype=draw(st.sampled_from(DTYPES)),
    )
    return tuple(rearrange(t, draw(st.permutations(range(4))), draw(st.integers(0, 3))) for t in tensors)


def rearrange(tensor: Tensor, order: list[int], offset: int) -> Tensor:
    """The same tensor, its dimensions in memory in this order, `offset` elements into a longer last one."""
    padded = torch.nn.functional.pad(tensor.permute(order).contiguous(), (offset, 1))
    inverse = sorted(range(4), key=order.__getitem__)
    return padded[..., offset : offset + tensor.size(order[-1])].permute(inverse)


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, query_len: int, kv_len: int) -> object:
    """None, or up to three mask objects combined."""
    parts = []
    if draw(st.booleans()):
        parts.append(attn_ext.Causal(align=draw(st.sampled_from(("top_left", "bottom_right")))))
    if draw(st.booleans()):
        parts.append(attn_ext.KeyLengths(torch.tensor([draw(st.integers(0, kv_len)) for _ in range(batch)])))
    if draw(st.booleans()):
        shape = tuple(n if draw(st.booleans()) else 1 for n in (batch, heads, query_len, kv_len))
        dense = torch.randn(shape)
        dense = dense > -0.5 if draw(st.booleans()) else dense.masked_fill(dense < -1, -torch.inf)
        parts.append(attn_ext.Dense(dense))
    if not parts:
        return None
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask


@bounded
@given(st.data())
def test_any_problem(data: st.DataObject) -> None:
    query, key, value = data.draw(inputs())
    mask = data.draw(masks(*query.shape[:3], key.size(2)))
    scale = data.draw(st.sampled_from((None, 0.0, -0.5, 1.0)))
    check_attention(query, key, value, mask=mask, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_keys_does_not_matter(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 2, 30, 150, 16, dtype=dtype)
    order = torch.randperm(150)
    shuffled = attn_ext.attention(query, key[:, :, order], value[:, :, order])
    torch.testing.assert_close(shuffled, attn_ext.attention(query, key, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_queries_does_not_matter(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 2, 70, 150, 16, dtype=dtype)
    order = torch.randperm(70)
    shuffled = attn_ext.attention(query[:, :, order], key, value)
    assert torch.equal(shuffled, attn_ext.attention(query, key, value)[:, :, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [1, 50, 97])
def test_parts_merge_by_lse(dtype: torch.dtype, cut: int) -> None:
    """Attention to all keys is the mean of attention to two parts of them, weighted by exp(lse)."""
    query, key, value = make_inputs(1, 2, 30, 150, 16, dtype=dtype)
    whole, lse = attn_ext.attention(query, key, value, return_lse=True)
    first, first_lse = attn_ext.attention(query, key[:, :, :cut], value[:, :, :cut], return_lse=True)
    last, last_lse = attn_ext.attention(query, key[:, :, cut:], value[:, :, cut:], return_lse=True)
    torch.testing.assert_close(lse, torch.logaddexp(first_lse, last_lse))
    weight = torch.exp(first_lse - lse).unsqueeze(-1)
    torch.testing.assert_close(whole, weight * first + (1 - weight) * last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_heads_equal_repeated_heads(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(2, 6, 30, 70, 16, group=3, dtype=dtype)
    repeated = attn_ext.attention(query, *(t.repeat_interleave(3, dim=1) for t in (key, value)))
    torch.testing.assert_close(attn_ext.attention(query, key, value), repeated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adding_the_same_to_every_key_shifts_only_lse(dtype: torch.dtype) -> None:
    query, key, value = make_inputs(1, 2, 30, 150, 16, dtype=dtype)
    shift = torch.randn(1, 1, 1, 16, dtype=dtype)
    out, lse = attn_ext.attention(query, key, value, return_lse=True)
    shifted_out, shifted_lse = attn_ext.attention(query, key + shift, value, return_lse=True)
    torch.testing.assert_close(shifted_out, out)
    torch.testing.assert_close(shifted_lse, lse + (query * shift).sum(-1) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 40])
def test_tiles_long_ago_weigh_no_more_than_the_last(dtype: torch.dtype, rows: int) -> None:
    length = 16384
    query, key = torch.zeros(1, 1, rows, 4, dtype=dtype), torch.randn(1, 1, length, 4, dtype=dtype)
    value = (torch.arange(length) < length // 2).to(dtype).view(1, 1, length, 1)
    check_attention(query, key, value, grad=False)
