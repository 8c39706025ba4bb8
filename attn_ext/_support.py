"""Whether there is a kernel for a call: `is_supported` and `why_unsupported`.

Nothing is decided here. A call goes its own way up to where its operator would run. Another operator gets the
same arguments, as sizes and strides on torch's meta device, and does what that one does before it starts a
kernel: it checks, plans how rows lie and asks the selector of csrc/cuda.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _ops, _validation, decode, functional, varlen
from ._ops import Options
from .masks import is_causal_bias

__all__ = ["is_supported", "why_unsupported"]

# Whose operators ask for the kernels of a type of device. Those of the CPU do all that passes the checks.
SELECTORS = {"cuda": torch.ops.attn_ext}
_KERNELS_OF_ALL = ("cpu", "meta")


def is_supported(
    *arguments: Any,
    function: Callable[..., Any] = functional.attention,
    derivatives: int | None = None,
    **options: Any,
) -> bool:
    """Whether `attn_ext.attention`, or another function, with these arguments has a kernel on their device.

        attn_ext.is_supported(query, key, value, mask=attn_ext.Causal(), derivatives=1)
        attn_ext.is_supported(query, k, v, lengths, block_table=t, function=attn_ext.attention_decode)

    Arguments and errors as of `why_unsupported`.

    Returns:
        False if the call, or its derivatives, would raise NotImplementedError.
    """
    return why_unsupported(*arguments, function=function, derivatives=derivatives, **options) is None


def why_unsupported(
    *arguments: Any,
    function: Callable[..., Any] = functional.attention,
    derivatives: int | None = None,
    **options: Any,
) -> str | None:
    """The reason for which such a call would raise NotImplementedError; None: there are kernels for it.

    The call's own checks and the selector that it would ask give the answer. No result is allocated, no
    kernel of attention starts, the device is not waited for, and torch's generators stay as they are.

    Args:
        *arguments, **options: those of the function. Tensors may be fake ones, of sizes that are numbers.
        function: `attention`, `scaled_dot_product_attention` of dense tensors, `block_sparse_attention`,
            `attention_varlen` or `attention_decode`.
        derivatives: how often the result is to be differentiated: 0: never; 1: a backward pass, for query,
            key and value, and those of bias and sinks that require grad; 2: derivatives of that, or forward
            mode. None: 1 if grad mode is on and an argument requires grad, else 0.

    Returns:
        The text of the error, or None. What index tensors on a GPU hold is not looked at.

    Raises:
        TypeError, ValueError: what the call would raise, or function is none of these, or derivatives is
            negative.
    """
    if derivatives is not None and (isinstance(derivatives, bool) or not isinstance(derivatives, int)):
        raise TypeError(f"derivatives must be an int or None, got {type(derivatives).__name__}")
    if derivatives is not None and derivatives < 0:
        raise ValueError(f"derivatives must not be negative, got {derivatives}")
    ask = _ASK.get(function) if callable(function) else None
    if ask is None:
        names = ", ".join(known.__name__ for known in _ASK)
        raise ValueError(f"function must be one of {names}, got {getattr(function, '__name__', function)!r}")
    bound = _SIGNATURES[function].bind(*arguments, **options)
    bound.apply_defaults()
    try:
        ask(derivatives, **bound.arguments)
    except NotImplementedError as reason:
        return str(reason)
    return None


# --- Calls up to the operator: each raises what the call would ----------------------------------------------


def _ask_attention(
    derivatives: int | None,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    bias: Any,
    scale: Any,
    *,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    dropout_seed: Any,
    return_lse: bool,
) -> None:
    more = bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    _validation.check_attention(query, key, value, mask, scale, *more)
    lowered = functional._lower(mask, query, key)
    ask = partial(_ask_for_attention, query.device, derivatives)
    functional.attend_lowered(query, key, value, lowered, scale, *more, return_lse, attend=ask)


def _ask_block_sparse(derivatives: int | None, block_mask: Any, **arguments: Any) -> None:
    functional.check_is_block_mask(block_mask)
    _ask_attention(derivatives, mask=block_mask, **arguments)


def _ask_scaled_dot_product_attention(
    derivatives: int | None, query: Any, key: Any, value: Any, attn_mask: Any, **options: Any
) -> None:
    _validation.check_scaled_dot_product_attention(query, key, value, attn_mask, **options)
    is_bias = attn_mask is not None and not is_causal_bias(attn_mask)
    if derivatives is None:
        derivatives = int(_requires_grad(query, key, value, attn_mask if is_bias else None))
    ask = partial(_ask_for_attention, query.device, derivatives)
    with _real_tensors():
        if is_bias:
            attn_mask = _sizes(attn_mask).requires_grad_(attn_mask.requires_grad)
        tensors = map(_sizes, (query, key, value))
        functional._attend_broadcast(*tensors, attn_mask, **options, attend=ask)


def _ask_varlen(
    derivatives: int | None,
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    mask: Any,
    bias: Any,
    scale: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    dropout_seed: Any,
    return_lse: bool,
) -> None:
    tensors, lengths = (query, key, value), (cu_seqlens_q, cu_seqlens_k)
    more = scale, bias, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    _validation.check_attention_varlen(*tensors, *lengths, max_seqlen_q, max_seqlen_k, mask, *more)
    ask = partial(_ask_for_attention, query.device, derivatives)
    varlen._attend_packed(*tensors, *lengths, mask, *more, return_lse, attend=ask)


def _ask_decode(derivatives: int | None, return_lse: bool, validate: Any, **arguments: Any) -> None:
    query = arguments["query"]
    decode.check_validate(validate)
    reads = validate or not isinstance(query, Tensor) or query.device.type == "cpu"
    decode._check(*arguments.values(), contents=reads)
    prefix = arguments["shared_prefix"] or ()
    tensors = [x for x in (*arguments.values(), *prefix) if isinstance(x, Tensor)]
    if derivatives or (derivatives is None and _requires_grad(*tensors)):
        raise NotImplementedError(decode._NOT_DIFFERENTIABLE)
    with _real_tensors():
        decode._attend(
            *map(_sizes, arguments.values()),
            attend=partial(_ask_for_attention, query.device, 0),
            call=partial(_ask_for_decode, query.device),
        )


_ASK = {
    functional.attention: _ask_attention,
    functional.block_sparse_attention: _ask_block_sparse,
    functional.scaled_dot_product_attention: _ask_scaled_dot_product_attention,
    varlen.attention_varlen: _ask_varlen,
    decode.attention_decode: _ask_decode,
}
_SIGNATURES = {function: inspect.signature(function) for function in _ASK}


# --- In the place of the operators: results without memory, or the reason why there are none ----------------


def _ask_for_attention(
    device: torch.device, derivatives: int | None, query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    bias, sinks = options.bias, options.sinks
    if derivatives is None:
        derivatives = int(_requires_grad(query, key, value, bias, sinks))
    wants = (tensor is not None and tensor.requires_grad for tensor in (bias, sinks))
    dtype = _validation._dtype_in_kernel(query, device)
    with _real_tensors():
        tensors = (_sizes(tensor, dtype) for tensor in (query, key, value))
        arguments = *tensors, *map(_sizes, options)
        if (selector := _selector(device)) is not None:
            reason = selector.attention_support(*arguments, *wants, derivatives, device.index or 0)
            _raise_if_any(reason)
        return _ops.attention_forward_fake(*arguments)


def _ask_for_decode(device: torch.device, *arguments: Any) -> tuple[Tensor, Tensor]:
    if (selector := _selector(device)) is not None:
        _raise_if_any(selector.decode_support(*arguments, device.index or 0))
    return decode._attention_decode_fake(*arguments)


def _selector(device: torch.device) -> Any:
    if device.type in SELECTORS:
        return SELECTORS[device.type]
    if device.type not in _KERNELS_OF_ALL:
        raise NotImplementedError(f"attn_ext has no kernels for tensors on {device}")
    return None


def _raise_if_any(reason: str) -> None:
    if reason:
        raise NotImplementedError(reason)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _sizes(argument: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor, or those of a pair, as sizes and strides; anything else as it is."""
    if isinstance(argument, (tuple, list)):
        return tuple(map(_sizes, argument))
    if not isinstance(argument, Tensor):
        return argument
    dtype = argument.dtype if dtype is None else dtype
    return torch.empty_strided(argument.shape, argument.stride(), dtype=dtype, device="meta")


def _real_tensors() -> Any:
    """Outside of a FakeTensorMode, in which operators would be asked for shapes only."""
    return torch.utils._python_dispatch._disable_current_modes()
