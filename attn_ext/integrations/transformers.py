"""attn_ext as an attention implementation of HuggingFace transformers 5.

    from attn_ext.integrations.transformers import check, register

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attn_ext")
    check(model)

docs/transformers.md states what is computed, and what is not yet.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..functional import attention
from ..masks import Causal, Dense, Mask, SlidingWindow
from ..reference import attention_weights

__all__ = ["attention_forward", "check", "register"]

# transformers takes names that contain one of these for implementations, or kernels to download, of its own.
_RESERVED = ("eager", "flash", "sdpa", "flex_attention", "/", "|")

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def register(name: str = "attn_ext") -> str:
    """Makes `attn_implementation=name` run a model's attention through attn_ext.

    Works for models loaded or made afterwards, and for others with `model.set_attn_implementation(name)`.
    Some models write out their own attention and accept any name in silence: call `check(model)` once.

    May be called any number of times, and with several names.

    Args:
        name: what to call it in transformers.

    Returns:
        The name.

    Raises:
        TypeError: name is not a str.
        ValueError: name is empty or contains what transformers keeps for itself, such as "flash" or "/".
        ImportError: transformers 5 is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    reserved = [part for part in _RESERVED if part in name]
    if reserved or not name:
        raise ValueError(
            f"name must be a word that transformers does not interpret itself, got {name!r}"
            + "".join(f", which contains {part!r}" for part in reserved[:1])
        )
    _require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention_forward)
    # Without a mask function of the same name no mask is made: padding, windows and packing would be lost in
    # silence. This one makes none where the mask is causal, or full, and `attention_forward` knows it.
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for attention.

    A mask says all there is to say about which keys are visible. Without one, several queries are causal,
    aligned top-left, if `is_causal`, or else `module.is_causal`, says so; a single query sees all keys; and
    `sliding_window` bounds how far a query sees, as it does for transformers' flash attention.

    Args:
        module: the attention layer.
        query: (B, Hq, L, Dk), float32, float64, float16 or bfloat16.
        key: (B, Hkv, S, Dk), of the dtype of query; Hq is a multiple of Hkv.
        value: (B, Hkv, S, Dv), likewise.
        attention_mask: None, or broadcastable to (B, Hq, L, S): bool (True = attend) or added to the scores.
        scaling: factor of the scores, 1 / sqrt(Dk) by default.
        dropout: 0.
        is_causal: overrides that of module.
        sliding_window: a query sees the keys less than this far away, itself included.
        softcap, s_aux, indices, block_indices: None.
        position_bias: added to the scores, broadcastable to (B, Hq, L, S); must not require grad.
        output_attentions: also return the weights, for which memory of B Hq L S is needed.
        kwargs: what concerns other implementations, and is not read.

    Returns:
        out (B, L, Hq, Dv), contiguous, and the weights (B, Hq, L, S) or None. Both are differentiable.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.
        NotImplementedError: dropout > 0, an argument that must be None is not, or attention_mask or
            position_bias requires grad.
    """
    _reject_dropout(dropout)
    _reject_given(softcap=softcap, s_aux=s_aux, indices=indices, block_indices=block_indices)
    _reject_gradients(attention_mask=attention_mask, position_bias=position_bias)
    if attention_mask is not None:
        mask: Mask | None = Dense(attention_mask)
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        mask = _implied_mask(bool(query.shape[2] > 1 and is_causal), sliding_window)
    if position_bias is not None:
        mask = Dense(position_bias) if mask is None else mask & Dense(position_bias)

    out = attention(query, key, value, mask=mask, scale=scaling).transpose(1, 2).contiguous()
    if not output_attentions:
        return out, None
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = attention_weights(query, key, mask=mask, scale=scaling, dtype=dtype)
    return out, weights.to(query.dtype)


def check(model: torch.nn.Module) -> None:
    """Raises unless the attention of a model runs through attn_ext.

    Longformer, BigBird, Bloom and others compute their attention themselves and never ask for the
    implementation they are configured with. So this looks at the classes of the model's modules for one whose
    methods refer to transformers' registry of implementations. That takes no inputs, which differ from model
    to model, no forward pass and no source files; it cannot tell whether some of many layers go another way.

    Args:
        model: a transformers model. Parts of it that are configured otherwise are not looked at.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: model is not configured to attn_ext.
        NotImplementedError: model, or a part of it that has attention, never calls the implementation.
        ImportError: transformers 5 is not installed.
    """
    _require_transformers()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configured = [part for part in parts if _runs_attn_ext(part.config._attn_implementation)]
    if not configured:
        raise ValueError(
            f"{type(model).__name__} must be configured to attn_ext, got attn_implementation="
            f"{model.config._attn_implementation!r}: call register(), then "
            'model.set_attn_implementation("attn_ext")'
        )
    # The base class of all models, which keeps the registry, is no evidence.
    common = set(PreTrainedModel.__mro__)
    for part in configured:
        classes = {type(module) for module in part.modules()}
        if any(map(_asks_for_implementation, {base for cls in classes for base in cls.__mro__} - common)):
            continue
        # A part of a model, such as a convolutional backbone, may have no attention at all.
        if part is model or any("Attention" in cls.__name__ for cls in classes):
            raise NotImplementedError(
                f"{type(part).__name__} computes its attention itself and never calls an attention "
                f"implementation: attn_implementation={part.config._attn_implementation!r} has no effect"
            )


def _require_transformers() -> None:
    try:
        from transformers.masking_utils import AttentionMaskInterface  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'attn_ext.integrations.transformers needs transformers 5: pip install "transformers>=5"'
        ) from error


def _reject_dropout(dropout: float) -> None:
    if dropout > 0:
        raise NotImplementedError(
            f"dropout is not implemented in this release, got dropout={dropout}: set the attention dropout "
            "of the model's config to 0, or call model.eval()"
        )


def _reject_given(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise NotImplementedError(f"{name} is not implemented in this release")


def _reject_gradients(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"the gradient of {name} is not implemented in this release: run the model under "
                "torch.no_grad(), or freeze the parameters that it comes from"
            )


def _implied_mask(is_causal: bool, sliding_window: int | None) -> Mask | None:
    if sliding_window is None:
        return Causal() if is_causal else None
    if sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    reach = sliding_window - 1
    # Causal queries start at the first key, and a static cache has more of these; others end at the last.
    if is_causal:
        return SlidingWindow(left=reach, right=0)
    return SlidingWindow(left=reach, right=reach, align="bottom_right")


def _runs_attn_ext(name: str | None) -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(name) is attention_forward


def _asks_for_implementation(cls: type) -> bool:
    """Whether a method that this class itself defines refers to the registry of implementations."""
    methods = (inspect.unwrap(attribute) for attribute in vars(cls).values() if inspect.isfunction(attribute))
    return any(_REGISTRY in method.__code__.co_names for method in methods if inspect.isfunction(method))
