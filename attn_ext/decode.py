"""Attention of a few new tokens over what a cache holds: the serving side of generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _ops, _validation, functional
from ._merge import merge

__all__ = ["attention_decode"]

_decode = torch.ops.attn_ext.attention_decode.default
_decode_handle = _decode._handle
_MOST = 2**62  # that the operator is asked for: sums with it do not overflow


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    shared_prefix: tuple[Tensor, Tensor] | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache, in place, and attends to all of it, causally.

    flash-attn's `flash_attn_with_kvcache`, in the (B, H, L, D) layout. Each key is read once for all heads of
    its group and all queries; keys are split over threads, or blocks of a GPU (flash-decoding, Dao et al.,
    2023), and the bits of the result do not depend on how many there are. Of a sequence of
    n = cache_seqlens[b] + Lnew tokens, query i is token n - Lq + i and attends to the tokens up to itself;
    what the cache holds beyond is never read. Not differentiable.

    Args:
        query: (B, Hq, Lq, D), float32, float64, float16 or bfloat16. Made for 1 to 16 queries a sequence.
        key_cache: (B, Hkv, S, D), or in pages (num_pages, Hkv, page_size, D), of query's dtype, int8 or
            float8_e4m3fn; any strides with adjacent columns. Hq is a multiple of Hkv.
        value_cache: the same with Dv columns.
        cache_seqlens: (B,) int32 or int64: the tokens in the cache before the call. It is not changed.
        block_table: (B, n) int32 or int64: token j of sequence b is row j % page_size of page
            block_table[b, j // page_size] (vLLM, Kwon et al., 2023). Sequences may share pages. Entries for
            pages that are not read, beyond the last token or before the window, may be anything.
        new_key, new_value: (B, Hkv, Lnew, D) and (..., Dv), of query's dtype, written at cache_seqlens[b]
            onwards. Without them the queries' own tokens are in the cache already. No two sequences may write
            to the same page; a cache may overlap neither itself nor the other.
        rotary_cos, rotary_sin: (positions, r / 2), of query's dtype or float32: query and new_key have their
            first r columns turned by row n of these for token n (RoFormer, Su et al., 2021).
        rotary_interleaved: the pairs turned are columns (2 c, 2 c + 1), as in GPT-J, not (c, c + r / 2).
        key_scale, value_scale: float32, what the numbers of int8 and float8_e4m3fn caches are multiplied by,
            one for each page (or sequence, without a block_table) and head: (num_pages, Hkv). What is
            appended is divided by the scale that is there, not 0, rounded, and clamped to +-127 or +-448.
        shared_prefix: keys (1, Hkv, P, D) and values (1, Hkv, P, Dv) of P tokens that precede every sequence,
            of query's dtype, attended to once for the whole batch. Positions count from its first token, for
            rotary_cos too; its keys are rotated already.
        window: (left, right): a query attends to no token more than `left` before its own; None is no bound,
            and no `right` shows a query what follows it.
        softcap, alibi_slopes, sinks, scale: as for `attention`. With a shared_prefix slopes are (Hq,).
        num_splits: into how many ranges, of 16 keys or more, those of each sequence are cut at most, which
            decides how sums are rounded; None: as the length of each sequence says, so that the bits are
            those of the sequence alone.
        return_lse: also return the log-sum-exp of each row of scores.
        validate: on CUDA, wait for the device and look at cache_seqlens, block_table and the scales, as is
            always done on the CPU (not in compiled functions). Without it the kernels bring lengths to what
            there is room for, and neither read nor write where block_table names no page.

    Returns:
        out (B, Hq, Lq, Dv), of the dtype of query and in its memory order; with return_lse (out, lse), lse
        (B, Hq, Lq) in float32, or float64 for float64 queries. Rows with nothing to attend to have out 0 and
        lse -inf.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes do not fit, devices differ, or a number is out of range, in cache_seqlens and
            block_table too (on CUDA: with validate). Nothing has been read through them or written.
        NotImplementedError: there is no kernel for it, as `why_unsupported` tells beforehand; or an argument
            requires grad, and grad mode is on.
    """
    arguments = (
        *(query, key_cache, value_cache, cache_seqlens, block_table, new_key, new_value),
        *(rotary_cos, rotary_sin, rotary_interleaved, key_scale, value_scale, shared_prefix, window, softcap),
        *(alibi_slopes, sinks, scale, num_splits),
    )
    if is_compiling():
        _check(*arguments)
        out, lse = _attend(*arguments)
        return (out, lse) if return_lse else out
    check_validate(validate)
    if validate and isinstance(query, Tensor) and query.is_cuda:
        _check(*arguments)
    try:
        out, lse = _attend(*arguments)
    except Exception as error:
        explanation = _validation.explain(error, _check, *arguments)
        if explanation is None:
            raise
        raise explanation from None
    return (out, lse) if return_lse else out


def check_validate(validate: Any) -> None:
    if not isinstance(validate, bool):
        raise TypeError(f"validate must be a bool, got {type(validate).__name__}")


def _check(*arguments: Any, contents: bool = True) -> None:
    from ._decode_validation import check_attention_decode

    check_attention_decode(*arguments, contents)


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    new_key: Tensor | None,
    new_value: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    shared_prefix: tuple[Tensor, Tensor] | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    num_splits: int | None,
    attend: Callable[..., tuple[Tensor, ...]] | None = None,
    call: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """attend and call, if given, are called in the place of the operators."""
    scale = query.shape[3] ** -0.5 if scale is None else functional._finite(scale)
    left, right = (None, None) if window is None else window
    if (
        (right is not None and (right < 0 or not isinstance(right, (int, torch.SymInt))))
        or bool in (type(left), type(right), type(softcap), type(num_splits))
        or not isinstance(rotary_interleaved, bool)
    ):
        raise ValueError("what the operator would not refuse, or not get to see")  # explained by the caller
    functional._refuse_what_operators_take(None, softcap, alibi_slopes, sinks, 0.0)
    left = None if left is None else min(left, _MOST)
    num_splits = None if num_splits is None else min(num_splits, _MOST)
    prefix = None
    if shared_prefix is not None:
        if _ops._is_differentiated(tuple(shared_prefix)):
            raise NotImplementedError(_NOT_DIFFERENTIABLE)
        if shared_prefix[0].shape[1] != key_cache.shape[1]:
            raise ValueError("kv heads of the prefix")
        positions = _positions(cache_seqlens, query.shape[2], 0 if new_key is None else new_key.shape[2])
        length = shared_prefix[0].shape[2]
        turned = query
        if rotary_cos is not None:
            if rotary_cos.shape[0] < length:
                raise ValueError("rows of rotary_cos")
            turned = _rotate(query, positions + length, rotary_cos, rotary_sin, rotary_interleaved)
            rotary_cos, rotary_sin = rotary_cos[length:], rotary_sin[length:]
        hides = left is not None or new_key is None or new_key.shape[2] < query.shape[2]
        ranges = _visible_prefix(positions, left, length) if hides else None
        terms = positions, ranges, alibi_slopes, scale, softcap
        prefix = _attend_prefix(turned, *shared_prefix, *terms, attend or functional._attend)
    if alibi_slopes is not None and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes.unsqueeze(0)
    suffix = (call or _call)(
        *(query, key_cache, value_cache, cache_seqlens, block_table, new_key, new_value),
        *(rotary_cos, rotary_sin, key_scale, value_scale, alibi_slopes, sinks),
        *(scale, softcap or 0.0, rotary_interleaved, left, num_splits),
    )
    return suffix if prefix is None else merge(*suffix, *prefix)


def _call(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator, by the shortest way through the dispatcher."""
    tensors = [tensor for tensor in args[:_TENSORS] if tensor is not None]
    if (
        is_compiling()
        or _ops._is_functorch_active()
        or _ops.forward_ad._current_level >= 0
        or _ops._has_torch_function(*tensors)
    ):
        return _decode(*args)
    if _ops._is_grad_enabled() and _ops._any_requires_grad(*tensors):
        raise NotImplementedError(_NOT_DIFFERENTIABLE)
    result = _ops._call_past_autograd(_decode_handle, args)
    if args[_NEW_KEY] is not None:
        torch.autograd.graph.increment_version([cache for cache in args[1:3] if not cache.is_inference()])
    return result


# --- A prefix that sequences share --------------------------------------------------------------------------


def _positions(cache_seqlens: Tensor, query_len: int, appended: int) -> Tensor:
    """(B, Lq): which token of its sequence each query is, counted from the end of the prefix."""
    queries = torch.arange(query_len, device=cache_seqlens.device)
    return (cache_seqlens.long() + (appended - query_len)).unsqueeze(1) + queries


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(B, H, L, D) with each token's first columns turned by the angles of its position, (B, L)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    positions = positions.clamp(0, max(cos.shape[0] - 1, 0))  # of queries that see nothing, wrong lengths
    cos, sin = (table[positions].unsqueeze(1).to(dtype) for table in (cos, sin))
    turned, rest = x.to(dtype).tensor_split((2 * cos.shape[-1],), dim=-1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((turned, rest), dim=-1).to(x.dtype)


def _visible_prefix(positions: Tensor, left: int | None, length: int) -> Tensor:
    """(1, B * Lq, 1, 2): the range of keys of the prefix that each query sees."""
    positions = positions.flatten()
    begin = torch.zeros_like(positions) if left is None else positions + (length - left)
    return torch.stack((begin, positions + (length + 1)), dim=-1).clamp(0, length).view(1, -1, 1, 2)


def _attend_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    key_ranges: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    softcap: float | None,
    attend: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor]:
    """out and lse of all queries of the batch over the prefix, as rows of one problem."""
    batch, heads, query_len, _ = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, batch * query_len, -1)
    bias = None
    if alibi_slopes is not None:  # -slope * (position - j) is a bias of the keys and a number for each row
        slopes = alibi_slopes.double().view(heads, 1, 1)
        bias = slopes * torch.arange(-key.shape[2], 0, device=query.device)
        bias = (bias if query.dtype == torch.float64 else bias.float()).unsqueeze(0)
    options = _ops.Options(bias=bias, key_ranges=key_ranges, scale=scale, softcap=softcap or 0.0)
    out, lse, _ = attend(rows, key, value, options)
    out, lse = (t.view(heads, batch, query_len, *t.shape[3:]).transpose(0, 1) for t in (out, lse))
    return out, lse if alibi_slopes is None else lse - (slopes * positions).transpose(0, 1).to(lse.dtype)


# --- What torch needs to know -------------------------------------------------------------------------------

_NAMES = [argument.name for argument in _decode._schema.arguments]
_TENSORS = _NAMES.index("scale")  # how many there are
_NEW_KEY = _NAMES.index("new_key")
_NOT_DIFFERENTIABLE = (
    "attention_decode is not differentiable: call it under torch.no_grad(), or use attn_ext.attention with "
    "mask=Causal('bottom_right') over the keys and values themselves"
)


@torch.library.register_fake("attn_ext::attention_decode", lib=_ops._library)
def _attention_decode_fake(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _ops._check_devices(query, key_cache, value_cache, *rest)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=statistics)
    return _ops._empty_in_order_of(query, *query.shape[:3], value_cache.shape[3]), lse


def _attention_decode_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if _ops._is_differentiated(args):
        raise NotImplementedError(_NOT_DIFFERENTIABLE)
    return _ops._call_below_autograd(_decode, *args)


_ops._library.impl("attention_decode", _attention_decode_autograd, "Autograd")
