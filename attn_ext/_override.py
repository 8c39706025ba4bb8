"""`override_sdpa`: attn_ext in place of torch's scaled_dot_product_attention, for models that call that.

The function is replaced in `torch.nn.functional`, where models and torch itself look it up at each call. A
`TorchFunctionMode` would also reach callers that hold the function itself, but makes every other operator
slower, by as much as a small operator takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from . import functional
from ._validation import MAX_HEAD_DIM
from .masks import FLOAT_DTYPES, is_causal_bias

__all__ = ["OverrideReport", "override_sdpa"]

_has_torch_function = torch.overrides.has_torch_function_variadic

_lock = threading.Lock()
_depth = 0  # how many contexts are open, in all threads
_fastpath_before = True
_overridden = F.scaled_dot_product_attention  # what was there before the first of them

_calls: Counter[str | None] = Counter()  # by reason for passing on; None for those through attn_ext
_traced: Counter[str | None] = Counter()


@dataclass(frozen=True)
class OverrideReport:
    """What became of the calls of `torch.nn.functional.scaled_dot_product_attention` under `override_sdpa`.

    Attributes:
        calls: eager calls through attn_ext.
        traced: calls traced into compiled graphs, as attn_ext's operators. A call counts each time that the
            compiler passes over it, and not when the graph runs.
        passed_on: the number of calls left to torch, eager or traced, for each reason.
    """

    calls: int
    traced: int
    passed_on: dict[str, int]

    def __str__(self) -> str:
        lines = [
            f"scaled_dot_product_attention: {self.calls} calls through attn_ext, {self.traced} traced, "
            f"{sum(self.passed_on.values())} passed on to torch"
        ]
        by_number = sorted(self.passed_on.items(), key=lambda item: -item[1])
        return "\n".join([*lines, *(f"  {number:6} {reason}" for reason, number in by_number)])


class override_sdpa(contextlib.ContextDecorator):  # noqa: N801 (used like a function)
    """Context and decorator in which `torch.nn.functional.scaled_dot_product_attention` is attn_ext's.

        with attn_ext.override_sdpa():
            model(inputs)
        print(attn_ext.override_sdpa.report())

    Reaches whatever looks the function up when it calls it, as transformers (``attn_implementation="sdpa"``),
    `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` do. Their fused inference path, which
    does not call it, is off in the context (`torch.backends.mha.set_fastpath_enabled`), and with it the zeros
    that `torch.nn.TransformerEncoder` writes at padded positions. A function imported by name
    (``from torch.nn.functional import ...``) beforehand stays torch's.

    Calls that attn_ext does not take (tensors that are nested, of a subclass, or not on the CPU, other
    dtypes, head dims above 1024) go to torch, and so do wrong arguments: errors are torch's. Dropout drops
    other weights than torch's for the same `torch.manual_seed`, with the same probability.

    A compiled function called in the context is compiled for it, once, and keeps its graph for calls outside.
    The context in a compiled function breaks the graph: what is called inside runs, but ``fullgraph=True``
    raises.

    The replacement is that of the process: while any thread is in a context, it holds for all threads.
    Contexts may be nested and end in any order; counts are exact. Another patch of the same function must be
    undone before the context it was made in ends.
    """

    @staticmethod
    def report() -> OverrideReport:
        """The calls since the process began, or since `reset`."""
        with _lock:
            passed_on = _calls + _traced
            del passed_on[None]
            return OverrideReport(_calls[None], _traced[None], dict(passed_on))

    @staticmethod
    def reset() -> None:
        """Sets all counts to 0."""
        with _lock:
            _calls.clear()
            _traced.clear()

    def __enter__(self) -> override_sdpa:
        global _depth, _fastpath_before, _overridden
        with _lock:
            if _depth == 0:
                _overridden, _fastpath_before = (
                    F.scaled_dot_product_attention,
                    torch.backends.mha.get_fastpath_enabled(),
                )
                F.scaled_dot_product_attention = _scaled_dot_product_attention
                # Compiled torch.nn modules read this flag, so changing it is what has them compiled anew.
                torch.backends.mha.set_fastpath_enabled(False)
            _depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        global _depth
        with _lock:
            _depth -= 1
            if _depth == 0:
                F.scaled_dot_product_attention = _overridden
                torch.backends.mha.set_fastpath_enabled(_fastpath_before)


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attn_ext.scaled_dot_product_attention` where it takes these arguments, torch's elsewhere."""
    try:
        # Compilers trace operators of any device, so ask before one is called.
        if not query.is_cpu or _has_torch_function(query, key, value):
            reason = _reason(query, key, value)
        else:
            reason = None
        if reason is None:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
            _count(None, is_compiling())
            return out
    except Exception:
        # Whatever it is, torch has its own word on it: call it once this exception is dealt with.
        reason = _reason(query, key, value) or "other arguments"
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if is_causal_bias(attn_mask):
        # Torch's rule for these ends in plain calls, which come here again and are counted then. It compares
        # the function with the one that is in `F`, and would read the bias as an array if it were another.
        function = F.scaled_dot_product_attention
        return attn_mask.__torch_function__(function, (), (query, key, value, attn_mask), options)
    _count(reason, is_compiling())
    return _overridden(query, key, value, attn_mask, **options)


def _reason(query: Any, key: Any, value: Any) -> str | None:
    """Why a call is passed on; None if there is nothing to be seen in its arguments."""
    tensors = query, key, value
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    for tensor in tensors:
        if tensor.is_nested:
            return "nested tensors"
        if _is_overloaded(tensor):
            return "tensor subclass"
        if tensor.device.type != "cpu":
            return f"tensors on {tensor.device.type}"
        if tensor.dtype not in FLOAT_DTYPES:
            return f"dtype {tensor.dtype}"
    if any(tensor.dim() and not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM for tensor in tensors):
        return f"head_dim above {MAX_HEAD_DIM} or 0"
    return None


def _is_overloaded(tensor: Tensor) -> bool:
    function = type(tensor).__torch_function__
    return function is not torch._C._disabled_torch_function_impl and type(tensor) is not Tensor


def _count(reason: str | None, traced: bool) -> None:
    with _lock:
        (_traced if traced else _calls)[reason] += 1


# What `torch.compiler.assume_constant_result` does, without loading the compiler: the call happens when it is
# traced, and leaves nothing in the graph.
_count._dynamo_marked_constant = True
