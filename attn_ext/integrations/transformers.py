"""attn_ext as an attention implementation of HuggingFace transformers 5.

    from attn_ext.integrations.transformers import check, register

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attn_ext")
    check(model)

docs/transformers.md states what is computed, and what is not.
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

    Works for models loaded or made afterwards, and for others with `model.set_attn_implementation(name)`,
    which does not reach the encoder and decoder of a T5. Some models write out their own attention and accept
    any name in silence. So call `check(model)` once.

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

    The weights are the softmax of softcap * tanh(query @ key^T * scaling / softcap) + position_bias + mask.

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
        dropout: probability with which a weight becomes 0; the others are multiplied by 1 / (1 - dropout).
            Applied whatever module.training is: models pass 0 in evaluation. Which weights is decided by
            torch's generator, so that a checkpointed layer, run again, drops the same.
        is_causal: overrides that of module.
        sliding_window: a query sees the keys less than this far away, itself included.
        softcap: bounds the scores as above; None or 0: they stay.
        s_aux: (Hq,), of any of the four dtypes: the logit of one more key for each head, whose value is 0.
        position_bias: broadcastable to (B, Hq, L, S), of any of the four dtypes.
        indices, block_indices: None.
        output_attentions: also return the weights, before dropout and without the column of s_aux, for which
            memory of B Hq L S is needed.
        kwargs: what concerns other implementations, and is not read.

    Returns:
        out (B, L, Hq, Dv), contiguous, and the weights (B, Hq, L, S) or None. Both are differentiable, in
        attention_mask, s_aux and position_bias too.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, or a number is out of range.
        NotImplementedError: indices or block_indices is not None.
    """
    _reject_given(indices=indices, block_indices=block_indices)
    if attention_mask is not None:
        mask: Mask | None = Dense(attention_mask)
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        mask = _implied_mask(bool(query.shape[2] > 1 and is_causal), sliding_window)

    scores = {"mask": mask, "bias": position_bias, "scale": scaling, "softcap": softcap, "sinks": s_aux}
    out = attention(query, key, value, **scores, dropout_p=dropout).transpose(1, 2).contiguous()
    if not output_attentions:
        return out, None
    dtype = torch.promote_types(query.dtype, torch.float32)
    return out, attention_weights(query, key, **scores, dtype=dtype).to(query.dtype)


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
        ValueError: model, or every part of it that has attention, is not configured to attn_ext.
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
        modules, others = _split_by_configuration(part)
        classes = {type(module) for module in modules}
        if any(map(_asks_for_implementation, {base for cls in classes for base in cls.__mro__} - common)):
            continue
        has_attention = any("Attention" in cls.__name__ for cls in classes)
        if part is model and others and not has_attention:
            raise ValueError(
                f"the parts of {type(part).__name__} must be configured to attn_ext, got attn_implementation="
                f"{others[0].config._attn_implementation!r} in {type(others[0]).__name__}, which "
                "model.set_attn_implementation may not reach: pass attn_implementation when it is made, "
                "or call the method of each part"
            )
        # A part of a model, such as a convolutional backbone, may have no attention at all.
        if part is model or has_attention:
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


def _reject_given(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise NotImplementedError(f"{name} is not implemented in this release")


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


def _split_by_configuration(part: Any) -> tuple[list[torch.nn.Module], list[Any]]:
    """The modules of a part that its configuration is for, and the outermost parts in it with another."""
    from transformers import PreTrainedModel

    modules: list[torch.nn.Module] = []
    others: list[Any] = []
    pending = [part]
    while pending:
        module = pending.pop()
        if isinstance(module, PreTrainedModel) and not _runs_attn_ext(module.config._attn_implementation):
            others.append(module)
        else:
            modules.append(module)
            pending.extend(module.children())
    return modules, others


def _asks_for_implementation(cls: type) -> bool:
    """Whether a method that this class itself defines refers to the registry of implementations."""
    methods = (inspect.unwrap(attribute) for attribute in vars(cls).values() if inspect.isfunction(attribute))
    return any(_REGISTRY in method.__code__.co_names for method in methods if inspect.isfunction(method))
