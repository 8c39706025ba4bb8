"""Eight conversations that share a system prompt, generated together over a paged cache.

A Llama-shaped model of bytes, with random weights, answers questions about Python with the first pages of its
reference as the system prompt. The prompt is read once and its pages are shared (`PagedKVCache.fork`), the
questions are packed without padding (`attention_varlen`), and each step is one `attention_decode` for all.
Beside it the same weights run on torch's scaled_dot_product_attention, with padding and a cache that is
concatenated. Both must choose the same bytes; then the speed of both and the memory of their caches, in int8
too, are printed for growing system prompts:

    python examples/chat_decode.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_ext
from attn_ext import Causal, PagedKVCache

QUESTIONS = (
    "What does yield do?",
    "How do I open a file and close it whatever happens?",
    "Why is my default list shared by all calls?",
    "is or ==?",
    "Can a function return two values?",
    "When is a tuple better than a list?",
    "How do I sort a dictionary by its values?",
    "What are decorators good for?",
)
REFERENCE = "\n".join(topics.values()).encode()
VOCABULARY = 256
HEAD_DIM = 64
GROUP = 4  # query heads that share a key head
PAGE_SIZE = 16

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, query, key, value), each (..., H, D)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (RoFormer, Su et al., 2021), half-split: (..., H, D), cos and sin (..., 1, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(nn.Module):
    """Attention and a SwiGLU perceptron (Shazeer, 2020), each after RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads, hidden = width // HEAD_DIM, width * 11 // 4
        self.heads = heads, heads // GROUP, heads // GROUP
        self.attention_norm = nn.RMSNorm(width)
        self.projection = nn.Linear(width, sum(self.heads) * HEAD_DIM, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.perceptron_norm = nn.RMSNorm(width)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        projected = self.projection(self.attention_norm(x)).unflatten(-1, (-1, HEAD_DIM))
        query, key, value = projected.split(self.heads, dim=-2)
        attended = attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        x = x + self.attention_out(attended.flatten(-2))
        gate, up = self.gate_and_up(self.perceptron_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """The decoder of Llama (Touvron et al., 2023), whose attention and cache are the caller's."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.kv_heads = width // HEAD_DIM // GROUP
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.prediction = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # the variance of what comes in
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits, (..., 256), of what follows each of the tokens (...)."""
        x = self.embedding(tokens)
        frequencies = 1e4 ** -(torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
        angles = positions[..., None, None] * frequencies
        cos, sin = angles.cos().float(), angles.sin().float()
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, partial(attend, index))
        return self.prediction(x)


class PagedChat:
    """Conversations on attn_ext, over caches of shared pages."""

    def __init__(self, model: Llama, pages: int, conversations: int, dtype: torch.dtype) -> None:
        self.model = model
        self.caches = [
            PagedKVCache(pages, PAGE_SIZE, model.kv_heads, HEAD_DIM, max_sequences=conversations, dtype=dtype)
            for _ in model.layers
        ]
        for cache in self.caches:
            cache.allocate()  # sequence 0

    def fork(self, conversations: int) -> None:
        """Has the one conversation there is go on as several."""
        for cache in self.caches:
            cache.fork(0, conversations - 1)

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Logits (n, 256) after one more prompt for each conversation, which so far are the same."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = F.pad(lengths.cumsum(0), (1, 0))
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]) + self.caches[0].seqlens[0]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self.caches[layer]
            own, own_lse = attn_ext.attention_varlen(
                query, key, value, ends, ends, mask=Causal(), return_lse=True
            )
            # What the conversations have in common, all queries see alike: as rows of one problem.
            own, rows = (tensor.unsqueeze(0).transpose(1, 2) for tensor in (own, query))
            shared = (tensor.unsqueeze(0) for tensor in cache.read(0))
            out, _ = attn_ext.merge(
                own, own_lse.unsqueeze(0), *attn_ext.attention(rows, *shared, return_lse=True)
            )
            tokens = (tensor.split(lengths.tolist()) for tensor in (key, value))
            for index, new in enumerate(zip(*tokens, strict=True)):
                cache.append(*(tensor.transpose(0, 1).unsqueeze(0) for tensor in new), [index])
            return out.squeeze(0).transpose(0, 1)

        return self.model(torch.cat(list(prompts)), positions, attend)[ends[1:] - 1]

    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (n, 256) after one more token for each conversation, (n,)."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self.caches[layer]
            cache.append(key.unsqueeze(2), value.unsqueeze(2))
            return attn_ext.attention_decode(
                query.unsqueeze(2),
                cache.key,
                cache.value,
                cache.seqlens,
                block_table=cache.block_table,
                key_scale=cache.key_scale,
                value_scale=cache.value_scale,
            ).squeeze(2)

        return self.model(tokens, self.caches[0].seqlens.clone(), attend)

    def used_pages(self) -> int:
        """In one layer."""
        return self.caches[0].key.shape[0] - self.caches[0].free_pages

    def cache_bytes(self) -> int:
        """Of the pages in use and their scales."""
        cache = self.caches[0]
        stores = cache.key, cache.value, cache.key_scale, cache.value_scale
        page = sum(store[0].nbytes for store in stores if store is not None)
        return len(self.caches) * self.used_pages() * page


class PaddedChat:
    """The same on torch: a padded batch, and keys and values that are concatenated."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.keys = [torch.empty(1, model.kv_heads, 0, HEAD_DIM) for _ in model.layers]
        self.values = list(self.keys)
        self.lengths = torch.zeros(1, dtype=torch.int64)
        self.visible = torch.empty(1, 0, dtype=torch.bool)  # (n, S), False for padding

    def fork(self, conversations: int) -> None:
        self.keys, self.values = (
            [tensor.expand(conversations, -1, -1, -1) for tensor in tensors]
            for tensors in (self.keys, self.values)
        )
        self.lengths = self.lengths.expand(conversations)
        self.visible = self.visible.expand(conversations, -1)

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        columns = torch.arange(tokens.shape[1])
        # Padding is at the right, where nothing but padding would see it.
        earlier = self.visible.new_ones(len(columns), self.visible.shape[1])
        mask = torch.cat((earlier, columns <= columns.unsqueeze(1)), dim=1) if earlier.numel() else None
        positions = self.lengths.unsqueeze(1) + columns
        self.visible = torch.cat((self.visible, columns < lengths.unsqueeze(1)), dim=1)
        self.lengths = self.lengths + lengths
        logits = self.model(tokens, positions, partial(self._attend, mask))
        return logits[torch.arange(len(prompts)), lengths - 1]

    def decode(self, tokens: Tensor) -> Tensor:
        positions = self.lengths.unsqueeze(1)
        self.visible = F.pad(self.visible, (0, 1), value=True)
        self.lengths = self.lengths + 1
        mask = self.visible[:, None, None]
        return self.model(tokens.unsqueeze(1), positions, partial(self._attend, mask)).squeeze(1)

    def _attend(self, mask: Tensor | None, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        self.keys[layer] = key = torch.cat((self.keys[layer], key), dim=2)
        self.values[layer] = value = torch.cat((self.values[layer], value), dim=2)
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=True
        ).transpose(1, 2)

    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


Chat = PagedChat | PaddedChat


class Record:
    """What one of the chats did."""

    def __init__(self) -> None:
        self.prefill_seconds = 0.0
        self.step_seconds: list[float] = []
        self.same = 0  # bytes chosen as torch chooses them
        self.difference = 0.0  # of any logit from torch's, as a share of the largest


def as_tokens(text: bytes) -> Tensor:
    return torch.tensor(list(text))


def start_chats(model: Llama, context: int, prompts: Sequence[Tensor], tokens: int) -> dict[str, Chat]:
    """Torch, whose choices the others follow, and attn_ext with a cache of float32 and of int8."""
    # Each conversation begins and ends in the middle of a page.
    pages = context // PAGE_SIZE + sum((len(prompt) + tokens) // PAGE_SIZE + 2 for prompt in prompts)
    return {
        "torch": PaddedChat(model),
        "attn_ext": PagedChat(model, pages, len(prompts), torch.float32),
        "attn_ext int8": PagedChat(model, pages, len(prompts), torch.int8),
    }


def converse(
    chats: dict[str, Chat], system: Tensor, prompts: Sequence[Tensor], tokens: int
) -> tuple[Tensor, dict[str, Record]]:
    """The answers (n, tokens) that torch chooses greedily; the other chats are given the same bytes.

    Steps are timed in turns so that a change of the machine's pace meets all alike.
    """
    records = {name: Record() for name in chats}
    logits = {}
    for name, chat in chats.items():
        show_progress(f"  {len(system):,} bytes: {name} reads the prompts")
        start = time.perf_counter()
        chat.prefill([system])
        chat.fork(len(prompts))
        logits[name] = chat.prefill(prompts)
        records[name].prefill_seconds = time.perf_counter() - start
    answers = []
    for step in range(tokens):
        show_progress(f"  {len(system):,} bytes: byte {step + 1} of {tokens}")
        chosen = logits["torch"].argmax(-1)
        answers.append(chosen)
        largest = logits["torch"].abs().max()
        for name, record in records.items():
            difference = (logits[name] - logits["torch"]).abs().max() / largest
            record.same += int((logits[name].argmax(-1) == chosen).sum())
            record.difference = max(record.difference, difference.item())
        for name in sorted(chats, reverse=step % 2 == 0):
            start = time.perf_counter()
            logits[name] = chats[name].decode(chosen)
            records[name].step_seconds.append(time.perf_counter() - start)
    show_progress("")
    return torch.stack(answers, dim=1), records


def check_same(record: Record, total: int) -> None:
    if record.same != total:
        raise SystemExit(
            f"attn_ext chose {record.same} of {total} bytes as torch did; "
            f"logits differ by {record.difference:.1e} of the largest"
        )


def print_answers(answers: Tensor) -> None:
    print()
    for question, answer in zip(QUESTIONS, answers.tolist(), strict=True):
        text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in answer)
        print(f"  {question:54}{text[:48]}")


def print_records(context: int, chats: dict[str, Chat], records: dict[str, Record], total: int) -> None:
    paged = chats["attn_ext"]
    unshared = sum(-(-length // PAGE_SIZE) for length in paged.caches[0].seqlens.tolist())
    print(
        f"\nSystem prompt of {context:,} bytes: {paged.used_pages():,} pages in use in each layer, "
        f"{unshared:,} without sharing\n\n"
        f"  {'':14}{'prompts, s':>10}{'step, ms':>10}{'bytes/s':>9}{'cache, MiB':>12}{'same bytes':>13}"
        f"{'logits off by':>15}"
    )
    for name, record in records.items():
        seconds = statistics.median(record.step_seconds)
        times = f"{record.prefill_seconds:10.2f}{1e3 * seconds:10.2f}{len(QUESTIONS) / seconds:9,.0f}"
        agreement = f"{f'{record.same:,} of {total:,}':>13}{record.difference:15.0e}"
        print(f"  {name:14}{times}{chats[name].cache_bytes() / 2**20:12.1f}{agreement}", flush=True)


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument(
        "--width", type=int, default=512, help=f"a multiple of {GROUP * HEAD_DIM} (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=32, help="bytes of each answer (%(default)s)")
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[512, 2048, 8192],
        metavar="L",
        help="bytes of the system prompt (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    options = parser.parse_args()
    if options.width < 1 or options.width % (GROUP * HEAD_DIM):
        parser.error(f"--width must be a multiple of {GROUP * HEAD_DIM}, got {options.width}")
    if not 1 <= min(options.context) <= max(options.context) <= len(REFERENCE):
        parser.error(f"--context must be from 1 to {len(REFERENCE)}, got {options.context}")
    return options


@torch.inference_mode()
def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Llama(options.layers, options.width)
    prompts = [as_tokens(f"\nQuestion: {question}\nAnswer: ".encode()) for question in QUESTIONS]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.layers} layers, width {options.width}, {model.kv_heads * GROUP} query heads, "
        f"{model.kv_heads} key heads, {parameters / 1e6:.1f} M random weights\n"
        f"float32, {options.threads} threads; {len(prompts)} conversations, {options.tokens} bytes each, "
        f"pages of {PAGE_SIZE}\n"
        "All continue the bytes that torch chooses; logits are off by a share of the largest",
        flush=True,
    )
    for index, context in enumerate(options.context):
        chats = start_chats(model, context, prompts, options.tokens)
        answers, records = converse(chats, as_tokens(REFERENCE[:context]), prompts, options.tokens)
        check_same(records["attn_ext"], answers.numel())
        if index == 0:
            print_answers(answers)
        print_records(context, chats, records, answers.numel())


if __name__ == "__main__":
    main()
