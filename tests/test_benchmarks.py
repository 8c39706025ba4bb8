"""The benchmark package: its arithmetic, its judgement of contenders, and a smoke run of every suite."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_ext
from benchmarks import __main__ as command_line
from benchmarks import decode as benchmark_decode
from benchmarks import environment, memory, native, peak, peers, plots, report, timing
from benchmarks import options as benchmark_options
from benchmarks import sparse as benchmark_sparse
from benchmarks.cases import DENSE, OVERHEAD, SUITES, TRAINING, Case
from benchmarks.contest import time_case
from benchmarks.correctness import Judge, WrongResultError

TINY = timing.Plan(budget=0.01, most_rounds=3, least_round=0.001)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class WrongScale(peers.Torch):
    name = "wrong_scale"

    def attend(self, case: Case) -> peers.Attend:
        return lambda *tensors: torch.nn.functional.scaled_dot_product_attention(*tensors, scale=0.2)


class OffByOneMask(peers.Torch):
    name = "off_by_one_mask"

    def attend(self, case: Case) -> peers.Attend:
        visible = torch.ones(case.query_length, case.key_length, dtype=torch.bool).tril(1)
        return lambda *tensors: torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=visible)


class Crashing(peers.Torch):
    name = "crashing"

    def attend(self, case: Case) -> peers.Attend:
        raise OSError("no such device\nand more")


class Missing(peers.Peer):
    name = "missing_library"
    package = "a_package_that_nobody_has"


def test_flops_follow_the_definition():
    assert Case(8, 1024, 64).flops == 4 * 8 * 1024 * 1024 * 64
    assert Case(8, 1024, 64, causal=True).flops == 2 * 8 * 1024 * 1024 * 64
    assert Case(12, 128, 64, batch=8, direction="training").flops == 3.5 * 4 * 8 * 12 * 128 * 128 * 64
    decode = Case(32, 1, 128, key_heads=8, key_length=4096)
    assert decode.flops == 4 * 32 * 4096 * 128


def test_bytes_count_grouped_keys_once():
    decode = Case(32, 1, 128, "bfloat16", key_heads=8, key_length=4096, group="decode")
    assert decode.bytes_moved == 2 * (2 * 32 * 128 + 2 * 8 * 4096 * 128)


def test_names_are_readable_and_unique():
    assert Case(8, 1024, 64).name == "fwd fp32 8x1024x64"
    assert (
        Case(32, 2048, 128, "bfloat16", causal=True, key_heads=8).name == "fwd bf16 causal GQA 32/8x2048x128"
    )
    assert Case(12, 128, 64, "bfloat16", batch=8, direction="training").name == "fwd+bwd bf16 8x12x128x64"
    decode = Case(32, 1, 128, key_heads=8, key_length=4096, group="decode")
    assert decode.name == "decode fp32 GQA B1 H32/8 Lk4096 D128"
    for cases in (DENSE, TRAINING, OVERHEAD, memory.memory_cases()):
        assert len({case.name for case in cases}) == len(cases)


def test_quick_selection_is_a_part_of_every_suite():
    for suite in (*SUITES, "memory"):
        quick = command_line.select_cases(suite, quick=True, only="")
        assert quick
        assert set(quick) <= {*command_line.select_cases(suite, quick=False, only="")}
    selected = command_line.select_cases("dense", quick=False, only="fp32 16x2048")
    assert [case.name for case in selected] == ["fwd fp32 16x2048x128"]


def test_inputs_are_reproducible_and_need_gradients_only_when_asked():
    case = Case(4, 3, 8, "bfloat16", key_heads=2, key_length=5)
    query, key, value, grad_out = case.inputs()
    assert query.shape == grad_out.shape == (1, 4, 3, 8)
    assert key.shape == value.shape == (1, 2, 5, 8)
    assert query.dtype == torch.bfloat16
    assert not query.requires_grad
    assert torch.equal(case.inputs()[2], value)
    assert all(tensor.requires_grad for tensor in Case(1, 2, 4, direction="recorded").inputs()[:3])


def test_interleaving_takes_turns_and_pairs_the_rounds():
    order = []

    def contender(name: str):
        def run() -> None:
            order.append(name)
            time.sleep(0.002)

        return run

    plan = timing.Plan(budget=0.5, most_rounds=5, fewest_rounds=2, least_round=0.0)
    first_call = {"slow": 1.0, "fast": 0.002}
    samples = timing.interleave({name: contender(name) for name in first_call}, first_call, plan)
    # Only the fast one has to be called once more to know how long it takes.
    assert order == ["fast", *["slow", "fast"], *["fast", "slow"], *["fast"] * 3]
    assert [len(samples[name].wall) for name in ("slow", "fast")] == [2, 5]
    ratios = timing.ratios(samples["slow"], samples["fast"], "wall")
    assert ratios == [a / b for a, b in zip(samples["slow"].wall, samples["fast"].wall, strict=False)]
    # Sleeping takes no CPU time: the clocks are really two.
    assert sum(samples["slow"].cpu) < 0.5 * sum(samples["slow"].wall)


def test_a_very_slow_contender_is_timed_once():
    samples = timing.interleave({"slow": lambda: None}, {"slow": 2 * timing.VERY_SLOW_SECONDS})
    assert len(samples["slow"].wall) == 1


def test_clock_depends_on_the_threads():
    assert timing.clock_for(1) == "cpu"
    assert timing.clock_for(2) == "wall"


def test_spread_is_median_and_quartiles():
    assert timing.Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == timing.Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_judge_accepts_right_results(dtype: str, direction: str):
    case = Case(4, 33, 16, dtype, causal=True, direction=direction, key_heads=2, batch=2)
    inputs = case.inputs()
    judge = Judge(case, inputs)
    for peer in (peers.Torch(), peers.TorchMath(), peers.Naive()):
        assert 0 < judge.error(peer.prepare(case, inputs)()) < judge.bound


def test_judge_rejects_wrong_results():
    case = Case(2, 33, 16, "bfloat16", causal=True, direction="training")
    inputs = case.inputs()
    judge = Judge(case, inputs)

    def rejected(results: tuple[Tensor, ...], match: str) -> None:
        with pytest.raises(WrongResultError, match=match):
            judge.error(results)

    out, *gradients = peers.Torch().prepare(case, inputs)()
    rejected(WrongScale().prepare(case, inputs)(), "output")
    rejected(OffByOneMask().prepare(case, inputs)(), "output")
    rejected((out, gradients[0], gradients[1], -gradients[2]), "grad_value")
    rejected((out * float("nan"), *gradients), "output")
    rejected((out.float(), *gradients), "float32")
    rejected((out[:, :1], *gradients), "expected")


def test_judge_compares_some_rows_and_what_they_add_to_the_gradients():
    case = Case(4, 96, 16, direction="training", key_heads=2)
    mask = attn_ext.patterns.longformer(96, 8, [0], block_size=16)
    judge = Judge(case, case.inputs(), mask, slice(40, 56))

    def results(mask: attn_ext.Mask, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return peers.bind(lambda *tensors: attn_ext.attention(*tensors, mask=mask), case, inputs)()

    assert 0 < judge.error(results(mask, judge.inputs)) < judge.bound
    with pytest.raises(WrongResultError, match="grad_key"):
        judge.error(results(mask, case.inputs()))  # the gradients of all rows
    with pytest.raises(WrongResultError, match="output"):
        judge.error(results(attn_ext.SlidingWindow(8, 8), judge.inputs))


def test_judge_compares_sampled_heads_of_large_cases(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.correctness._ALL_HEADS_SCORES", 10)
    case = Case(4, 8, 8, key_heads=2, batch=2)
    assert Judge(case, case.inputs()).groups == [(0, 0), (1, 1)]


def test_a_bad_contender_is_a_line_and_not_a_number():
    case = Case(2, 16, 8, causal=True, direction="training")
    contenders = [peers.Torch(), WrongScale(), Crashing(), peers.Flex()]
    result = time_case(case, contenders, plan=TINY)
    assert result["torch"]["ms"]["median"] > 0
    assert result["wrong_scale"]["excluded"].startswith("wrong: output is off by")
    assert result["crashing"]["excluded"] == "failed: OSError: no such device"
    assert result["flex"]["excluded"] == "unsupported: forward only"


def test_a_missing_peer_is_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(peers.EXTRAS, "missing_library", Missing())
    loaded, versions = peers.load_peers(["missing_library"])
    assert [peer.name for peer in loaded] == ["attn_ext", "torch", "math", "naive"]
    assert versions["missing_library"].startswith("missing: ModuleNotFoundError")
    with pytest.raises(ValueError, match="unknown peers"):
        peers.load_peers(["flash"])


@pytest.mark.parametrize(
    "case", [case for case in OVERHEAD if case.query_length == 1], ids=lambda case: case.name
)
def test_a_timed_case_has_all_its_figures(case: Case):
    result = time_case(case, [peers.AttnExt(), peers.Torch(), peers.Naive()], plan=TINY)
    assert result.keys() == {"attn_ext", "torch", "naive"}
    for figures in result.values():
        assert figures["ms"]["q1"] <= figures["ms"]["median"] <= figures["ms"]["q3"]
        assert figures["ms"] == figures["cpu_ms"]
        assert figures["wall_ms"]["median"] > 0
        assert figures["rounds"] == 3
        assert figures["calls_per_round"] >= 1
        assert ("gbps" in figures) == (case.direction == "forward")
    assert result["torch"]["speedup"]["median"] == 1.0


def test_memory_grows_with_the_square_for_naive_and_not_for_attn_ext():
    case = Case(8, 1024, 64, group="memory")
    result = memory.measure_case(case, [peers.AttnExt(), peers.Naive(), peers.TorchMath()])
    mib = {name: figures["mib"] for name, figures in result.items()}
    assert mib.keys() == {"attn_ext", "naive"}
    # At least the scores and the weights, 8 x 1024 x 1024 floats each.
    assert 64 <= mib["naive"] < 192
    assert mib["attn_ext"] < mib["naive"] / 4


def test_memory_that_the_machine_lacks_is_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_available_bytes", lambda: 2**20)
    result = memory.measure_case(Case(8, 8192, 64, group="memory"), [peers.Naive()])
    assert result["naive"]["excluded"].startswith("not measured: needs about 12 GiB")


def test_peak_is_measured_and_respects_the_instruction_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ATTN_EXT_ISA", raising=False)
    full = peak.measure_peak()
    assert full["float32"] > 1
    monkeypatch.setenv("ATTN_EXT_ISA", "baseline")
    base = peak.measure_peak()
    assert base.keys() == {"float32"}
    assert 1 < base["float32"] < 1.2 * full["float32"]
    assert peak.peak_for({"float32": 100.0, "bfloat16": 200.0}, "bfloat16") == 200.0
    # Some processors have bfloat16 products that are slower than their float32 ones.
    assert peak.peak_for({"float32": 100.0, "bfloat16": 60.0}, "bfloat16") == 100.0
    assert peak.peak_for({"float32": 100.0, "bfloat16": 200.0}, "float16") == 100.0


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.CompilerUnavailableError, match="no-such-compiler"):
        peak.measure_peak()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.CompilerUnavailableError, match=r"failed on peak\.cpp"):
        peak.measure_peak()


def test_unlocked_mkl_is_compared_on_amd_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(environment, "cpu_vendor", lambda: "GenuineIntel")
    assert "GenuineIntel" in environment.unlocked_mkl_reason()
    monkeypatch.setattr(environment, "cpu_vendor", lambda: "AuthenticAMD")
    assert environment.unlocked_mkl_reason() is None
    library = Path(environment.unlocked_mkl_environment()["LD_PRELOAD"].split(":")[0])
    assert b"mkl_serv_intel_cpu_true" in library.read_bytes()


def document(results: list[dict]) -> dict:
    machine = {
        "cpu": "A CPU",
        "cpu_model": "vendor 1 2",
        "isa": ["avx2"],
        "cores": 2,
        "torch": "2.13.0",
        "torch_isa": "AVX2",
        "attn_ext_isa": "avx2",
    }
    return {
        "schema": command_line.SCHEMA_VERSION,
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123abcd",
        "machine": machine,
        "settings": {"threads": 1, "clock": "cpu", "quick": True, "isa": None},
        "peers": {"torch": "2.13.0", "flex": "missing: ImportError: no"},
        "peak": {"float32": 100.0, "bfloat16": 200.0},
        "mkl_unlocked": "not asked for",
        "results": results,
    }


def timed(milliseconds: float, case: Case) -> dict:
    spread = {"median": milliseconds, "q1": 0.9 * milliseconds, "q3": 1.1 * milliseconds}
    rate = 1e3 / milliseconds
    return {
        "rounds": 5,
        "ms": spread,
        "gflops": case.flops / 1e9 * rate,
        "gbps": case.bytes_moved / 1e9 * rate,
        "speedup": {"median": 2.0, "q1": 1.9, "q3": 2.1},
    }


def result_of(case: Case, suite: str, contenders: dict[str, dict]) -> dict:
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    return {"suite": suite, "case": case.name, **fields, "contenders": contenders}


def test_report_shows_rates_shares_and_reasons():
    dense = Case(8, 1024, 64, "bfloat16", group="length")
    decode = Case(8, 1, 64, key_length=4096, group="decode")
    long = Case(8, 8192, 64, group="memory")
    milliseconds = dense.flops / 160e9 * 1e3
    results = [
        result_of(
            dense,
            "dense",
            {"attn_ext": timed(milliseconds, dense), "naive": {"excluded": "wrong: output"}},
        ),
        result_of(decode, "dense", {"attn_ext": timed(2.0, decode)}),
        result_of(long, "memory", {"attn_ext": {"mib": 8.0}, "naive": {"mib": 4096.0}}),
    ]
    results[0]["mkl_unlocked"] = {"median": 1.25, "q1": 1.2, "q3": 1.3}
    text = report.render(document(results))
    for part in ("160.0 ±10%", "80%", "2.00 (1.90-2.10)", "1.25 (1.20-1.30)"):
        assert part in text
    assert "2 ms, 8.4 GB/s" in text
    assert "512.0" in text.partition("Peak memory")[2]
    assert "- naive: fwd bf16 8x1024x64: wrong: output" in text
    assert "flex (missing: ImportError: no)" in text
    rows = [line for line in text.splitlines() if line.startswith("| fwd bf16")]
    assert len(rows) == 1
    assert rows[0].count("|") == 1 + len(rows[0].strip("|").split("|"))


def test_markdown_table_is_aligned():
    lines = report.markdown_table(["case", "x"], [["a", "1.25"]]).splitlines()
    assert lines == ["| case |    x |", "| ---- | ---: |", "| a    | 1.25 |"]


def test_pictures_are_drawn_from_the_sweep(tmp_path: Path):
    results = []
    for length in (256, 512):
        case = Case(8, length, 64, group="length")
        results.append(result_of(case, "dense", {"attn_ext": timed(1.0, case), "naive": timed(2.0, case)}))
    assert plots.plot_time(results, tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    assert not plots.plot_memory(results, tmp_path / "memory.png")


def test_results_of_different_machines_are_not_merged():
    first, second = document([]), document([])
    case = Case(8, 256, 64, group="length")
    second["results"] = [result_of(case, "dense", {"torch": timed(1.0, case)})]
    assert command_line.merge([first, second])["results"] == second["results"]
    second["machine"] = {**second["machine"], "cpu": "Another"}
    with pytest.raises(ValueError, match="differ in machine"):
        command_line.merge([first, second])


def test_publishing_copies_report_and_pictures(tmp_path: Path):
    folder, docs = tmp_path / "out", tmp_path / "docs"
    folder.mkdir()
    (folder / "time_vs_length.png").write_bytes(b"png")
    command_line.publish("# Benchmarks\n", folder, docs)
    assert (docs / "images" / "time_vs_length.png").read_bytes() == b"png"
    assert "![time vs length](images/time_vs_length.png)" in (docs / "benchmarks.md").read_text()


def test_command_line_writes_json_table_and_says_what_is_wrong(tmp_path: Path):
    options = ["overhead", "--quick", "--only", "L1 ", "--isa", "baseline", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["schema"] == command_line.SCHEMA_VERSION
    assert written["machine"]["attn_ext_isa"] == "baseline"
    assert written["settings"]["isa"] == "baseline"
    assert len(written["results"]) == 3
    assert "Cost of a call" in done.stdout
    assert done.stdout.strip() == (tmp_path / "benchmarks.md").read_text().strip()
    with pytest.raises(SystemExit):
        command_line.parse_arguments(["no_such_suite"])
    with pytest.raises(SystemExit):
        command_line.parse_arguments(["--threads", "0"])


def test_every_option_is_checked_and_timed():
    hasty = timing.Plan(budget=0, most_rounds=1, fewest_rounds=1, least_round=0)
    for option in benchmark_options.options(64):
        row = benchmark_options.measure(option, "float32", hasty)
        assert row[0] == option.name
        assert all(float(cell) > 0 for cell in row[3:6])
        assert bool(row[6]) == (option.torch_mask is not None)


def test_an_option_that_is_computed_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    option = next(option for option in benchmark_options.options(512) if option.name == "softcap")
    attention = attn_ext.attention
    monkeypatch.setattr(
        attn_ext, "attention", lambda *inputs, softcap: attention(*inputs, softcap=softcap / 20)
    )
    with pytest.raises(RuntimeError, match=r"off by .* of its norm"):
        benchmark_options.measure(option, "float64", timing.QUICK)


def test_options_are_a_markdown_table(capsys: pytest.CaptureFixture[str]):
    benchmark_options.main(["--quick", "--only", "sinks, backward"])
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (header, rule, *rows)} == {8}
    assert len(rows) == 2


TINY_SPARSE = benchmark_sparse.Size(
    256, (128, 256), 256, 1024, dtypes=("float32",), block_sizes=(64,), plan=TINY
)


def rows_of(section: str) -> list[list[str]]:
    """The cells of a section's table, its header first."""
    table = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [rows[0], *rows[2:]]


def test_sparse_density(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_sparse, "DENSITIES", (0.5,))
    section = benchmark_sparse.density(TINY_SPARSE)
    _, forward, training = rows_of(section)
    assert forward[:4] == ["forward", "64", "float32", "50%"]
    assert all(float(cell) > 0 for cell in (*forward[4:], *training[4:7])), section
    assert training[7:] == ["", ""]


def test_sparse_contenders_that_fail_or_are_wrong_have_a_line_and_no_number(
    monkeypatch: pytest.MonkeyPatch,
):
    def fails(*_: Tensor) -> Tensor:
        raise OSError("no compiler")

    right = attn_ext.attention
    monkeypatch.setattr(benchmark_sparse, "_flex", lambda block_mask: fails)
    monkeypatch.setattr(attn_ext, "attention", lambda *inputs, **options: right(*inputs))
    section = benchmark_sparse.window(TINY_SPARSE)
    header, first, second = rows_of(section)
    ways = header.index("patterns.sliding_window, ms")
    for row in (first, second):
        assert float(row[ways]) > 0
        assert row[ways + 1 : ways + 3] == ["", ""]
    assert "- FlexAttention: failed: OSError: no compiler" in section
    assert "- SlidingWindow: wrong: output is off by" in section


def test_sparse_longformer_has_times_and_peaks_of_every_length():
    header, *rows = rows_of(benchmark_sparse.longformer(TINY_SPARSE))
    assert [row[:2] for row in rows] == [
        [label, length] for label in ("forward", "forward + backward") for length in ("128", "256")
    ]
    for name in ("ms", "peak MiB"):
        assert all(float(row[header.index(name)]) >= 0 for row in rows)
    assert [bool(row[header.index("x half as long")]) for row in rows] == [False, True] * 2


def test_sparse_building_makes_every_pattern(capsys: pytest.CaptureFixture[str]):
    made = {name.split("(")[0] for name in benchmark_sparse.builders(1024)}
    documented = (ROOT / "docs" / "sparse.md").read_text()
    for name in {*attn_ext.patterns.__all__} - {"LSH", "deepspeed"}:
        assert name in made
        assert f"`{name}" in documented
    benchmark_sparse.main(["building", "--quick"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 1 + len(benchmark_sparse.builders(1024))
    with pytest.raises(SystemExit):
        benchmark_sparse.main(["no_such_section"])


def test_every_step_of_decoding_is_checked_and_timed():
    hasty = timing.Plan(budget=0, most_rounds=1, fewest_rounds=1, least_round=0)
    for step in benchmark_decode.steps(64):
        row = benchmark_decode.measure(step, 1, hasty)
        assert all(float(cell) > 0 for cell in row[2:6])
        assert bool(row[6]) == (step.cache not in benchmark_decode.LARGEST)


def test_a_step_that_is_computed_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_decode, "attention_decode", lambda query, *_, **__: query)
    with pytest.raises(RuntimeError, match=r"off by .* of its norm"):
        benchmark_decode.measure(benchmark_decode.steps(64)[0], 1, timing.QUICK)
