"""Says what is wrong with the arguments of a call that failed, or that is about to be traced.

Every check raises TypeError (a wrong type or dtype), ValueError (a wrong shape, device or number) or
NotImplementedError, naming the argument, what it is and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._packing import Packing
from .block_mask import BlockMask
from .masks import FLOAT_DTYPES, Dense, KeyLengths, Mask, Segments, from_causal_bias, is_causal_bias

MAX_HEAD_DIM = 1024
BATCH_DIMENSIONS = "the batch dimensions of query, key and value"
HEADS = "the heads of query, key and value (dimension -3), without enable_gqa,"


def explain(error: Exception, check: Callable[..., None], *arguments: Any) -> Exception | None:
    """What `check` raises for these arguments, or why there is no kernel for them; None: neither is it."""
    try:
        check(*arguments)
    except (TypeError, ValueError, NotImplementedError) as explanation:
        return explanation
    return unsupported(error)


def unsupported(error: Exception) -> NotImplementedError | None:
    """The reason that an operator gives for having no kernel, if that is the error."""
    _, found, reason = str(error).partition("attention on CUDA: ")
    return NotImplementedError(reason.partition("\n")[0]) if found else None


def broadcast_shapes(what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """`torch.broadcast_shapes`, quicker; raises ValueError, saying that `what` must broadcast."""
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for index, size in enumerate(shape, start=len(result) - len(shape)):
            if result[index] == 1:
                result[index] = size
            elif size != 1 and size != result[index]:
                raise ValueError(
                    f"{what} must broadcast, got {', '.join(str(tuple(shape)) for shape in shapes)}"
                )
    return tuple(result)


def check_scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
) -> None:
    _check_tensors(query, key, value)
    _check_bool("is_causal", is_causal)
    _check_bool("enable_gqa", enable_gqa)
    _check_scale(scale)
    _check_dropout(dropout_p)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions, (..., L, D), got shape {tuple(tensor.shape)}"
            )
    _check_lengths_and_head_dims(query, key, value)
    batch_shape = broadcast_shapes(BATCH_DIMENSIONS, query.shape[:-3], key.shape[:-3], value.shape[:-3])
    heads = _check_heads(query, key, value, enable_gqa)
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask must be None when is_causal is True")
    if is_causal_bias(attn_mask):
        from_causal_bias(attn_mask, query.shape[-2], key.shape[-2])
        return
    scores = (*batch_shape, *heads, query.shape[-2], key.shape[-2])
    _check_dense_mask("attn_mask", attn_mask, scores, query.device)


def check_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scale: Any,
    bias: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    dropout_seed: Any,
) -> None:
    _check_tensors(query, key, value)
    _check_scale(scale)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, L, D), got shape {tuple(tensor.shape)}")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must have the batch size of query, {query.shape[0]}, got shape {tuple(tensor.shape)}"
            )
    _check_lengths_and_head_dims(query, key, value)
    _check_grouped_heads(query, key, value)
    scores = (*query.shape[:3], key.shape[2])
    if mask is not None:
        _check_is_mask(mask)
        for part in mask.parts:
            _check_mask(part, scores, query.device)
        mask.lower(query.shape[2], key.shape[2], query.device)  # which says what cannot be combined
    _check_options(
        scores, query.shape[0], query.device, bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    )


def check_attention_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    mask: Any,
    scale: Any,
    bias: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    dropout_seed: Any,
) -> None:
    _check_tensors(query, key, value)
    _check_scale(scale)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be (T, H, D), got shape {tuple(tensor.shape)}")
    if value.shape[0] != key.shape[0]:
        raise ValueError(
            f"value must have as many tokens as key, {key.shape[0]}, got shape {tuple(value.shape)}"
        )
    _check_head_dims(query, key, value)
    _check_grouped_heads(query, key, value)
    check_lengths(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask)
    batch, scores = cu_seqlens_q.shape[0] - 1, (1, query.shape[1], query.shape[0], key.shape[0])
    if mask is not None:
        for part in mask.parts:
            if not isinstance(part, KeyLengths):
                _check_mask(part, scores, query.device)
        packing = Packing.of(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
        mask.lower_packed(packing)  # which says what cannot be combined
    _check_options(scores, batch, query.device, bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed)


def check_lengths(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    mask: Any,
) -> None:
    """That what says how long packed sequences are leads to no token beyond the packed ones."""
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, query)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, key)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be of as many sequences, got shapes "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    if mask is None:
        return
    _check_is_mask(mask)
    for part in mask.parts:
        if isinstance(part, KeyLengths):
            _check_key_lengths(part.lengths, cu_seqlens_k.shape[0] - 1, cu_seqlens_k.diff())


def check_lengths_of_mask(mask: Mask, query_len: int, kv_len: int) -> None:
    """That each part of a mask fits the lengths, for any number of batch entries and heads."""
    for part in mask.parts:
        if isinstance(part, Dense):
            batch, heads = (1, 1, *part.tensor.shape[:-2])[-2:]
            device = part.tensor.device
        elif isinstance(part, Segments):
            batch, heads, device = max(len(part.query_ids), len(part.kv_ids)), 1, part.query_ids.device
        elif isinstance(part, KeyLengths):
            batch, heads, device = len(part.lengths), 1, part.lengths.device
        else:
            continue
        _check_mask(part, (batch, heads, query_len, kv_len), device)


def _check_cu_seqlens(name: str, cu_seqlens: Any, max_seqlen: Any, tokens: Tensor) -> None:
    """That cumulative lengths are of the sequences that make up `tokens`, (T, ...)."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must be (B + 1,), got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"{name} must be on the device of query, {tokens.device}, got {cu_seqlens.device}")
    longest = name.replace("cu_", "max_").replace("seqlens", "seqlen")
    if max_seqlen is not None and (
        isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))
    ):
        raise TypeError(f"{longest} must be an int or None, got {type(max_seqlen).__name__}")
    if not _is_readable(cu_seqlens):
        return
    begin, end = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if begin != 0 or end != tokens.shape[0]:
        raise ValueError(
            f"{name} must go from 0 to the number of tokens, {tokens.shape[0]}, got {begin} to {end}"
        )
    if (cu_seqlens[1:] < cu_seqlens[:-1]).any():  # differences could overflow
        raise ValueError(f"{name} must not decrease, got {cu_seqlens.tolist()}")
    if max_seqlen is not None and (cu_seqlens.diff() > max_seqlen).any():
        most = int(cu_seqlens.diff().max())
        raise ValueError(f"{longest} must be at least the longest of {name}, {most}, got {max_seqlen}")


def _check_key_lengths(lengths: Tensor, batch: int, kv_len: int | Tensor) -> None:
    """That there is a length for each of `batch` sequences, of at most kv_len: a number, or (batch,)."""
    if lengths.shape[0] != batch:
        raise ValueError(
            f"mask KeyLengths must hold one length per batch entry, {batch}, got {lengths.shape[0]}"
        )
    if _is_readable(lengths) and ((lengths < 0) | (lengths > kv_len)).any():
        most = kv_len.tolist() if isinstance(kv_len, Tensor) else kv_len
        raise ValueError(f"mask KeyLengths must hold lengths from 0 to {most}, got {lengths.tolist()}")


def _is_readable(tensor: Tensor) -> bool:
    """Whether to look at the numbers: those of another device would be waited for, and kernels check them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_is_mask(mask: Any) -> None:
    if not isinstance(mask, Mask):
        hint = "; wrap a tensor in attn_ext.Dense" if isinstance(mask, Tensor) else ""
        raise TypeError(f"mask must be None or an attn_ext mask, got {type(mask).__name__}{hint}")


def _check_options(
    scores: tuple[int, ...],
    batch: int,
    device: torch.device,
    bias: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    dropout_seed: Any,
) -> None:
    """What modifies scores of the shape `scores`, for `batch` sequences."""
    heads = scores[1]
    if bias is not None:
        if isinstance(bias, Tensor) and bias.dtype not in FLOAT_DTYPES:
            hint = ": pass mask=attn_ext.Dense(...)" if bias.dtype == torch.bool else ""
            raise TypeError(f"bias must be float32, float64, float16 or bfloat16, got {bias.dtype}{hint}")
        _check_dense_mask("bias", bias, scores, device)
    _check_number("softcap", softcap, optional=True)
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be a finite number that is not negative, got {softcap}")
    if alibi_slopes is not None:
        _check_per_head("alibi_slopes", alibi_slopes, ((heads,), (batch, heads), (1, heads)), device)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "alibi_slopes must not require grad: ALiBi's slopes are constants, and their gradient is not "
                "implemented; learned slopes can be written as a bias"
            )
    if sinks is not None:
        _check_per_head("sinks", sinks, ((heads,),), device)
    _check_dropout(dropout_p)
    check_seed(dropout_seed, device)


def _check_mask(mask: Mask, scores: tuple[int, ...], device: torch.device) -> None:
    if isinstance(mask, Dense):
        _check_dense_mask("mask Dense", mask.tensor, scores, device)
    elif isinstance(mask, Segments):
        _check_segments(mask, scores, device)
    elif isinstance(mask, BlockMask):
        batch, heads, *_ = scores
        # Spelled out, as the sizes may be symbols.
        if (mask.batch != 1 and mask.batch != batch) or (mask.heads != 1 and mask.heads != heads):
            raise ValueError(
                f"mask BlockMask must have lists for 1 or {batch} batch entries and 1 or {heads} heads, "
                f"got {mask.batch} and {mask.heads}"
            )
    elif isinstance(mask, KeyLengths):
        _check_key_lengths(mask.lengths, scores[0], scores[3])


def _check_per_head(
    name: str, tensor: Any, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(tensor).__name__}")
    _check_strided(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    # Spelled out, as the sizes may be symbols.
    if not any(
        len(shape) == tensor.dim() and all(a == b for a, b in zip(tensor.shape, shape, strict=True))
        for shape in shapes
    ):
        raise ValueError(
            f"{name} must have shape {' or '.join(map(str, shapes))}, got shape {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}")


def check_seed(seed: Any, device: torch.device) -> None:
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"dropout_seed must be int64, got {seed.dtype}")
        if seed.dim() != 0:
            raise ValueError(f"dropout_seed must have no dimension, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"dropout_seed must be on the device of query, {device}, got {seed.device}")
    elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"dropout_seed must be an int, a tensor or None, got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"dropout_seed must fit in 64 bits, got {seed}")


def _check_segments(mask: Segments, scores: tuple[int, ...], device: torch.device) -> None:
    batch, _, query_len, kv_len = scores
    for name, ids, length in (("query_ids", mask.query_ids, query_len), ("kv_ids", mask.kv_ids, kv_len)):
        # Spelled out, as the sizes may be symbols.
        if (ids.shape[0] != 1 and ids.shape[0] != batch) or ids.shape[1] != length:
            raise ValueError(
                f"mask Segments must have {name} of shape ({batch}, {length}) or ({length},), "
                f"got {tuple(ids.shape)}"
            )


def _check_tensors(query: Any, key: Any, value: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        _check_strided(name, tensor)
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
        if _dtype_in_kernel(tensor) != _dtype_in_kernel(query):
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
    if query.device.type == "cuda":
        _check_built_with_cuda(query)


def _check_built_with_cuda(query: Tensor) -> None:
    if not torch.compiler.is_compiling() and _C.build_info()["cuda"] is None:
        raise NotImplementedError(
            f"query is on {query.device}, and attn_ext was built without CUDA: build it where nvcc is, with "
            "ATTN_EXT_CUDA=1"
        )


def _check_strided(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested tensor: pack it and use attn_ext.attention_varlen, "
            "or pass query, key and value of layout torch.jagged to attn_ext.scaled_dot_product_attention"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _dtype_in_kernel(tensor: Tensor, on: torch.device | None = None) -> torch.dtype:
    """The dtype after autocast, which leaves float64 alone; `on` another device than the tensor's."""
    device = (on or tensor.device).type
    autocasts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocasts and tensor.dtype != torch.float64 else tensor.dtype


def _check_lengths_and_head_dims(query: Tensor, key: Tensor, value: Tensor) -> None:
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value must have the length of key, {key.shape[-2]}, got shape {tuple(value.shape)}"
        )
    _check_head_dims(query, key, value)


def _check_head_dims(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the head_dim (dimension -1) of query, {query.shape[-1]}, "
            f"got shape {tuple(key.shape)}"
        )
    for name, tensor in (("query", query), ("value", value)):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head_dim from 1 to {MAX_HEAD_DIM}, got shape {tuple(tensor.shape)}"
            )


def _check_grouped_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Of (B, H, L, D) or (T, H, D)."""
    heads, kv_heads, value_heads = (tensor.shape[1] for tensor in (query, key, value))
    if value_heads != kv_heads:
        raise ValueError(f"value must have as many heads as key, {kv_heads}, got shape {tuple(value.shape)}")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"the heads of query must be a multiple of those of key, got {heads} and {kv_heads}")


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The number of heads, as a shape: empty if there is no such dimension."""
    if not enable_gqa:
        return broadcast_shapes(HEADS, query.shape[-3:-2], key.shape[-3:-2], value.shape[-3:-2])
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 3:
            raise ValueError(
                f"{name} must be (..., H, L, D) with enable_gqa, got shape {tuple(tensor.shape)}"
            )
        heads, kv_heads = query.shape[-3], tensor.shape[-3]
        if heads % kv_heads if kv_heads else heads:
            raise ValueError(
                f"the heads of query must be a multiple of those of {name}, got {heads} and {kv_heads}"
            )
    return (query.shape[-3],)


def _check_dense_mask(name: str, mask: Any, scores: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(mask).__name__}")
    _check_strided(name, mask)
    if mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        raise TypeError(
            f"{name} must be bool (True = attend), or float32, float64, float16 or bfloat16 (added to "
            f"the scores), got {mask.dtype}"
        )
    if mask.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {mask.device}")
    trailing = scores[len(scores) - mask.dim() :] if 1 <= mask.dim() <= len(scores) else None
    if trailing is None or any(
        size != 1 and size != full for size, full in zip(mask.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"{name} must have 1 to {len(scores)} dimensions and be broadcastable to {scores}, "
            f"got shape {tuple(mask.shape)}"
        )


def _check_scale(scale: Any) -> None:
    _check_number("scale", scale, optional=True)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _check_number(name: str, number: Any, optional: bool = False) -> None:
    if optional and number is None:
        return
    if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        expected = "a float or None" if optional else "a float"
        raise TypeError(f"{name} must be {expected}, got {type(number).__name__}")


def _check_dropout(dropout_p: Any) -> None:
    _check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")


def _check_bool(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
