"""What torch needs to know about `torch.ops.attn_ext.*` besides the kernels.

Shapes, derivatives, autocast, vmap and FLOPs. The schemas and the kernels come with the extension module; all
the rest is registered with the dispatcher here, so that the operators behave alike whether they are called
directly, through the public functions, or from a compiled graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from . import _C  # noqa: F401  (defines the operators)

attention_forward = torch.ops.attn_ext.attention_forward.default
attention_output = torch.ops.attn_ext.attention_output.default
attention_backward = torch.ops.attn_ext.attention_backward.default

_library = torch.library.Library("attn_ext", "IMPL")

_below_autograd = torch._C._AutoDispatchBelowAutograd

# Looked up once: together these attributes cost as much as a tenth of a small call.
_forward_handle = attention_forward._handle
_output_handle = attention_output._handle
_call_boxed = torch._C._dispatch_call_boxed
_is_key_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_set_key_excluded = torch._C._dispatch_tls_set_dispatch_key_excluded
_AUTOGRAD_CPU = torch._C.DispatchKey.AutogradCPU
_is_functorch_active = torch._C._are_functorch_transforms_active
_has_torch_function = torch.overrides.has_torch_function_variadic
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    band_lower: int | None,
    band_upper: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_forward`, which would do as well, by the shortest way through the dispatcher."""
    args = query, key, value, bias, key_lengths, scale, band_lower, band_upper
    operator = _differentiable_operator(query, key, value, bias)
    return _call_past_autograd(_forward_handle, args) if operator is None else operator(*args)


def attend_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    band_lower: int | None,
    band_upper: int | None,
) -> Tensor:
    """The first of `attend`'s results; without the others where nothing is differentiated."""
    args = query, key, value, bias, key_lengths, scale, band_lower, band_upper
    operator = _differentiable_operator(query, key, value, bias)
    return _call_past_autograd(_output_handle, args) if operator is None else operator(*args)[0]


def _differentiable_operator(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Any:
    """What to call where a derivative, or a transform that may take one, is at work; None elsewhere."""
    if _is_functorch_active() or forward_ad._current_level >= 0 or _has_torch_function(query, key, value):
        return attention_forward
    if _is_grad_enabled():
        if bias is not None:
            reject_mask_gradient(bias)
        if _any_requires_grad(query, key, value):
            return attention_forward if _is_any_autocast_enabled() else _apply_attention
    return None


def _call_past_autograd(handle: Any, args: tuple[Any, ...]) -> Any:
    """Calls an operator past its autograd kernel, in a third of the time.

    Excluding one key by hand is cheaper than the guard that excludes all autograd keys; those of other
    devices reach the kernel.
    """
    if _is_key_excluded(_AUTOGRAD_CPU):  # as in inference mode
        return _call_boxed(handle, *args)
    _set_key_excluded(_AUTOGRAD_CPU, True)
    try:
        return _call_boxed(handle, *args)
    finally:
        _set_key_excluded(_AUTOGRAD_CPU, False)


def _call_below_autograd(operator: Any, *args: Any) -> Any:
    if not _is_functorch_active():
        with _below_autograd():
            return _call_boxed(operator._handle, *args)
    # The levels of torch.func below this one differentiate too: undo what `Function.forward` turned off.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
        return operator(*args)


def _attend_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same for `attention_backward`."""
    if is_compiling() or _is_grad_enabled() or _is_functorch_active() or forward_ad._current_level >= 0:
        return attention_backward(*args)
    return _call_below_autograd(attention_backward, *args)


# --- Shapes and memory layout -------------------------------------------------------------------------------


def _empty_in_order_of(model: Tensor, batch: int, heads: int, rows: int, columns: int) -> Tensor:
    """A dense (batch, heads, rows, columns) tensor whose memory order is that of `model`."""
    # Loading this module takes longer than loading torch, and whoever traces has it loaded already.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    # A dimension of size 1 has no order. A symbolic size counts as more: asking would add a needless guard.
    ordered = all(not isinstance(size, int) or size > 1 for size in model.shape[1:3])
    if ordered and guard_or_false(model.stride(1) < model.stride(2)):
        return model.new_empty(batch, rows, heads, columns).transpose(1, 2)
    return model.new_empty(batch, heads, rows, columns)


def _check_devices(query: Tensor, *others: Any) -> None:
    """One meta tensor among others brings real tensors here, which would get uninitialised results."""
    for other in others:
        torch._check(
            not isinstance(other, Tensor) or other.device == query.device,
            lambda: f"all tensors must be on the device of query, {query.device}",
        )


@torch.library.register_fake("attn_ext::attention_forward", lib=_library)
def _attention_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(query, key, value, *rest)
    torch._check(query.dim() == key.dim() == value.dim() == 4, lambda: "tensors must have 4 dimensions")
    torch._check(query.dtype == key.dtype == value.dtype, lambda: "tensors must have the same dtype")
    batch, heads, query_len, head_dim = query.shape
    _, kv_heads, kv_len, value_dim = value.shape
    torch._check(key.shape[0] == batch, lambda: "query and key must have the same batch size")
    torch._check(value.shape[0] == batch, lambda: "query and value must have the same batch size")
    torch._check(key.shape[1] == kv_heads, lambda: "key and value must have the same number of heads")
    torch._check(key.shape[2] == kv_len, lambda: "key and value must have the same length")
    torch._check(key.shape[3] == head_dim, lambda: "query and key must have the same head_dim")
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(batch, heads, query_len, dtype=statistics)
    return _empty_in_order_of(query, batch, heads, query_len, value_dim), lse, torch.empty_like(lse)


@torch.library.register_fake("attn_ext::attention_output", lib=_library)
def _attention_output_fake(*args: Any) -> Tensor:
    return _attention_forward_fake(*args)[0]


@torch.library.register_fake("attn_ext::attention_backward", lib=_library)
def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _check_devices(query, key, value, grad_out, grad_lse, *rest)
    return tuple(_empty_in_order_of(tensor, *tensor.shape) for tensor in (query, key, value))


# --- Derivatives --------------------------------------------------------------------------------------------


def reject_mask_gradient(bias: Tensor | None) -> None:
    """Raises NotImplementedError where a gradient with respect to the mask would be expected."""
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "the gradient of the attention mask is not implemented in this release: detach the mask"
        )


def _reject_forward_mode(*_: Any) -> None:
    raise NotImplementedError("forward-mode differentiation of attention is not implemented in this release")


def _reject_double_backward(*_: Any) -> None:
    raise NotImplementedError("double backward of attention is not implemented in this release")


class _Function(_SingleLevelFunction):
    """An autograd function of one level, as a kernel in the dispatcher needs it: torch.func peels its own."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _Attention(_Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call_below_autograd(attention_forward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, value, bias, key_lengths, *ctx.scale_and_band = inputs
        ctx.save_for_backward(query, key, value, *output, bias, key_lengths)
        ctx.mark_non_differentiable(output[2])  # lse_residual
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 8
        query, key, value, out, *rest = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = _attend_backward(grad_out, grad_lse, query, key, value, out, *rest, *ctx.scale_and_band)
        return (*grads, None, None, None, None, None)

    jvp = staticmethod(_reject_forward_mode)


class _AttentionBackward(_Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call_below_autograd(attention_backward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_reject_double_backward)
    jvp = staticmethod(_reject_forward_mode)


_apply_attention = _Attention.apply
_apply_attention_backward = _AttentionBackward.apply


def _apply_at_level(apply: Any, args: tuple[Any, ...]) -> Any:
    """Under torch.func, record on the level that the dispatcher is at, as the built-in operators do."""
    if not _is_functorch_active():
        return apply(*args)
    with enable_single_level_autograd_function():
        return apply(*args)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    # An open forward-mode level is enough: a tangent may be there, and must not be dropped.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _attention_forward_autograd(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    reject_mask_gradient(bias)
    if _is_differentiated(query, key, value):
        return _apply_at_level(_apply_attention, (query, key, value, bias, *rest))
    return _call_below_autograd(attention_forward, query, key, value, bias, *rest)


def _attention_output_autograd(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    reject_mask_gradient(bias)
    if _is_differentiated(query, key, value):
        return attention_forward(query, key, value, bias, *rest)[0]
    return _call_below_autograd(attention_output, query, key, value, bias, *rest)


def _attention_backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    if _is_differentiated(*(arg for arg in args if isinstance(arg, Tensor))):
        return _apply_at_level(_apply_attention_backward, args)
    return _call_below_autograd(attention_backward, *args)


_library.impl("attention_forward", _attention_forward_autograd, "Autograd")
_library.impl("attention_output", _attention_output_autograd, "Autograd")
_library.impl("attention_backward", _attention_backward_autograd, "Autograd")


# --- Autocast -----------------------------------------------------------------------------------------------


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """Casts query, key and value as torch's own attention does: float64 stays. The mask keeps its dtype."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor) -> Tensor:
        if (
            tensor.dtype == torch.float64
            or not tensor.is_floating_point()
            or tensor.device.type != device_type
        ):
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def autocast(operator: Any) -> Any:
        def call(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(cast(query), cast(key), cast(value), *rest)

        return call

    _library.impl("attention_forward", autocast(attention_forward), dispatch_key)
    _library.impl("attention_output", autocast(attention_output), dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


# --- vmap ---------------------------------------------------------------------------------------------------


def _fold(tensor: Tensor, vmap_dim: int | None, vmap_size: int) -> Tensor:
    """(batch, ...), mapped over `vmap_dim` or repeated, -> (vmap_size * batch, ...)."""
    if vmap_dim is None:
        tensor = tensor.unsqueeze(0).expand(vmap_size, *tensor.shape)
    else:
        tensor = tensor.movedim(vmap_dim, 0)
    return tensor.flatten(0, 1)


def _fold_bias(bias: Tensor, vmap_dim: int | None, vmap_size: int, batch: int) -> Tensor:
    """The same, of a tensor whose batch dimension may be 1 for any batch."""
    if vmap_dim is None:
        return bias if bias.size(0) == 1 else _fold(bias, None, vmap_size)
    bias = bias.movedim(vmap_dim, 0)
    return _fold(bias.expand(-1, batch, -1, -1, -1), 0, vmap_size)


def _vmap_rule(operator: Any, query_index: int, bias_index: int) -> Any:
    """The mapped dimension becomes part of the batch, for which operands that are not mapped are repeated."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        query, query_dim = args[query_index], in_dims[query_index]
        batch = query.size(0) if query_dim is None else query.movedim(query_dim, 0).size(1)
        folded = [
            _fold(arg, dim, size) if isinstance(arg, Tensor) and index != bias_index else arg
            for index, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        if args[bias_index] is not None:
            folded[bias_index] = _fold_bias(args[bias_index], in_dims[bias_index], size, batch)
        results = operator(*folded)
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, batch)), 0
        return tuple(result.unflatten(0, (size, batch)) for result in results), (0,) * len(results)

    return rule


for _operator, _query_index, _bias_index in (
    (attention_forward, 0, 3),
    (attention_output, 0, 3),
    (attention_backward, 2, 8),
):
    torch.library.register_vmap(
        _operator._schema.name, _vmap_rule(_operator, _query_index, _bias_index), lib=_library
    )


# --- FLOPs --------------------------------------------------------------------------------------------------
# Every query head attends to every key, as torch counts its own attention; masks are not subtracted.


@register_flop_formula([torch.ops.attn_ext.attention_forward, torch.ops.attn_ext.attention_output])
def _attention_forward_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    batch, heads, query_len, head_dim = query
    return 2 * batch * heads * query_len * key[2] * (head_dim + value[3])


@register_flop_formula(torch.ops.attn_ext.attention_backward)
def _attention_backward_flops(
    grad_out: torch.Size,
    grad_lse: Any,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """Five products: the scores again, dQ and dK over head_dim; dP and dV over value's."""
    batch, heads, query_len, head_dim = query
    return 2 * batch * heads * query_len * key[2] * (3 * head_dim + 2 * value[3])
