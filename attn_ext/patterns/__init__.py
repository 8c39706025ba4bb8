"""Which keys the queries of the literature's sparse attentions see, as block masks.

    mask = patterns.longformer(seq_len, window=256, global_tokens=[0])
    mask = patterns.strided(seq_len, stride=128) & attn_ext.KeyLengths(lengths)

Lengths count tokens, and patterns are exact to the token, except where the paper's pattern is one of blocks.
Where `kv_len` is not the number of queries, both start at position 0. Masks are made on the CPU, those by
content where their tensors are; `.to(device)` moves them.

`patterns.deepspeed` makes the layouts of DeepSpeed's sparsity configurations.
"""

from __future__ import annotations

from . import deepspeed
from ._bigbird import bigbird
from ._content import from_scores, topk_blocks
from ._lsh import LSH, lsh
from ._sparse_transformer import fixed, strided
from ._windows import dilated, longformer, prefix_lm, sliding_window, streaming

__all__ = [
    "LSH",
    "bigbird",
    "deepspeed",
    "dilated",
    "fixed",
    "from_scores",
    "longformer",
    "lsh",
    "prefix_lm",
    "sliding_window",
    "streaming",
    "strided",
    "topk_blocks",
]
