"""Attention modules with the parameter names of the models they replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .functional import attention
from .masks import Causal, Dense

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head attention as "transformers from scratch" tutorials write it, without the L x L tensor.

    A drop-in for the module with the linear layers ``values``, ``keys``, ``queries`` and ``fc_out``: it loads
    that module's state dict and gives the same outputs and gradients (Vaswani et al., 2017, section 3.2),
    with memory that grows with L instead of L².

    Args:
        embed_size: size E of the embedding, a multiple of ``heads``.
        heads: number of attention heads; each has ``head_dim = embed_size // heads`` features.
        scale: what the scores are divided by the square root of: ``"embed_size"``, which those tutorials use,
            or ``"head_dim"``, which the paper and `torch.nn.MultiheadAttention` use.
        shared_projection: True: ``values``, ``keys`` and ``queries`` are Linear(head_dim, head_dim), one
            projection for all heads. False: they are Linear(embed_size, embed_size).
        bias: whether these three have a bias; ``fc_out`` always has one.
        device, dtype: of the parameters.

    Raises:
        TypeError: ``embed_size`` or ``heads`` is not an int.
        ValueError: ``heads`` does not divide ``embed_size``, or ``scale`` is unknown.
    """

    def __init__(
        self,
        embed_size: int,
        heads: int,
        *,
        scale: Literal["embed_size", "head_dim"] = "embed_size",
        shared_projection: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embed_size", embed_size), ("heads", heads)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")
        if embed_size % heads:
            raise ValueError(
                f"embed_size must be a multiple of heads, got embed_size={embed_size}, heads={heads}"
            )
        if scale not in ("embed_size", "head_dim"):
            raise ValueError(f"scale must be 'embed_size' or 'head_dim', got {scale!r}")

        self.embed_size = embed_size
        self.heads = heads
        self.head_dim = embed_size // heads
        self.scale = scale
        self.shared_projection = shared_projection

        size = self.head_dim if shared_projection else embed_size
        self.values = nn.Linear(size, size, bias=bias, device=device, dtype=dtype)
        self.keys = nn.Linear(size, size, bias=bias, device=device, dtype=dtype)
        self.queries = nn.Linear(size, size, bias=bias, device=device, dtype=dtype)
        self.fc_out = nn.Linear(embed_size, embed_size, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_explain_projection_mismatch)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        heads: int,
        *,
        scale: Literal["embed_size", "head_dim"] = "embed_size",
    ) -> SelfAttention:
        """Build the module a state dict belongs to: sizes, dtype, device and kind of projection come from it.

        ``heads`` and ``scale`` leave no trace in a state dict and have to be known.

        Raises:
            ValueError: ``values.weight`` or ``fc_out.weight`` is missing, or ``values.weight`` has neither of
                the shapes (head_dim, head_dim) and (embed_size, embed_size).
            RuntimeError: from `load_state_dict`, about any other entry.
        """
        missing = [name for name in ("values.weight", "fc_out.weight") if name not in state_dict]
        if missing:
            raise ValueError(
                f"state_dict has no {' and no '.join(missing)}; its keys are {sorted(state_dict)}"
            )
        projection, output = state_dict["values.weight"], state_dict["fc_out.weight"]
        shared = projection.shape != output.shape
        module = cls(
            output.shape[0],
            heads,
            scale=scale,
            shared_projection=shared,
            bias="values.bias" in state_dict,
            device=output.device,
            dtype=output.dtype,
        )
        if projection.shape != module.values.weight.shape:
            raise ValueError(
                f"values.weight must be (head_dim, head_dim) = {tuple(module.values.weight.shape)} or "
                f"(embed_size, embed_size) = {tuple(output.shape)} for heads={heads}, "
                f"got {tuple(projection.shape)}"
            )
        module.load_state_dict(state_dict)
        return module

    def forward(
        self,
        values: Tensor,
        keys: Tensor | None = None,
        query: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend from ``query`` to ``keys`` and ``values``; ``module(x)`` is ``module(x, x, x)``.

        Args:
            values, keys: (N, Lk, E).
            query: (N, Lq, E).
            mask: 1-D to 4-D, broadcastable to (N, heads, Lq, Lk), of any dtype; 0 means "do not attend".
            is_causal: query i attends to keys 0..i only, besides what ``mask`` excludes.

        Returns:
            (N, Lq, E).

        A query with nothing left to attend to gets zeros from the heads, so its output is the bias of
        ``fc_out``, and no gradient. The tutorials' ``masked_fill(mask == 0, -1e20)`` gives such a query the
        mean of all values, masked ones included.

        Raises:
            TypeError: an argument is not a tensor, or only one of ``keys`` and ``query`` is given.
            ValueError: a shape is not as above.
        """
        if keys is None and query is None:
            keys = query = values
        self._check_inputs(values, keys, query, mask)

        masking = Causal() if is_causal else None
        if mask is not None:
            attend = Dense(mask != 0)
            masking = attend if masking is None else masking & attend

        out = attention(
            self._project(self.queries, query),
            self._project(self.keys, keys),
            self._project(self.values, values),
            mask=masking,
            scale=getattr(self, self.scale) ** -0.5,
        )
        return self.fc_out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"embed_size={self.embed_size}, heads={self.heads}, scale={self.scale!r}"

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(N, L, E) -> (N, heads, L, head_dim), a view in memory order (N, L, heads, head_dim)."""
        split = (self.heads, self.head_dim)
        x = linear(x.unflatten(2, split)) if self.shared_projection else linear(x).unflatten(2, split)
        return x.transpose(1, 2)

    def _check_inputs(
        self, values: Tensor, keys: Tensor | None, query: Tensor | None, mask: Tensor | None
    ) -> None:
        for name, x in (("values", values), ("keys", keys), ("query", query)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{name} must be a tensor, got {type(x).__name__}; give values alone, or all three"
                )
            if x.dim() != 3 or x.shape[2] != self.embed_size:
                raise ValueError(f"{name} must be (N, L, embed_size={self.embed_size}), got {tuple(x.shape)}")
        if values.shape != keys.shape:
            raise ValueError(f"values and keys must agree, got {tuple(values.shape)} and {tuple(keys.shape)}")
        if query.shape[0] != keys.shape[0]:
            raise ValueError(
                f"query and keys must agree in N, got {tuple(query.shape)} and {tuple(keys.shape)}"
            )
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        scores = (query.shape[0], self.heads, query.shape[1], keys.shape[1])
        broadcastable = 1 <= mask.dim() <= 4 and all(
            size in (1, full) for size, full in zip(reversed(mask.shape), reversed(scores), strict=False)
        )
        if not broadcastable:
            raise ValueError(
                f"mask must be broadcastable to (N, heads, query_len, key_len) = {scores}, "
                f"got {tuple(mask.shape)}"
            )


def _explain_projection_mismatch(
    module: SelfAttention,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Say which constructor argument fits a state dict that has the other kind of projection."""
    weight = state_dict.get(f"{prefix}values.weight")
    needed = not module.shared_projection
    other = module.head_dim if needed else module.embed_size
    if module.heads > 1 and weight is not None and tuple(weight.shape) == (other, other):
        error_msgs.append(
            f"{prefix}values.weight is {tuple(weight.shape)}: this state dict needs "
            f"SelfAttention({module.embed_size}, {module.heads}, shared_projection={needed}), "
            "or use SelfAttention.from_state_dict"
        )
