"""Attention to the keys of the same bucket of a locality-sensitive hash: Reformer (Kitaev et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _merge, functional
from .._block_cover import evaluate
from .._blocks import assemble, check_length, make_grid
from .._validation import _check_bool
from ..block_mask import BlockMask
from ._shapes import check_seed

_MAX_CHUNK = 4096  # tokens, each of which has bits for two chunks


@dataclass(frozen=True, eq=False)
class LSH:
    """Tokens sorted by bucket, and the mask of the sorted problem. Made by `lsh`."""

    buckets: Tensor  # (B, H, n_hashes, L), int64
    order: Tensor  # (B, H, n_hashes, L), int64: positions by bucket, and within one in rising order
    block_mask: BlockMask  # of tokens in that order; batch entry b * n_hashes + n is hash n of entry b

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention in sorted order, of all hashes in one call, whose parts are merged by their lse.

        A key that several hashes show to a query counts once for each of them.

        Args:
            query, key: (B, H, L, D), with as many heads as were hashed. Reformer's are one tensor, the keys
                scaled to length 1.
            value: (B, H, L, Dv).
            scale, softcap, dropout_p, dropout_seed, return_lse: as for `attn_ext.block_sparse_attention`.

        Returns:
            out (B, H, L, Dv), and lse (B, H, L) with `return_lse`, in the order of the tokens.

        Raises:
            TypeError: `query`, `key` or `value` is not a tensor.
            ValueError: a shape does not fit; and as `attn_ext.block_sparse_attention`.
        """
        batch, heads, hashes, length = self.order.shape
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dim() != 4 or tensor.shape[:3] != (batch, heads, length):
                raise ValueError(
                    f"{name} must be ({batch}, {heads}, {length}, D), as what was hashed, "
                    f"got shape {tuple(tensor.shape)}"
                )
        order = self.order.transpose(1, 2)
        out, lse = functional.block_sparse_attention(
            *(_take(tensor, order).flatten(0, 1) for tensor in (query, key, value)),
            self.block_mask,
            scale=scale,
            softcap=softcap,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=True,
        )
        places = order.argsort(-1)
        out = out.unflatten(0, (batch, hashes))
        out = out.gather(3, places.unsqueeze(-1).expand_as(out))
        lse = lse.unflatten(0, (batch, hashes)).gather(3, places)
        merged = out[:, 0], lse[:, 0]
        for index in range(1, hashes):
            merged = _merge.merge(*merged, out[:, index], lse[:, index])
        return merged if return_lse else merged[0]


def lsh(
    qk: Tensor,
    n_buckets: int,
    n_hashes: int = 1,
    seed: int = 0,
    *,
    causal: bool = False,
    chunk: int | None = None,
) -> LSH:
    """Hashes tokens and sorts them by bucket: a query sees its own chunk of sorted tokens and the one before.

    The bucket of x is the index of the largest of [xR; -xR], with R random. A token sees itself only if it
    sees no other.

    Args:
        qk: (B, H, L, D), what is hashed: queries and keys in one.
        n_buckets: an even number.
        n_hashes: rounds, each with an R of its own.
        seed: of the rotations R, which all batch entries and heads share.
        causal: keys at later positions are hidden.
        chunk: tokens of a chunk, a multiple of 16; twice the mean bucket by default, rounded up to one. No
            more than there are tokens, and at most 4096: memory is that of its square.

    Raises:
        TypeError: an argument is of another type.
        ValueError: `qk` does not have 4 dimensions, batch entries and heads, or a number is out of range.
    """
    if not isinstance(qk, Tensor) or not qk.is_floating_point():
        raise TypeError(f"qk must be a floating-point tensor, got {getattr(qk, 'dtype', type(qk).__name__)}")
    if qk.dim() != 4 or 0 in qk.shape[:2]:
        raise ValueError(f"qk must be (B, H, L, D), neither B nor H 0, got shape {tuple(qk.shape)}")
    check_length("n_buckets", n_buckets, least=2)
    check_length("n_hashes", n_hashes, least=1)
    if n_buckets % 2:
        raise ValueError(f"n_buckets must be even, got {n_buckets}")
    check_seed(seed)
    _check_bool("causal", causal)
    length = qk.size(2)
    if chunk is None:
        chunk = max(-(-2 * length // (n_buckets * 16)), 1) * 16
    check_length("chunk", chunk, least=16)
    if chunk % 16:
        raise ValueError(f"chunk must be a multiple of 16, got {chunk}")
    chunk = min(chunk, max(-(-length // 16), 1) * 16)
    if chunk > _MAX_CHUNK:
        raise ValueError(
            f"chunk must be at most {_MAX_CHUNK} tokens, got {chunk} for {length} tokens in {n_buckets} "
            "buckets: give more buckets, or a smaller chunk"
        )

    buckets = _hash(qk, n_buckets, n_hashes, seed)
    order = buckets.sort(dim=-1, stable=True).indices
    position = order.transpose(1, 2).flatten(0, 1)
    return LSH(buckets, order, _chunk_mask(position, chunk, causal))


def _hash(qk: Tensor, n_buckets: int, n_hashes: int, seed: int) -> Tensor:
    """(B, H, n_hashes, L)."""
    dtype = torch.promote_types(qk.dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    rotations = torch.randn(n_hashes, qk.size(3), n_buckets // 2, generator=generator).to(qk.device, dtype)
    rotated = qk.detach().to(dtype).unsqueeze(2) @ rotations
    return torch.cat((rotated, -rotated), -1).argmax(-1)


def _take(tensor: Tensor, order: Tensor) -> Tensor:
    """(B, H, L, D) in the order of each hash, (B, n_hashes, H, L) -> (B, n_hashes, H, L, D)."""
    index = order.unsqueeze(-1).expand(*order.shape, tensor.size(-1))
    return tensor.unsqueeze(1).expand(-1, order.size(1), -1, -1, -1).gather(3, index)


def _chunk_mask(position: Tensor, chunk: int, causal: bool) -> BlockMask:
    """Of tokens at positions (B * n_hashes, H, L) in sorted order."""
    batch, heads, length = position.shape
    grid = make_grid(length, length, chunk)
    row = torch.arange(grid.query_blocks, device=position.device).unsqueeze(1)
    seen = row + torch.tensor([-1, 0], device=position.device)
    keys = (row * grid.kv_blocks + seen)[seen >= 0]
    keys = (torch.arange(batch * heads, device=keys.device).unsqueeze(1) * grid.kv_blocks**2 + keys).flatten()
    lonely = _sees_no_other(position, chunk, causal)

    def visible(entry: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (query != key) | lonely[entry, head, query]
        if causal:
            allowed = allowed & (position[entry, head, key] <= position[entry, head, query])
        return allowed

    tiles, bits = evaluate(grid, heads, keys, visible)
    return BlockMask(assemble(grid, batch, heads, keys, tiles, bits), length, length)


def _sees_no_other(position: Tensor, chunk: int, causal: bool) -> Tensor:
    """Whether no other token of its chunk and the one before is there, or before it if causal."""
    length = position.size(-1)
    if not causal:
        return torch.full_like(position, length == 1, dtype=torch.bool)
    padded = torch.nn.functional.pad(position, (0, -length % chunk), value=length)
    earliest = padded.unflatten(-1, (-1, chunk)).amin(-1)
    before = torch.nn.functional.pad(earliest, (1, 0), value=length)[..., :-1]
    earliest = torch.minimum(earliest, before).repeat_interleave(chunk, -1)[..., :length]
    return earliest == position
