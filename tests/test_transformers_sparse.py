"""The sparse attention of transformers, on random weights: Longformer's and BigBird's modules, and ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import KeyLengths, patterns

pytest.importorskip("transformers")
from transformers.models.big_bird import modeling_big_bird
from transformers.models.longformer import modeling_longformer

HEADS, HEAD_DIM = 4, 16
WIDTH = HEADS * HEAD_DIM


def split_heads(tensor: Tensor) -> Tensor:
    """(B, L, H * D) -> (B, H, L, D)."""
    return tensor.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)


def join_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """Of two computations in float32, each of which sums fewer than 200 products of numbers of size 1."""
    assert (actual - expected).abs().max() <= 200 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("tokens", [[], [0], [0, 20, 63, 111]])
@pytest.mark.parametrize("lengths", [[128, 128], [128, 117]])
def test_longformer(tokens: list[int], lengths: list[int]) -> None:
    """With padding, and the projections of their own that its global tokens have."""
    window, length = 16, 128
    config = modeling_longformer.LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    module = modeling_longformer.LongformerSelfAttention(config, layer_id=0)
    hidden = torch.randn(2, length, WIDTH, requires_grad=True)
    padded = torch.arange(length) >= torch.tensor(lengths).unsqueeze(1)
    kind = torch.zeros(2, length).masked_fill(padded, -10000.0)
    kind[:, tokens] = 10000.0
    (expected,) = module(
        hidden,
        attention_mask=kind,
        is_index_masked=padded,
        is_index_global_attn=kind > 0,
        is_global_attn=bool(tokens),
    )[:1]

    mask = patterns.longformer(length, window, tokens, block_size=16) & KeyLengths(lengths)
    local = (split_heads(project(hidden)) for project in (module.query, module.key, module.value))
    actual = join_heads(attn_ext.block_sparse_attention(*local, mask))
    if tokens:
        rows = split_heads(module.query_global(hidden[:, tokens]))
        keys, values = (split_heads(f(hidden)) for f in (module.key_global, module.value_global))
        everywhere = attn_ext.attention(rows, keys, values, mask=KeyLengths(lengths))
        actual = actual.index_copy(1, torch.tensor(tokens), join_heads(everywhere))
    actual = actual.masked_fill(padded.unsqueeze(-1), 0)
    assert_equal_up_to_rounding(actual, expected)

    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * weight).sum(), hidden)[0] for out in (actual, expected)]
    assert_equal_up_to_rounding(*grads)


@pytest.mark.parametrize("lengths", [[208, 208], [208, 170]])
def test_bigbird(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the random blocks that the module draws; in training, as in evaluation it draws none."""
    block, length = 16, 208
    config = modeling_big_bird.BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=block,
        num_random_blocks=3,
        attention_probs_dropout_prob=0.0,
    )
    module = modeling_big_bird.BigBirdBlockSparseAttention(config, seed=5).train()
    draws = []
    draw = module._bigbird_block_rand_mask_with_head
    monkeypatch.setattr(
        module, "_bigbird_block_rand_mask_with_head", lambda **k: draws.append(draw(**k)) or draws[-1]
    )
    hidden = torch.randn(2, length, WIDTH, requires_grad=True)
    seen = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).float()
    blocked, band, rows, columns = modeling_big_bird.BigBirdModel.create_masks_for_block_sparse_attn(
        seen, block
    )
    (expected,) = module(hidden, band, rows, columns, blocked, blocked)[:1]

    drawn = torch.stack([torch.as_tensor(head).long() for head in draws[0]])
    drawn = torch.nn.functional.pad(drawn, (0, 0, 1, 1))  # the first and the last block see all
    mask = patterns.bigbird(length, random_blocks=drawn, block_size=block) & KeyLengths(lengths)
    inputs = (split_heads(project(hidden)) for project in (module.query, module.key, module.value))
    actual = join_heads(attn_ext.block_sparse_attention(*inputs, mask)) * seen.unsqueeze(-1)
    expected = expected * seen.unsqueeze(-1)
    assert_equal_up_to_rounding(actual, expected)

    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * weight).sum(), hidden)[0] for out in (actual, expected)]
    assert_equal_up_to_rounding(*grads)
