"""What is measured: problem shapes, their inputs, and how much work each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "recorded", "training"]
_DTYPE_LABELS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_DIRECTION_LABELS = {"forward": "fwd", "recorded": "fwd with grad", "training": "fwd+bwd"}


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        query_length, key_length: Lq and Lk.
        heads, key_heads: Hq and Hkv; fewer key heads than query heads is grouped-query attention.
        direction: ``forward`` on inputs that need no gradient, ``recorded`` the same with autograd recording
            it, or ``training``, forward and backward.
        group: the part of its suite's report that the case belongs to.
        quick: belongs to the short selection of ``--quick``.
    """

    heads: int
    query_length: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    direction: Direction = "forward"
    batch: int = 1
    key_heads: int = 0
    key_length: int = 0
    group: str = "long"
    quick: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_heads", self.key_heads or self.heads)
        object.__setattr__(self, "key_length", self.key_length or self.query_length)

    @property
    def name(self) -> str:
        """For example ``fwd bf16 causal GQA 32/8x2048x128``: [batch x] heads x length x head_dim."""
        grouped = self.key_heads != self.heads
        heads = f"{self.heads}/{self.key_heads}" if grouped else f"{self.heads}"
        if self.group in ("decode", "overhead"):
            length = f"Lk{self.key_length}" if self.group == "decode" else f"L{self.query_length}"
            shape = f"B{self.batch} H{heads} {length} D{self.head_dim}"
        else:
            batch = f"{self.batch}x" if self.batch > 1 else ""
            shape = f"{batch}{heads}x{self.key_length}x{self.head_dim}"
        label = "decode" if self.group == "decode" else _DIRECTION_LABELS[self.direction]
        words = [label, _DTYPE_LABELS[self.dtype], "causal" * self.causal, "GQA" * grouped, shape]
        return " ".join(word for word in words if word)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def flops(self) -> float:
        """4 B H Lq Lk D for the two products; half when causal; x 3.5 with the five of the backward."""
        forward = 4.0 * self.batch * self.heads * self.query_length * self.key_length * self.head_dim
        return forward * (0.5 if self.causal else 1.0) * (3.5 if self.direction == "training" else 1.0)

    @property
    def bytes_moved(self) -> int:
        """What a forward cannot avoid to read and write: query, key, value and the output, once each."""
        query = self.batch * self.heads * self.query_length * self.head_dim
        key = self.batch * self.key_heads * self.key_length * self.head_dim
        return (2 * query + 2 * key) * self.torch_dtype.itemsize

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value (leaves of autograd) and the gradient of the output, standard normal."""
        generator = torch.Generator().manual_seed(seed)
        query_shape = (self.batch, self.heads, self.query_length, self.head_dim)
        key_shape = (self.batch, self.key_heads, self.key_length, self.head_dim)

        def normal(shape: tuple[int, ...]) -> Tensor:
            # Drawn in place: a temporary would count in the memory suite.
            return torch.empty(shape, dtype=self.torch_dtype).normal_(generator=generator)

        query, key, value = normal(query_shape), normal(key_shape), normal(key_shape)
        for tensor in (query, key, value):
            tensor.requires_grad_(self.direction != "forward")
        return query, key, value, normal(query_shape)


def _sweep(dtype: str) -> list[Case]:
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    return [Case(8, length, 64, dtype, group="length", quick=length < 1024) for length in lengths]


DENSE = [
    # The length sweep also holds the plain 8x1024x64 and 8x4096x64.
    *_sweep("float32"),
    *_sweep("bfloat16"),
    Case(8, 4096, 64, causal=True),
    Case(16, 2048, 128),
    Case(8, 4096, 64, "bfloat16", causal=True),
    Case(16, 2048, 128, "bfloat16"),
    Case(16, 2048, 128, "bfloat16", causal=True),
    Case(32, 2048, 128, "bfloat16", causal=True, key_heads=8),
    Case(8, 1024, 64, "float16", quick=True),
    Case(8, 4096, 64, "float16", causal=True),
    Case(12, 128, 64, batch=8, group="short", quick=True),
    Case(12, 128, 64, "bfloat16", batch=8, group="short", quick=True),
    Case(8, 10, 32, batch=32, group="short", quick=True),
    Case(32, 1, 128, key_heads=8, key_length=4096, group="decode", quick=True),
    Case(32, 1, 128, "bfloat16", key_heads=8, key_length=4096, group="decode", quick=True),
    Case(32, 1, 128, "bfloat16", batch=8, key_heads=8, key_length=2048, group="decode"),
    Case(8, 1, 64, key_length=32768, group="decode"),
]

TRAINING = [
    Case(8, 1024, 64, direction="training", quick=True),
    Case(8, 4096, 64, causal=True, direction="training"),
    Case(8, 4096, 64, "bfloat16", causal=True, direction="training"),
    Case(8, 4096, 64, "float16", causal=True, direction="training"),
    Case(12, 128, 64, batch=8, direction="training", group="short", quick=True),
    Case(12, 128, 64, "bfloat16", batch=8, direction="training", group="short", quick=True),
]

OVERHEAD = [
    Case(heads, length, head_dim, direction=direction, group="overhead", quick=True)
    for heads, length, head_dim in ((1, 1, 16), (4, 10, 32))
    for direction in ("forward", "recorded", "training")
]

SUITES = {"dense": DENSE, "training": TRAINING, "overhead": OVERHEAD}
