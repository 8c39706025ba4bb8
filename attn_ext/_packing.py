"""Sequences of any lengths one after another, as the rows of one score matrix see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the sequence of each query begins and ends: int64, (Tq,) where not said otherwise."""

    total_queries: int
    total_keys: int
    sequence: Tensor  # that a query belongs to
    query_begin: Tensor  # the first query of its sequence, among all
    query_end: Tensor  # one past the last
    kv_begin: Tensor
    kv_end: Tensor
    cu_seqlens_k: Tensor  # (B + 1,)

    @classmethod
    def of(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_queries: int, total_keys: int) -> Packing:
        """From cumulative lengths, (B + 1,) each."""
        q, k = cu_seqlens_q.to(torch.int64), cu_seqlens_k.to(torch.int64)
        sequence = _sequence_of(q, total_queries)
        bounds = torch.stack((q[:-1], q[1:], k[:-1], k[1:]), dim=1).index_select(0, sequence)
        return cls(total_queries, total_keys, sequence, *bounds.unbind(1), k)

    @property
    def device(self) -> torch.device:
        return self.sequence.device

    @property
    def query_position(self) -> Tensor:
        """In its own sequence."""
        return torch.arange(self.total_queries, device=self.device) - self.query_begin

    @property
    def query_len(self) -> Tensor:
        return self.query_end - self.query_begin

    @property
    def kv_len(self) -> Tensor:
        return self.kv_end - self.kv_begin

    @property
    def kv_sequence(self) -> Tensor:
        """(Tk,): the sequence that a key belongs to."""
        return _sequence_of(self.cu_seqlens_k, self.total_keys)

    def own_keys(self, ranges: Tensor | None = None) -> Tensor:
        """Ranges of keys (1, Tq, n, 2), or all keys, without those of other sequences."""
        if ranges is None:
            return torch.stack((self.kv_begin, self.kv_end), -1)[None, :, None]
        return ranges.clamp(self.kv_begin[:, None, None], self.kv_end[:, None, None])


def _sequence_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,): 0 for the tokens of the first sequence, 1 for those of the next, ...

    An index of a sequence whatever the lengths: what is being traced cannot be checked.
    """
    token = torch.arange(total, device=cu_seqlens.device)
    return torch.bucketize(token, cu_seqlens[1:], right=True).clamp(max=cu_seqlens.size(0) - 2)
