"""Attention over sequences of different lengths, packed one after another without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from . import _validation
from ._packing import Packing
from .functional import attend_lowered
from .masks import LoweredMask, Mask

__all__ = ["attention_varlen"]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    """`attention` of each of B sequences, packed along the first dimension: no padding is stored or computed.

    Sequence b has queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 and the keys that cu_seqlens_k says;
    either may be none, and there may be more of one than of the other (chunked prefill, cross attention). The
    tensors are read as they lie. Differentiable as `attention` is.

    Args:
        query: (Tq, Hq, Dk), float32, float64, float16 or bfloat16.
        key: (Tk, Hkv, Dk), of the dtype and device of query. Hq is a multiple of Hkv.
        value: (Tk, Hkv, Dv), likewise.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), int32 or int64: cumulative lengths, from 0 to Tq and to Tk.
        max_seqlen_q, max_seqlen_k: no sequence is longer. Not needed: for the signature of flash-attn.
        mask: as for `attention`. `Causal`, `SlidingWindow` and `Prefix` count from the start of each
            sequence, with its own lengths; `KeyLengths` has one length for each. `Segments` (Tq,) and (Tk,),
            `Dense` tensors (Tk,) to (Hq, Tq, Tk) and `BlockMask` for Tq queries and Tk keys are packed as
            queries and keys are; what they say of pairs of different sequences counts for nothing.
        bias: (Tk,) to (Hq, Tq, Tk), packed likewise, with any dimension 1 or missing.
        scale, softcap, sinks, dropout_p: as for `attention`.
        alibi_slopes: (Hq,), or (B, Hq) with slopes for each sequence; distances are those within a sequence.
        dropout_seed: likewise; the query and the key that decide are counted through all sequences.
        return_lse: also return the natural logarithm of the sum of the exponentials of each row of scores.

    Returns:
        out (Tq, Hq, Dv), of the dtype of query; with return_lse (out, lse), lse (Hq, Tq) in float32, or
        float64 for float64 inputs. Queries with nothing to attend to have out 0, lse -inf and gradient 0.

    Raises:
        TypeError: an argument has a wrong type or dtype, or key or value another dtype than query.
        ValueError: shapes do not fit, devices differ, a number is out of range, or cumulative lengths do not
            start at 0, decrease, or do not end at the number of tokens.
        NotImplementedError: as for `attention`.
    """
    tensors = query, key, value
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    more = scale, bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    if is_compiling():
        _validation.check_attention_varlen(*tensors, *lengths, mask, *more)
        return _attend_packed(*tensors, cu_seqlens_q, cu_seqlens_k, mask, *more, return_lse)
    try:
        _validation.check_lengths(query, key, *lengths, mask)
        return _attend_packed(*tensors, cu_seqlens_q, cu_seqlens_k, mask, *more, return_lse)
    except Exception as error:
        arguments = *tensors, *lengths, mask, *more
        explanation = _validation.explain(error, _validation.check_attention_varlen, *arguments)
        if explanation is None:
            raise
        raise explanation from None


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask | None,
    scale: float | None,
    bias: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    *options: Any,
    attend: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All as one batch entry, each query with ranges of the keys of its sequence."""
    packing = Packing.of(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    lowered = LoweredMask() if mask is None else mask.lower_packed(packing)
    lowered = lowered._replace(key_ranges=packing.own_keys(lowered.key_ranges))
    views = (tensor.unsqueeze(0).transpose(1, 2) for tensor in (query, key, value))
    positions = None
    if alibi_slopes is not None:
        positions = packing.kv_begin + packing.query_position + (packing.kv_len - packing.query_len)
        if alibi_slopes.dim() == 2:
            alibi_slopes = alibi_slopes[packing.sequence].T.unsqueeze(0)
    more = scale, bias, softcap, alibi_slopes, *options, positions
    result = attend_lowered(*views, lowered, *more, attend)
    if isinstance(result, Tensor):
        return result.transpose(1, 2).squeeze(0)
    out, lse = result
    return out.transpose(1, 2).squeeze(0), lse.squeeze(0)
