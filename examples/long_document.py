"""Train a transformer layer on one document of 131,072 bytes, all of it in one sequence.

Each byte attends to its neighbourhood and to a few bytes that attend to all, the pattern of Longformer
(Beltagy et al., 2020). The document is the reference that Python's help() prints from. At each step some of
its bytes are hidden, and the layer learns to fill them in. Then it fills in a piece of the document, and its
time and memory are printed beside what dense attention would need:

    python examples/long_document.py
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_ext
from attn_ext import BlockMask, patterns

HIDDEN = 256  # the token in the place of a hidden byte
PASSAGE = 90  # bytes that are printed


def read_document(length: int) -> Tensor:
    """Its first bytes, (L,)."""
    text = "\n".join(f"{name}\n\n{topic}" for name, topic in topics.items()).encode()
    if not 1024 <= length <= len(text):
        raise SystemExit(f"--tokens must be from 1024 to {len(text)}, got {length}")
    return torch.tensor(list(text[:length]))


class EncoderLayer(nn.Module):
    """A transformer's encoder layer between an embedding of bytes and a prediction of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(HIDDEN + 1, width)
        # A byte's surroundings, and so their order, become part of it before it looks further.
        self.surroundings = nn.Conv1d(width, width, 7, padding=3)
        self.attention_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.prediction = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN))

    def embed(self, tokens: Tensor) -> Tensor:
        """(L,) -> (L, width)."""
        x = self.embedding(tokens)
        return x + self.surroundings(x.T).T

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(L, width) -> (1, H, L, D) of each."""
        projected = self.projection(self.attention_norm(x)).view(1, len(x), 3, self.heads, -1)
        return projected.transpose(1, 3).unbind(2)

    def forward(self, tokens: Tensor, mask: BlockMask, positions: Tensor) -> Tensor:
        """Scores for each byte at `positions`, (n, 256)."""
        x = self.embed(tokens)
        attended = attn_ext.block_sparse_attention(*self.query_key_value(x), mask)
        x = x + self.attention_out(attended[0].transpose(0, 1).flatten(1))
        x = x[positions]
        return self.prediction(x + self.perceptron(x))


def hide(document: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The tokens with some bytes hidden, and their positions."""
    positions = (torch.rand(document.numel()) < share).nonzero().squeeze(1)
    return document.index_fill(0, positions, HIDDEN), positions


def train(layer: EncoderLayer, document: Tensor, mask: BlockMask, steps: int, share: float) -> float:
    """Prints a line for each step; returns the median seconds of one."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    seconds = []
    print(f"\n  {'step':>4}  {'loss':>5}  {'filled in right':>15}")
    for step in range(steps):
        start = time.perf_counter()
        tokens, positions = hide(document, share)
        scores = layer(tokens, mask, positions)
        loss = F.cross_entropy(scores, document[positions])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        right = (scores.argmax(-1) == document[positions]).float().mean().item()
        print(f"  {step + 1:4}  {loss.item():5.2f}  {right:15.1%}  {'█' * round(60 * right)}", flush=True)
    return sorted(seconds)[len(seconds) // 2]


@torch.no_grad()
def print_passage(layer: EncoderLayer, document: Tensor, mask: BlockMask, share: float) -> None:
    """A piece of the document as it is, with bytes hidden, and as the layer fills them in."""
    tokens, positions = hide(document, share)
    filled = document.index_copy(0, positions, layer(tokens, mask, positions).argmax(-1))
    middle = document.numel() // 2
    piece = slice(middle, middle + PASSAGE)
    print()
    for label, shown in {
        "written": document,
        "hidden": tokens.where(tokens != HIDDEN, ord("_")),
        "filled in": filled,
    }.items():
        text = bytes(shown[piece].tolist()).decode("ascii", "replace")
        print(f"  {label:9}  {' '.join(text.splitlines())}")


def attention_seconds(attend: Callable[..., Tensor], query_key_value: tuple[Tensor, ...]) -> float:
    """One forward and backward, after one to warm up."""
    inputs = [tensor.detach().requires_grad_() for tensor in query_key_value]
    for _ in range(2):
        start = time.perf_counter()
        torch.autograd.grad(attend(*inputs).sum(), inputs)
    return time.perf_counter() - start


def print_costs(layer: EncoderLayer, document: Tensor, mask: BlockMask) -> None:
    """Attention forward and backward, block-sparse and dense; dense time from a sixteenth of the document."""
    length = document.numel()
    with torch.no_grad():
        query_key_value = layer.query_key_value(layer.embed(document))
    part = [tensor[:, :, : length // 16] for tensor in query_key_value]
    block_sparse = partial(attn_ext.block_sparse_attention, block_mask=mask)
    sparse = attention_seconds(block_sparse, query_key_value)
    dense = attention_seconds(attn_ext.attention, part) * (length / part[0].size(2)) ** 2
    scores = layer.heads * length**2 * 4
    print(
        f"\nAttention, forward and backward: {sparse:.1f} s; dense {dense:,.0f} s\n"
        f"Peak memory of the whole process: {peak_bytes() / 2**30:.1f} GiB; "
        f"one matrix of all scores {scores / 2**30:,.1f} GiB"
    )


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=131072, help="bytes of the document (%(default)s)")
    parser.add_argument("--window", type=int, default=128, help="bytes seen on each side (%(default)s)")
    parser.add_argument("--global-tokens", type=int, default=8, help="bytes that attend to all (%(default)s)")
    parser.add_argument("--width", type=int, default=128, help="features of a byte (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of training (%(default)s)")
    parser.add_argument("--hide", type=float, default=0.15, metavar="SHARE", help="of bytes (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    document = read_document(options.tokens)
    start = time.perf_counter()
    spread = torch.arange(options.global_tokens) * options.tokens // options.global_tokens
    mask = patterns.longformer(options.tokens, options.window, spread)
    seconds = time.perf_counter() - start
    print(
        f"{options.tokens:,} bytes, {options.threads} threads\n"
        f"Block mask: {mask.density:.2%} of {mask.block_map.numel():,} blocks, made in {seconds:.2f} s"
    )
    layer = EncoderLayer(options.width, options.heads)
    seconds = train(layer, document, mask, options.steps, options.hide)
    print(f"\n  {seconds:.1f} s a step, {options.tokens / seconds:,.0f} bytes a second")
    print_passage(layer, document, mask, options.hide)
    print_costs(layer, document, mask)


if __name__ == "__main__":
    main()
