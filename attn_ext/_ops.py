"""What torch needs to know about `torch.ops.attn_ext.*` besides the kernels.

Shapes, derivatives, autocast, vmap and FLOPs. The schemas and the kernels come with the extension module; all
the rest is registered with the dispatcher here, so that the operators behave alike whether they are called
directly, through the public functions, or from a compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from . import _C  # noqa: F401  (defines the operators)
from ._validation import unsupported

attention_forward = torch.ops.attn_ext.attention_forward.default
attention_output = torch.ops.attn_ext.attention_output.default
attention_backward = torch.ops.attn_ext.attention_backward.default
dropout_mask = torch.ops.attn_ext.dropout_mask.default

_library = torch.library.Library("attn_ext", "IMPL")

_below_autograd = torch._C._AutoDispatchBelowAutograd

# Looked up once: together these attributes cost as much as a tenth of a small call.
_forward_handle = attention_forward._handle
_output_handle = attention_output._handle
_call_boxed = torch._C._dispatch_call_boxed
_is_key_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_set_key_excluded = torch._C._dispatch_tls_set_dispatch_key_excluded
_AUTOGRAD_CPU = torch._C.DispatchKey.AutogradCPU
_AUTOGRAD_CUDA = torch._C.DispatchKey.AutogradCUDA
_is_functorch_active = torch._C._are_functorch_transforms_active
_has_torch_function = torch.overrides.has_torch_function_variadic
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


class Options(NamedTuple):
    """What the operators take after query, key and value, in the order of their schemas."""

    bias: Tensor | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    key_ranges: Tensor | None = None
    query_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    alibi_slopes: Tensor | None = None
    alibi_positions: Tensor | None = None
    dropout_seed: Tensor | None = None
    block_offsets: Tensor | None = None  # the fields of _blocks.Blocks
    block_indices: Tensor | None = None
    block_tiles: Tensor | None = None
    block_bits: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    band_lower: int | None = None
    band_upper: int | None = None


_OPTION_TENSORS = Options._fields.index("scale")  # which follows the tensors
_SLOPES = Options._fields.index("alibi_slopes")


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_forward`, which would do as well, by the shortest way through the dispatcher."""
    operator = _differentiable_operator(query, key, value, options.bias, options.sinks)
    args = query, key, value, *options
    return _call_past_autograd(_forward_handle, args) if operator is None else operator(*args)


def attend_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_ranges: Tensor | None,
    scale: float,
    band_lower: int | None,
    band_upper: int | None,
) -> Tensor:
    """The first of `attend`'s results; without the others where nothing is differentiated."""
    operator = _differentiable_operator(query, key, value, bias)
    args = query, key, value, bias, mask, key_ranges, scale, band_lower, band_upper
    if operator is None:
        return _call_past_autograd(_output_handle, args)
    return operator(*_with_all_options(*args))[0]


def _with_all_options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_ranges: Tensor | None,
    scale: float,
    *band: int | None,
) -> tuple[Any, ...]:
    """The arguments of `attention_output` as `attention_forward` takes them."""
    tensors = Options(bias=bias, mask=mask, key_ranges=key_ranges)[:_OPTION_TENSORS]
    return (query, key, value, *tensors, scale, 0.0, 0.0, *band)


def _differentiable_operator(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None = None
) -> Any:
    """What to call where a derivative, or a transform that may take one, is at work; None elsewhere."""
    if _is_functorch_active() or forward_ad._current_level >= 0 or _has_torch_function(query, key, value):
        return attention_forward
    if _is_grad_enabled() and _any_requires_grad(query, key, value, bias, sinks):
        return attention_forward if _is_any_autocast_enabled() else _apply_attention
    return None


def _call_past_autograd(handle: Any, args: tuple[Any, ...]) -> Any:
    """Calls an operator past its autograd kernel, in a third of the time.

    Excluding one key by hand is cheaper than the guard that excludes all autograd keys; those of other
    devices reach the kernel.
    """
    key = _AUTOGRAD_CUDA if args[0].is_cuda else _AUTOGRAD_CPU
    if _is_key_excluded(key):  # as in inference mode
        return _call_boxed(handle, *args)
    _set_key_excluded(key, True)
    try:
        return _call_boxed(handle, *args)
    finally:
        _set_key_excluded(key, False)


def _call_below_autograd(operator: Any, *args: Any) -> Any:
    if not _is_functorch_active():
        with _below_autograd():
            return _call_boxed(operator._handle, *args)
    # The levels of torch.func below this one differentiate too: undo what `Function.forward` turned off.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
        return operator(*args)


def _attend_backward(*args: Any) -> tuple[Tensor, ...]:
    """The same for `attention_backward`; without a kernel, NotImplementedError."""
    if is_compiling():
        return attention_backward(*args)
    try:
        if _is_grad_enabled() or _is_functorch_active() or forward_ad._current_level >= 0:
            return attention_backward(*args)
        return _call_below_autograd(attention_backward, *args)
    except RuntimeError as error:
        raise (unsupported(error) or error) from None


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
def attention_forward_fake(
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
    return attention_forward_fake(*args)[0]


@torch.library.register_fake("attn_ext::attention_backward", lib=_library)
def _attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    *options, wants_grad_bias, wants_grad_sinks = options
    _check_devices(query, key, value, grad_out, grad_lse, out, lse, *options)
    bias, sinks = options[:2]
    grads = (_empty_in_order_of(tensor, *tensor.shape) for tensor in (query, key, value))
    return (
        *grads,
        lse.new_empty(bias.shape if wants_grad_bias else (0,)),
        lse.new_empty(sinks.shape if wants_grad_sinks else (0,), dtype=torch.float64),
    )


@torch.library.register_fake("attn_ext::dropout_mask", lib=_library)
def _dropout_mask_fake(
    dropout_seed: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    query_begin: int,
    query_end: int,
    kv_len: int,
) -> Tensor:
    return dropout_seed.new_empty(batch, heads, query_end - query_begin, kv_len, dtype=torch.bool)


# --- Derivatives --------------------------------------------------------------------------------------------


class _Function(_SingleLevelFunction):
    """An autograd function of one level, as a kernel in the dispatcher needs it: torch.func peels its own."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def _save(ctx: Any, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> None:
    """Keeps tensors, some of them None, where autograd sees them: for backward and for forward mode."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)
    ctx.numbers = numbers


def _saved_for_jvp(ctx: Any) -> list[Tensor | None]:
    """What was saved, without the tangents of this level and with those of the levels of torch.func below."""
    return [None if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]


def _reject_gradient_of_slopes(wanted: Any) -> None:
    if wanted is not None and wanted is not False:
        raise NotImplementedError("derivatives with respect to alibi_slopes are not implemented")


class _Attention(_Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call_below_autograd(attention_forward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, (*inputs[:3], *output, *inputs[3 : 3 + _OPTION_TENSORS]), inputs[3 + _OPTION_TENSORS :])
        ctx.mark_non_differentiable(output[2])  # lse_residual
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        _reject_gradient_of_slopes(ctx.needs_input_grad[3 + _SLOPES])
        if grad_out is None and grad_lse is None:
            return (None,) * (3 + len(Options._fields))
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        wants = ctx.needs_input_grad[3:5]
        *grads, grad_bias, grad_sinks = _attend_backward(grad_out, grad_lse, *saved, *ctx.numbers, *wants)
        bias, sinks = saved[6:8]
        return (
            *grads,
            grad_bias.to(bias.dtype) if wants[0] else None,
            grad_sinks.to(sinks.dtype) if wants[1] else None,
            *((None,) * (len(Options._fields) - 2)),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, None]:
        from ._derivatives import Inputs, attention_jvp

        _reject_gradient_of_slopes(tangents[3 + _SLOPES])
        with forward_ad._set_fwd_grad_enabled(True):  # for the levels below
            query, key, value, _, _, _, *options = _saved_for_jvp(ctx)
            inputs = Inputs(query, key, value, *options[:2])
            return *attention_jvp(inputs, Options(*options, *ctx.numbers), Inputs(*tangents[:5])), None


class _AttentionBackward(_Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call_below_autograd(attention_backward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs[: 8 + _OPTION_TENSORS], inputs[8 + _OPTION_TENSORS :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from ._derivatives import Inputs, backward_vjp

        _reject_gradient_of_slopes(ctx.needs_input_grad[8 + _SLOPES])
        inputs, options = _AttentionBackward._inputs(ctx, ctx.saved_tensors)
        grad_out, grad_lse, query, key, value, bias, sinks = backward_vjp(inputs, options, Inputs(*grads))
        derived = (None, None, None)  # out, lse and its residual: their share goes to what they follow from
        return (
            grad_out,
            grad_lse if ctx.needs_input_grad[1] else None,
            *(query, key, value),
            *derived,
            bias.to(options.bias.dtype) if ctx.needs_input_grad[8] else None,
            sinks.to(options.sinks.dtype) if ctx.needs_input_grad[9] else None,
            *((None,) * len(Options._fields)),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        from ._derivatives import Inputs, backward_jvp

        _reject_gradient_of_slopes(tangents[8 + _SLOPES])
        directions = Inputs(*tangents[2:5], *tangents[8:10], *tangents[:2])
        with forward_ad._set_fwd_grad_enabled(True):
            inputs, options = _AttentionBackward._inputs(ctx, _saved_for_jvp(ctx))
            *grads, bias, sinks = backward_jvp(inputs, options, directions)
        wants_bias, wants_sinks = ctx.numbers[-2:]
        nothing = grads[0].new_empty(0)
        return *grads, bias if wants_bias else nothing, sinks if wants_sinks else nothing

    @staticmethod
    def _inputs(ctx: Any, saved: Sequence[Tensor | None]) -> tuple[Any, Options]:
        from ._derivatives import Inputs

        grad_out, grad_lse, query, key, value, _, _, _, *tensors = saved
        options = Options(*tensors, *ctx.numbers[:-2])
        return Inputs(query, key, value, options.bias, options.sinks, grad_out, grad_lse), options


_apply_attention = _Attention.apply
_apply_attention_backward = _AttentionBackward.apply


def _apply_at_level(apply: Any, args: tuple[Any, ...]) -> Any:
    """Under torch.func, record on the level that the dispatcher is at, as the built-in operators do."""
    if not _is_functorch_active():
        return apply(*args)
    with enable_single_level_autograd_function():
        return apply(*args)


def _is_differentiated(args: tuple[Any, ...]) -> bool:
    # An open forward-mode level is enough: a tangent may be there, and must not be dropped.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _attention_forward_autograd(*args: Any) -> tuple[Tensor, ...]:
    if _is_differentiated(args):
        return _apply_at_level(_apply_attention, args)
    return _call_below_autograd(attention_forward, *args)


def _attention_output_autograd(*args: Any) -> Tensor:
    if _is_differentiated(args):
        return attention_forward(*_with_all_options(*args))[0]
    return _call_below_autograd(attention_output, *args)


def _attention_backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    if _is_differentiated(args):
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


def _fold_broadcast(tensor: Tensor, vmap_dim: int | None, vmap_size: int, batch: int) -> Tensor:
    """The same, of a tensor whose batch dimension may be 1 for any batch."""
    if vmap_dim is None:
        return tensor if tensor.size(0) == 1 else _fold(tensor, None, vmap_size)
    tensor = tensor.movedim(vmap_dim, 0)
    return _fold(tensor.expand(-1, batch, *tensor.shape[2:]), 0, vmap_size)


def _one_by_one(operator: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    results = [
        operator(
            *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))
        )
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _vmap_rule(operator: Any) -> Any:
    """The mapped dimension becomes part of the batch, for which operands that are not mapped are repeated.

    Dropout, whose weights depend on the index in the batch, mapped operands without a batch dimension, and
    gradients that sum over the batch are computed for one after the other.
    """
    names = [argument.name for argument in operator._schema.arguments]
    broadcast = {
        *("bias", "mask", "key_ranges", "query_segments", "kv_segments", "alibi_slopes", "block_offsets")
    }
    alone = {
        "sinks",
        "alibi_positions",
        "block_indices",
        "block_tiles",
        "block_bits",
    }  # have no batch dimension

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        by_name = dict(zip(names, args, strict=True))
        dims = dict(zip(names, in_dims, strict=True))
        query = by_name["query"]
        batch = query.size(0) if dims["query"] is None else query.movedim(dims["query"], 0).size(1)
        if (
            by_name.get("dropout_p")
            or any(dims.get(name) is not None for name in alone)
            or by_name.get("wants_grad_sinks")
            or (by_name.get("wants_grad_bias") and _batch_size(by_name["bias"], dims["bias"]) == 1)
        ):
            return _one_by_one(operator, size, in_dims, args)
        folded = [
            arg
            if not isinstance(arg, Tensor) or name in alone
            else _fold_broadcast(arg, dim, size, batch)
            if name in broadcast
            else _fold(arg, dim, size)
            for name, arg, dim in zip(names, args, in_dims, strict=True)
        ]
        results = operator(*folded)
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, batch)), 0
        return tuple(
            result.unflatten(0, (size, batch)) if result.dim() > 1 else result.expand(size, *result.shape)
            for result in results
        ), (0,) * len(results)

    return rule


def _batch_size(tensor: Tensor, vmap_dim: int | None) -> int:
    return tensor.size(0) if vmap_dim is None else tensor.movedim(vmap_dim, 0).size(1)


for _operator in (attention_forward, attention_output, attention_backward):
    torch.library.register_vmap(_operator._schema.name, _vmap_rule(_operator), lib=_library)


@torch.library.register_vmap("attn_ext::dropout_mask", lib=_library)
def _dropout_mask_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    return _one_by_one(dropout_mask, info.batch_size, in_dims, args)


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
