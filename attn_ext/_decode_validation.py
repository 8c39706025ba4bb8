"""Says what is wrong with the arguments of a call of `attention_decode`: see `_validation`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._validation import (
    MAX_HEAD_DIM,
    _check_bool,
    _check_built_with_cuda,
    _check_number,
    _check_per_head,
    _check_scale,
    _check_strided,
)
from .masks import FLOAT_DTYPES

_QUANTISED = (torch.int8, torch.float8_e4m3fn)
_INTEGERS = (torch.int32, torch.int64)


def check_attention_decode(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    cache_seqlens: Any,
    block_table: Any,
    new_key: Any,
    new_value: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    rotary_interleaved: Any,
    key_scale: Any,
    value_scale: Any,
    shared_prefix: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    scale: Any,
    num_splits: Any,
    contents: bool = True,
) -> None:
    """With `contents`, also that lengths, pages and scales hold what they must, for which a GPU is waited."""
    contents = contents and not torch.compiler.is_compiling()
    _check_tensor("query", query, FLOAT_DTYPES, query)
    if query.device.type == "cuda":
        _check_built_with_cuda(query)
    if query.dim() != 4:
        raise ValueError(f"query must be (B, H, L, D), got shape {tuple(query.shape)}")
    batch, heads, _, head_dim = query.shape
    _check_caches(query, key_cache, value_cache, block_table is not None)
    kv_heads, page_size, value_dim = *key_cache.shape[1:3], value_cache.shape[3]

    if (new_key is None) != (new_value is None):
        raise ValueError("new_key and new_value must be given together")
    appended = 0
    if new_key is not None:
        _check_tensor("new_key", new_key, (query.dtype,), query)
        _check_tensor("new_value", new_value, (query.dtype,), query)
        appended = new_key.shape[2] if new_key.dim() == 4 else 0
        _check_shape("new_key", new_key, (batch, kv_heads, appended, head_dim), "(B, Hkv, Lnew, D)")
        _check_shape("new_value", new_value, (batch, kv_heads, appended, value_dim), "(B, Hkv, Lnew, Dv)")
    prefix_len = _check_prefix(shared_prefix, query, kv_heads, value_dim)
    _check_bool("rotary_interleaved", rotary_interleaved)
    positions = _check_rotary(rotary_cos, rotary_sin, query)
    for name, tensor in (("key_scale", key_scale), ("value_scale", value_scale)):
        if key_cache.dtype not in _QUANTISED:
            if tensor is not None:
                raise ValueError(f"{name} must be None for caches of {key_cache.dtype}")
            continue
        if tensor is None:
            raise ValueError(f"{name} must be given for caches of {key_cache.dtype}")
        _check_tensor(name, tensor, (torch.float32,), query)
        _check_shape(name, tensor, (key_cache.shape[0], kv_heads), "one for each page or sequence, and head")

    _check_window(window)
    _check_number("softcap", softcap, optional=True)
    if isinstance(softcap, bool):
        raise TypeError("softcap must be a float or None, got bool")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be a finite number that is not negative, got {softcap}")
    _check_scale(scale)
    if num_splits is not None and (
        isinstance(num_splits, bool) or not isinstance(num_splits, (int, torch.SymInt))
    ):
        raise TypeError(f"num_splits must be an int or None, got {type(num_splits).__name__}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be positive, got {num_splits}")
    if alibi_slopes is not None:
        shapes = ((heads,),) if shared_prefix is not None else ((heads,), (batch, heads), (1, heads))
        _check_per_head("alibi_slopes", alibi_slopes, shapes, query.device)
    if sinks is not None:
        _check_per_head("sinks", sinks, ((heads,),), query.device)

    left = None if window is None else window[0]
    _check_lengths(
        cache_seqlens,
        block_table,
        query,
        key_cache.shape[0],
        page_size,
        appended,
        left,
        positions,
        prefix_len,
        contents,
    )
    if appended and not torch.compiler.is_compiling():
        _check_writable(key_cache, value_cache)
    if appended and contents:
        for name, tensor in (("key_scale", key_scale), ("value_scale", value_scale)):
            if tensor is not None:
                _check_written_scales(name, tensor, cache_seqlens.long(), block_table, page_size, appended)


def _check_tensor(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    _check_strided(name, tensor)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {tuple(shape)}, {meaning}, got shape {tuple(tensor.shape)}")


def _check_caches(query: Tensor, key_cache: Any, value_cache: Any, paged: bool) -> None:
    batch, heads, _, head_dim = query.shape
    plain = (query.dtype,) if query.dtype == torch.float64 else (query.dtype, *_QUANTISED)
    _check_tensor("key_cache", key_cache, plain, query)
    _check_tensor("value_cache", value_cache, (key_cache.dtype,), query)
    layout = "(num_pages, Hkv, page_size, D)" if paged else "(B, Hkv, S, D)"
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(cache.shape)}")
        if cache.stride(3) != 1 and cache.shape[3] > 1:
            raise ValueError(f"{name} must have adjacent columns, got strides {cache.stride()}")
        if not 1 <= cache.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have 1 to {MAX_HEAD_DIM} columns, got shape {tuple(cache.shape)}")
    pages, kv_heads, page_size, _ = key_cache.shape
    _check_shape("key_cache", key_cache, (pages, kv_heads, page_size, head_dim), f"{layout} with query's D")
    _check_shape(
        "value_cache", value_cache, (pages, kv_heads, page_size, value_cache.shape[3]), "to go with key_cache"
    )
    if not paged and pages != batch:
        raise ValueError(
            f"key_cache must hold {batch} sequences, as query does, got {pages}; or give a block_table"
        )
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"the heads of query must be a multiple of those of key_cache, got {heads} and {kv_heads}"
        )


def _check_writable(key_cache: Tensor, value_cache: Tensor) -> None:
    if key_cache.numel() == 0 or value_cache.numel() == 0:
        return
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        reach = 0
        for stride, size in sorted(zip(cache.stride(), cache.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(f"{name} must not overlap itself, got strides {cache.stride()}")
            reach += (size - 1) * stride
    storage = key_cache.untyped_storage()
    if storage.data_ptr() != value_cache.untyped_storage().data_ptr():
        return
    used = torch.zeros(storage.nbytes() // key_cache.element_size(), dtype=torch.bool)
    keys, values = (
        used.as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for cache in (key_cache, value_cache)
    )
    keys.fill_(True)
    if values.any():
        raise ValueError("key_cache and value_cache must not overlap")


def _check_written_scales(
    name: str, scale: Tensor, lengths: Tensor, block_table: Tensor | None, page_size: int, appended: int
) -> None:
    pages = torch.arange(scale.shape[0], device=scale.device)
    if block_table is not None:
        index = torch.arange(block_table.shape[1], device=scale.device)
        last = (lengths + (appended - 1)) // page_size
        written = (index >= (lengths // page_size).unsqueeze(1)) & (index <= last.unsqueeze(1))
        pages = block_table[written]
    if (scale[pages] == 0).any():
        raise ValueError(f"{name} must not be 0 where new_key and new_value are written")


def _check_prefix(shared_prefix: Any, query: Tensor, kv_heads: int, value_dim: int) -> int:
    """Its length."""
    if shared_prefix is None:
        return 0
    if not isinstance(shared_prefix, (tuple, list)) or len(shared_prefix) != 2:
        raise TypeError(
            f"shared_prefix must be a pair of tensors or None, got {type(shared_prefix).__name__}"
        )
    key, value = shared_prefix
    _check_tensor("shared_prefix[0]", key, (query.dtype,), query)
    _check_tensor("shared_prefix[1]", value, (query.dtype,), query)
    length = key.shape[2] if key.dim() == 4 else 0
    _check_shape("shared_prefix[0]", key, (1, kv_heads, length, query.shape[3]), "(1, Hkv, P, D)")
    _check_shape("shared_prefix[1]", value, (1, kv_heads, length, value_dim), "(1, Hkv, P, Dv)")
    return length


def _check_rotary(cos: Any, sin: Any, query: Tensor) -> int | None:
    """The number of positions."""
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None:
        return None
    dtypes = (query.dtype,) if query.dtype in (torch.float32, torch.float64) else (query.dtype, torch.float32)
    _check_tensor("rotary_cos", cos, dtypes, query)
    _check_tensor("rotary_sin", sin, (cos.dtype,), query)
    if cos.dim() != 2 or 2 * cos.shape[1] > query.shape[3]:
        raise ValueError(
            f"rotary_cos must be (positions, r / 2) with r at most {query.shape[3]}, "
            f"got shape {tuple(cos.shape)}"
        )
    _check_shape("rotary_sin", sin, tuple(cos.shape), "as rotary_cos is")
    return cos.shape[0]


def _check_window(window: Any) -> None:
    if window is None:
        return
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) or None, got {window!r}")
    for name, size in zip(("left", "right"), window, strict=True):
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"window must hold ints or None, got {type(size).__name__} for {name}")
        if size < 0:
            raise ValueError(f"window must not be negative (None is no bound), got {name}={size}")


def _check_lengths(
    cache_seqlens: Any,
    block_table: Any,
    query: Tensor,
    num_pages: int,
    page_size: int,
    appended: int,
    left: int | None,
    positions: int | None,
    prefix_len: int,
    contents: bool,
) -> None:
    batch, _, query_len, _ = query.shape
    _check_tensor("cache_seqlens", cache_seqlens, _INTEGERS, query)
    _check_shape("cache_seqlens", cache_seqlens, (batch,), "one for each sequence")
    pages_each = 1
    if block_table is not None:
        _check_tensor("block_table", block_table, _INTEGERS, query)
        pages_each = block_table.shape[1] if block_table.dim() == 2 else 0
        _check_shape("block_table", block_table, (batch, pages_each), "a row for each sequence")
    if not contents:
        return
    lengths, capacity = cache_seqlens.long(), pages_each * page_size
    if appended > capacity:
        raise ValueError(f"new_key must fit the cache, got {appended} tokens for room for {capacity}")
    if ((lengths < 0) | (lengths > capacity - appended)).any():
        raise ValueError(
            f"cache_seqlens must be from 0 to {capacity - appended}, for {capacity} tokens with {appended} "
            f"appended, got {lengths.tolist()}"
        )
    if positions is not None and (lengths > positions - appended - prefix_len).any():
        raise ValueError(
            f"rotary_cos must have a row for each token, got {positions} rows for "
            f"{int(lengths.max()) + appended + prefix_len} tokens"
        )
    if block_table is None or page_size == 0:
        return
    total = lengths + appended
    first = torch.zeros_like(total)
    if left is not None:
        first = (total - query_len - min(left, capacity)).clamp_min(0)
    first = torch.minimum(first, lengths) // page_size
    index = torch.arange(pages_each, device=query.device)
    live = (index >= first.unsqueeze(1)) & (index <= ((total - 1) // page_size).unsqueeze(1))
    bad = live & ((block_table < 0) | (block_table >= num_pages))
    if bad.any():
        expected = f"pages from 0 to {num_pages - 1}" if num_pages else "no page of an empty cache"
        raise ValueError(
            f"block_table must hold {expected} where there are tokens, got {block_table[bad].tolist()}"
        )
