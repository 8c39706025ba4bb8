"""The public functions: from a user's tensors to one call of an operator of `torch.ops.attn_ext`.

Arguments are not checked before the call, which would take longer than a small problem itself: when something
raises, `_validation` looks for what is wrong with them and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _validation
from ._ops import Options, attend, attend_output, attention_forward, attention_output
from ._validation import BATCH_DIMENSIONS, HEADS, broadcast_shapes
from .block_mask import BlockMask
from .masks import FLOAT_DTYPES, LoweredMask, Mask, add_biases, from_causal_bias, is_causal_bias

__all__ = ["attention", "block_sparse_attention", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: softmax(query @ key^T * scale + mask) @ value.

    Flash attention (Dao et al., 2022; Dao, 2023): memory beyond inputs and outputs is O(L). Leading
    dimensions broadcast as in torch. Differentiable in query, key, value and a floating-point attn_mask, in
    reverse and forward mode, twice and more.

    Nested tensors of layout `torch.jagged`, (B, H, j, D) each, give one with the lengths of query; they go
    without attn_mask, and is_causal is of each sequence.

    Args:
        query: (..., Hq, Lq, Dk), at least (Lq, Dk); float32, float64, float16 or bfloat16.
        key: (..., Hkv, Lk, Dk), of the dtype and device of query.
        value: (..., Hkv, Lk, Dv), likewise. 1 <= Dk, Dv <= 1024.
        attn_mask: broadcastable to (..., Hq, Lq, Lk) and never expanded over its last three dimensions: bool
            (True = attend), or of any of the four dtypes (added to the scaled scores; -inf = do not attend).
        dropout_p: probability, rounded to a multiple of 2^-16, with which a weight becomes 0; the others are
            multiplied by 1 / (1 - dropout_p). The seed comes from torch's generator (`torch.manual_seed`).
        is_causal: query i attends to keys 0..i, whatever Lq and Lk ("top-left"); not together with attn_mask.
        scale: factor of the scores, 1 / sqrt(Dk) by default.
        enable_gqa: Hq may be a multiple of Hkv; query head h attends to key head h // (Hq // Hkv).

    Returns:
        (..., Hq, Lq, Dv), with query's dtype and memory order. Rows with nothing to attend to are 0.

    Raises:
        TypeError: an argument has a wrong type or dtype, or key or value another dtype than query.
        ValueError: shapes do not fit, devices differ, a number is out of range, or both attn_mask and
            is_causal are given.
    """
    if type(query) is not Tensor and all(_is_nested(tensor) for tensor in (query, key, value)):
        from ._nested import scaled_dot_product_attention_nested

        return scaled_dot_product_attention_nested(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    if is_compiling():
        arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        _validation.check_scaled_dot_product_attention(*arguments)
        return _attend_broadcast(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    try:
        if is_causal is not False and (is_causal is not True or attn_mask is not None):
            raise ValueError("is_causal or attn_mask")  # explained below
        shape = query.shape
        if (
            len(shape) == 4 and shape == key.shape == value.shape and attn_mask is None and dropout_p == 0.0
        ):  # the usual case, and nothing to broadcast
            scale = shape[3] ** -0.5 if scale is None else _finite(scale)
            return attend_output(query, key, value, None, None, None, scale, None, 0 if is_causal else None)
        return _attend_broadcast(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except Exception as error:
        arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        explanation = _validation.explain(error, _validation.check_scaled_dot_product_attention, *arguments)
        if explanation is None:
            raise
        raise explanation from None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over (batch, heads, length, head_dim): softmax(query @ key^T * scale + mask) @ value.

    Flash attention (Dao et al., 2022; Dao, 2023): memory beyond inputs and outputs is O(L). Differentiable in
    query, key, value, bias and sinks, in reverse and forward mode, twice and more.

    Args:
        query: (B, Hq, Lq, Dk), float32, float64, float16 or bfloat16.
        key: (B, Hkv, Lk, Dk), of the dtype and device of query. Hq is a multiple of Hkv: query head h attends
            to key head h // (Hq // Hkv) (grouped-query attention, Ainslie et al., 2023).
        value: (B, Hkv, Lk, Dv), likewise. 1 <= Dk, Dv <= 1024.
        mask: None, or `Causal`, `SlidingWindow`, `Prefix`, `KeyLengths`, `Segments`, `Dense` and `BlockMask`
            masks, combined with `&` and `|`.
        bias: added to the scores, (Lk,) to (B, Hq, Lq, Lk) with any dimension 1 or missing, never expanded;
            float32, float64, float16 or bfloat16. -inf hides a key. Its gradient has its shape and dtype.
            With a floating-point `Dense` mask too, their sum is made first, of the shape they broadcast to.
        scale: factor of the scores, 1 / sqrt(Dk) by default.
        softcap: scaled scores s become softcap * tanh(s / softcap), before bias (Gemma 2, 2024); None or 0:
            they stay.
        alibi_slopes: (Hq,) or (B, Hq): slope * |i + Lk - Lq - j| is subtracted from the scores (ALiBi, Press
            et al., 2022). No gradient.
        sinks: (Hq,), floating point: the logit of one more key for each head, whose value is 0 (gpt-oss,
            2025). lse includes it.
        dropout_p: probability, rounded to a multiple of 2^-16, with which a weight becomes 0; the others are
            multiplied by 1 / (1 - dropout_p).
        dropout_seed: what decides which, with the batch index, head, query and key alone: an int, an int64
            tensor of no dimension, or None for one from torch's generator (`torch.manual_seed`).
        return_lse: also return the natural logarithm of the sum of the exponentials of each row of scores.

    Returns:
        out (B, Hq, Lq, Dv), of the dtype of query and in its memory order; with return_lse (out, lse), lse
        (B, Hq, Lq) in float32, or float64 for float64 inputs. Both are differentiable. Rows with nothing to
        attend to have out 0, lse -inf and gradient 0.

    Raises:
        TypeError: an argument has a wrong type or dtype, or key or value another dtype than query.
        ValueError: shapes do not fit, devices differ, or a number is out of range.
        NotImplementedError: there is no kernel for it, as `why_unsupported` tells beforehand; alibi_slopes
            requires grad; or masks are combined with `|` in a way that would need a larger tensor than they
            have.
    """
    more = bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    if is_compiling():
        _validation.check_attention(query, key, value, mask, scale, *more)
        return attend_lowered(query, key, value, _lower(mask, query, key), scale, *more, return_lse)
    try:
        return attend_lowered(query, key, value, _lower(mask, query, key), scale, *more, return_lse)
    except Exception as error:
        arguments = query, key, value, mask, scale, *more
        explanation = _validation.explain(error, _validation.check_attention, *arguments)
        if explanation is None:
            raise
        raise explanation from None


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that visits the listed blocks of the score matrix only: `attention(..., mask=block_mask)`.

    Time goes with the number of listed blocks, forward and backward; memory beyond inputs and outputs is
    O(L). Causal masks, padding and packed documents go into the block mask: ``block_mask & Causal()``,
    ``& KeyLengths(lengths)``, ``& Segments(ids)``.

    Args:
        query: (B, Hq, Lq, Dk), float32, float64, float16 or bfloat16.
        key: (B, Hkv, Lk, Dk), of the dtype and device of query; Hq is a multiple of Hkv.
        value: (B, Hkv, Lk, Dv), likewise. 1 <= Dk, Dv <= 1024.
        block_mask: for Lq queries and Lk keys, with lists for one or B batch entries and one or Hq heads;
            made by the `from_` methods of `BlockMask` and by `attn_ext.patterns`.
        bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed, scale, return_lse: as in `attention`. A
            bias that covers the whole matrix is read in the listed blocks only.

    Returns:
        As `attention`: out (B, Hq, Lq, Dv), with return_lse (out, lse). Queries without a block have out 0.

    Raises:
        TypeError: block_mask is no BlockMask, or an argument has a wrong type or dtype.
        ValueError: block_mask is for other lengths, batch size or heads, or as in `attention`.
    """
    check_is_block_mask(block_mask)
    return attention(
        query,
        key,
        value,
        mask=block_mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )


def check_is_block_mask(block_mask: Any) -> None:
    if not isinstance(block_mask, BlockMask):
        hint = "; attention takes other masks" if isinstance(block_mask, Mask) else ""
        raise TypeError(f"block_mask must be an attn_ext.BlockMask, got {type(block_mask).__name__}{hint}")


def _is_nested(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_nested


_NO_MASK = LoweredMask()
_SOME_SEED = torch.empty((), dtype=torch.int64, device="meta")  # where none is drawn
_NO_BLOCKS = (None, None, None, None)


def _lower(mask: Mask | None, query: Tensor, key: Tensor) -> LoweredMask:
    return _NO_MASK if mask is None else mask.lower(query.shape[2], key.shape[2], query.device)


def attend_lowered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lowered: LoweredMask,
    scale: float | None,
    bias: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    return_lse: bool,
    alibi_positions: Tensor | None = None,
    attend: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention`, of a mask in the terms of the kernels.

    Slopes may also be (B or 1, Hq, Lq or 1); alibi_positions (Lq,), int64, are the queries' places among the
    keys, i + Lk - Lq by default. attend, if given, is called in the operator's place.
    """
    scale = query.shape[3] ** -0.5 if scale is None else _finite(scale)
    if not (bias is softcap is alibi_slopes is sinks is dropout_seed is None and dropout_p == 0.0):
        _refuse_what_operators_take(bias, softcap, alibi_slopes, sinks, dropout_p)
        if not (dropout_p and isinstance(dropout_seed, Tensor)):
            _validation.check_seed(dropout_seed, query.device)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        if lowered.bias is not None:
            bias = add_biases(lowered.bias, bias)
    else:
        bias = lowered.bias
    if alibi_slopes is not None:
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("alibi_slopes")  # explained by the caller
        if alibi_slopes.dim() < 3:
            alibi_slopes = alibi_slopes.view(-1, alibi_slopes.size(-1), 1)
    if not (softcap or alibi_slopes is not None or sinks is not None or dropout_p or return_lse) and (
        lowered.query_segments is lowered.blocks is attend is None
    ):
        return _output(
            query,
            key,
            value,
            bias,
            lowered.dense,
            lowered.key_ranges,
            scale,
            lowered.band_lower,
            lowered.band_upper,
        )
    seed = None
    if dropout_p:
        seed = _seed(dropout_seed, query.device) if attend is None else _SOME_SEED
    options = Options(
        bias,
        sinks,
        *lowered[1:5],
        alibi_slopes,
        alibi_positions,
        seed,
        *(lowered.blocks or _NO_BLOCKS),
        scale,
        softcap or 0.0,
        dropout_p,
        *lowered[5:7],
    )
    out, lse, _ = (attend or _attend)(query, key, value, options)
    return (out, lse) if return_lse else out


def _attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    if is_compiling():
        return attention_forward(query, key, value, *options)
    return attend(query, key, value, options)


def _output(*args: Any) -> Tensor:
    return attention_output(*args) if is_compiling() else attend_output(*args)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def _attend_broadcast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    attend: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """For any number of dimensions: leading ones are broadcast and flattened into the batch.

    attend, if given, is called in the operator's place.
    """
    q, k, v = query.shape, key.shape, value.shape
    scale = q[-1] ** -0.5 if scale is None else _finite(scale)
    if dropout_p != 0.0:
        _refuse_what_operators_take(None, None, None, None, dropout_p)
    band_upper = 0 if is_causal else None
    if attn_mask is not None and is_causal_bias(attn_mask):
        band_upper = from_causal_bias(attn_mask, q[-2], k[-2]).lower(q[-2], k[-2], query.device).band_upper
        attn_mask = None
    if (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and k[1] == v[1]
        and (q[1] == k[1] or enable_gqa)
        and (attn_mask is None or attn_mask.dim() == 4)
    ):  # as the operator takes them
        return _attend_dense(query, key, value, attn_mask, dropout_p, scale, band_upper, attend)

    batch_shape = broadcast_shapes(BATCH_DIMENSIONS, q[:-3], k[:-3], v[:-3])
    dim = max(len(q), len(k), len(v))
    attn_mask = None if attn_mask is None else _flatten_mask_batch(attn_mask, batch_shape, dim)
    query, key, value = (
        _flatten_batch(tensor, batch_shape) for tensor in _broadcast_heads(query, key, value, enable_gqa)
    )
    out = _attend_dense(query, key, value, attn_mask, dropout_p, scale, band_upper, attend)
    if len(batch_shape) != 1:
        out = out.unflatten(0, batch_shape) if batch_shape else out.squeeze(0)
    return out if dim > 2 else out.squeeze(0)


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    band_upper: int | None,
    attend: Callable[..., tuple[Tensor, ...]] | None,
) -> Tensor:
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    if dropout_p or attend is not None:
        options = Options(
            bias=bias,
            mask=mask,
            dropout_seed=_seed(None, query.device) if attend is None else _SOME_SEED,
            scale=scale,
            dropout_p=dropout_p,
            band_upper=band_upper,
        )
        return (attend or _attend)(query, key, value, options)[0]
    return _output(query, key, value, bias, mask, None, scale, None, band_upper)


def _finite(scale: float) -> float:
    # A tensor would pass for a number, and lose its gradient.
    if isinstance(scale, Tensor) or not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number, got {scale}")
    return scale


def _refuse_what_operators_take(
    bias: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> None:
    """Raises, to be explained by the caller, for what an operator would not refuse, or not get to see."""
    if (
        (bias is not None and bias.dim() == 0)
        or (softcap is not None and (isinstance(softcap, Tensor) or softcap == math.inf))
        or (alibi_slopes is not None and alibi_slopes.dtype not in FLOAT_DTYPES)
        or (sinks is not None and sinks.dtype not in FLOAT_DTYPES)
        or isinstance(dropout_p, Tensor)
        or not 0 <= dropout_p <= 1
    ):
        raise ValueError("bias, softcap, alibi_slopes, sinks or dropout_p")


def _broadcast_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., H, L, D) of each, with numbers of heads as the operator takes them."""
    if query.dim() == 2 or key.dim() == 2 or value.dim() == 2:
        if enable_gqa:
            raise ValueError("enable_gqa without a dimension of heads")
        query, key, value = (
            tensor if tensor.dim() > 2 else tensor.unsqueeze(0) for tensor in (query, key, value)
        )
    heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    if enable_gqa:
        if key_heads != value_heads:
            key, value = (_repeat_heads(tensor, heads) for tensor in (key, value))
        return query, key, value
    if key_heads == value_heads and (key_heads == heads or key_heads == 1):  # one for all is not expanded
        return query, key, value
    (heads,) = broadcast_shapes(HEADS, (heads,), (key_heads,), (value_heads,))
    return tuple(tensor.expand(*tensor.shape[:-3], heads, -1, -1) for tensor in (query, key, value))


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """(..., H, L, D) -> (..., heads, L, D), each head followed by its copies."""
    repeats, remainder = divmod(heads, tensor.shape[-3])
    if remainder:
        raise ValueError(f"{heads} heads are not a multiple of {tensor.shape[-3]}")
    return tensor.repeat_interleave(repeats, dim=-3)


def _flatten_batch(tensor: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    """(..., H, L, D) -> (B, H, L, D), a view unless a broadcast dimension merges with one that is not."""
    if tensor.shape[:-3] != batch_shape:
        tensor = tensor.expand(*batch_shape, *tensor.shape[-3:])
    if len(batch_shape) == 1:
        return tensor
    return tensor.flatten(0, -4) if batch_shape else tensor.unsqueeze(0)


def _flatten_mask_batch(mask: Tensor, batch_shape: tuple[int, ...], dim: int) -> Tensor:
    """(..., H, Lq, Lk), at most `dim` dimensions, each possibly 1 or missing, -> (B or 1, H, Lq, Lk)."""
    if not 1 <= mask.dim() <= dim:
        raise ValueError(f"attn_mask has {mask.dim()} dimensions")
    mask = mask[(None,) * (max(dim, 4) - mask.dim())]
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return _flatten_batch(mask, batch_shape)
