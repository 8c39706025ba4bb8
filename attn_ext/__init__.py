"""Exact, fast, differentiable attention for PyTorch.

    out = attn_ext.scaled_dot_product_attention(query, key, value, is_causal=True)  # torch's signature
    out, lse = attn_ext.attention(query, key, value, mask=Causal() & KeyLengths(lengths), return_lse=True)

`attn_ext.nn` holds modules, `attn_ext.patterns` the block masks of the literature, `attn_ext.integrations`
what other libraries call, `attn_ext.reference` the definition of what the kernels compute, and
`attn_ext.testing` the tolerances they are held to.
`python -m attn_ext.info` describes the build and this machine.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._merge import merge
from ._override import override_sdpa
from ._version import __version__
from .block_mask import BlockMask
from .decode import attention_decode
from .functional import attention, block_sparse_attention, scaled_dot_product_attention
from .masks import Causal, Dense, KeyLengths, Mask, Prefix, Segments, SlidingWindow
from .varlen import attention_varlen

__all__ = [
    "BlockMask",
    "CacheFullError",
    "Causal",
    "Dense",
    "KVCache",
    "KeyLengths",
    "Mask",
    "PagedKVCache",
    "Prefix",
    "Segments",
    "SlidingWindow",
    "__version__",
    "attention",
    "attention_decode",
    "attention_varlen",
    "block_sparse_attention",
    "is_supported",
    "merge",
    "override_sdpa",
    "scaled_dot_product_attention",
    "why_unsupported",
]

_LAZY_MODULES = ("cache", "integrations", "nn", "patterns", "reference", "testing")
_LAZY_NAMES = {
    **dict.fromkeys(("CacheFullError", "KVCache", "PagedKVCache"), "cache"),
    **dict.fromkeys(("is_supported", "why_unsupported"), "_support"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_MODULES, *_LAZY_NAMES})
