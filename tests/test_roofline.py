"""The roofline model: what it reads, what it counts, and what its predictions must obey."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import chips, kernel_model, roofline
from benchmarks.chips import CHIPS, Chip, Figure
from benchmarks.kernel_model import (
    Compiled,
    Kernel,
    Problem,
    Work,
    parse_report,
    parse_variants,
    predict,
    work,
)

ROOT = Path(__file__).parent.parent
VARIANTS = """
// KEY_GRADIENT(name, ...): not a line.
FORWARD(bf16_128, BFloat16, 128, 128, 64, 64, 4, true, false)
FORWARD(bf16_192_128, BFloat16, 192, 128, 64, 32, 4, false, false)
FORWARD(f32_64, float, 64, 64, 64, 32, 4, false, true)
KEY_GRADIENT(bf16_128, BFloat16, 128, 128, 64, 64, 4, 2, KeyOutputs::both, false)
KEY_GRADIENT(f16_128_key, Float16, 128, 128, 64, 64, 4, 2, KeyOutputs::key, false)
KEY_GRADIENT(f16_128_value, Float16, 128, 128, 64, 64, 4, 2, KeyOutputs::value, true)
QUERY_GRADIENT(bf16_128, BFloat16, 128, 128, 128, 32, 4, 2, false)
DECODE(bf16_128, BFloat16, 128, 16, anything)
"""
KERNELS, OTHERS = parse_variants(VARIANTS)
FORWARD, UNEVEN, BOTH, KEY, VALUE, QUERY = KERNELS
LONG = Problem(4, 16, 4096, 128)


def committed_report() -> dict[tuple[str, str], Compiled]:
    return parse_report((ROOT / "docs" / "cuda_report.md").read_text())


def test_lines_of_all_kinds_are_read():
    assert OTHERS == ["DECODE"]
    assert Kernel("FORWARD", "bf16_128", "BFloat16", 128, 128, 64, 64, 4, in_registers=True) == FORWARD
    assert (UNEVEN.key_columns, UNEVEN.value_columns, UNEVEN.keys) == (192, 128, 32)
    assert (BOTH.owned, BOTH.streamed, BOTH.stages, BOTH.outputs) == (64, 64, 2, "both")
    assert (QUERY.owned, QUERY.streamed, QUERY.modified) == (128, 32, False)
    assert [kernel.outputs for kernel in (KEY, VALUE)] == ["key", "value"]
    assert VALUE.modified


def test_a_line_with_other_parameters_is_an_error():
    with pytest.raises(ValueError, match=r"FORWARD has name, element, key_columns, .*; got 'FORWARD\(x, "):
        parse_variants("FORWARD(x, BFloat16, 64, 64, 64, 64, 4, true)")


def test_the_lines_of_the_project_are_read():
    text = (ROOT / "csrc" / "core" / "variants.def").read_text()
    kernels, _ = parse_variants(text)
    lines = re.findall(r"^FORWARD\((\w+), (?:BFloat16|Float16)", text, re.MULTILINE)
    assert [kernel.name for kernel in kernels if kernel.kind == "FORWARD"] == lines


@pytest.mark.parametrize(
    ("kernel", "mma", "ldmatrix", "copied"),
    [
        (FORWARD, 4 * 8 * (8 + 8), 4 * (4 * 8 + 4 * 8), 64 * 256 * 2),
        # Queries, four blocks of 16 rows by 12 steps, are read again for each tile.
        (UNEVEN, 4 * 4 * (12 + 8), 4 * (2 * 12 + 2 * 8) + 4 * 12, 32 * 320 * 2),
        (BOTH, 4 * (4 * 8 * 8), 4 * 4 * (4 * 8) + 2 * (4 * 8), 64 * 256 * 2),
        (KEY, 3 * (4 * 8 * 8), 3 * 4 * (4 * 8) + 2 * (4 * 8), 64 * 256 * 2),
        (VALUE, 2 * (4 * 8 * 8), 2 * 4 * (4 * 8) + 4 * 8, 64 * 256 * 2),
        # Two blocks of 16 rows a warp use what it reads.
        (QUERY, 3 * (8 * 4 * 8), 3 * 4 * (2 * 8) + 2 * (8 * 8), 32 * 256 * 2),
    ],
    ids=lambda value: f"{value.kind} {value.outputs}" if isinstance(value, Kernel) else None,
)
def test_counts_by_hand(kernel: Kernel, mma: int, ldmatrix: int, copied: int):
    tile = work(kernel)
    assert (tile.mma, tile.ldmatrix, tile.copied) == (mma, ldmatrix, copied)
    assert tile.exponentials == kernel.queries * kernel.keys


def test_shared_memory_of_forwards_is_that_of_the_report():
    report = committed_report()
    kernels, _ = parse_variants((ROOT / "csrc" / "core" / "variants.def").read_text())
    forwards = [kernel for kernel in kernels if kernel.kind == "FORWARD"]
    assert forwards
    for kernel in forwards:
        assert report["80", f"forward_{kernel.name}"].shared_bytes == kernel.shared_bytes


def test_instructions_are_those_that_the_report_tells():
    """Estimated without it, those of a forward are nearly as many."""
    report = committed_report()
    kernels, _ = parse_variants((ROOT / "csrc" / "core" / "variants.def").read_text())
    for kernel in kernels:
        if kernel.name != "bf16_128":
            continue
        compiled = report["80", f"{kernel.kind.lower()}_{kernel.name}"]
        assert work(kernel, compiled).instructions == compiled.turn * kernel.warps
        if kernel.kind == "FORWARD":
            assert work(kernel).instructions == pytest.approx(compiled.turn * kernel.warps, rel=0.06)


def test_rows_of_the_report_are_read():
    titles = "| kernel | registers | shared KiB | loop | turn |\n| --- | --- | --- | --- | --- |\n"
    text = f"# Title\n\n| a |\n| --- |\n\n## sm_80\n\n{titles}| `forward_x` | 168 | 24.5 | 447 | 223 |\n"
    text += f"| `forward_y` | 100 | 24 |  |  |\n\n## sm_90\n\n{titles}| `forward_x` | 200 | 24 | 400 | 9 |\n"
    rows = {
        ("80", "forward_x"): Compiled(168, 25088, 223),
        ("80", "forward_y"): Compiled(100, 24576, None),
        ("90", "forward_x"): Compiled(200, 24576, 9),
    }
    assert parse_report(text) == rows


def test_clocks_of_a_tile():
    tile = Work(mma=512, ldmatrix=256, exponentials=4096, copied=32768, fp32=508, instructions=1636)
    clocks = tile.clocks(CHIPS["A100"])
    exact = {"tensor": 1024, "shared": 1280, "L2": 691.2, "exp": 256, "fp32": 254, "issue": 409}
    assert clocks == pytest.approx(exact)
    assert tile.in_turns(CHIPS["A100"]) == 1280 + 256
    slow = dataclasses.replace(CHIPS["A100"], l2=Figure(512, "a tenth"))
    assert tile.in_turns(slow) == tile.clocks(slow)["L2"]


def test_blocks_go_where_it_is_free_first():
    assert kernel_model.schedule([3, 3, 3], 2) == 6
    assert kernel_model.schedule([4, 3, 2, 1], 2) == 5
    causal = Problem(1, 1, 200, 64, causal=True)
    wide = dataclasses.replace(FORWARD, queries=128)
    assert kernel_model.tiles_of_blocks(FORWARD, causal) == [4, 3, 2, 1]
    assert kernel_model.tiles_of_blocks(wide, causal) == [4, 2]
    assert kernel_model.tiles_of_blocks(wide, dataclasses.replace(causal, causal=False)) == [4, 4]
    assert sum(kernel_model.tiles_of_blocks(BOTH, causal)) == 10


def test_a_last_wave_costs_a_whole_one():
    chip = CHIPS["A100"]
    full, one_more = (predict(chip, FORWARD, Problem(1, heads, 256, 128)) for heads in (27, 28))
    assert one_more.in_turns == 2 * full.in_turns
    assert (full.blocks, one_more.blocks) == (108, 112)


def test_a_scheduler_with_one_warp_takes_turns():
    alone = predict(CHIPS["A100"], FORWARD, Problem(1, 1, 64, 128))
    assert (alone.bound, alone.roofline) == ("turns", alone.in_turns)
    together = predict(CHIPS["A100"], FORWARD, LONG)
    assert together.roofline < together.in_turns
    assert together.bound == "shared"


@pytest.mark.parametrize("field", [*chips.figures(CHIPS["A100"])])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.kind} {kernel.name}")
def test_more_of_anything_is_never_slower(kernel: Kernel, field: str):
    """But multiprocessors share the L2 cache, of which each then has less."""
    for chip in CHIPS.values():
        before = getattr(chip, field)
        better = dataclasses.replace(chip, **{field: Figure(2 * before.value, "twice")})
        if field == "multiprocessors":
            better = dataclasses.replace(better, l2=Figure(2 * chip.l2.value, "twice"))
        for problem in (LONG, Problem(1, 3, 700, 128, causal=True)):
            try:
                slow = predict(chip, kernel, problem)
            except ValueError:
                continue
            fast = predict(better, kernel, problem)
            assert fast.in_turns <= slow.in_turns
            # With fewer blocks than multiprocessors, nothing overlaps any more.
            assert fast.roofline <= slow.roofline or fast.bound == "turns"


def test_compute_and_memory_bounds():
    h100 = CHIPS["H100"]
    found = predict(h100, FORWARD, LONG)
    assert LONG.flops / found.roofline <= h100.tensor.value * h100.clock.value * h100.multiprocessors.value
    short = Problem(64, 32, 64, 128)
    assert short.memory_bytes == 64 * 32 * 64 * (4 * 128 * 2 + 8)
    assert predict(h100, FORWARD, short).bound == "memory"
    assert predict(h100, FORWARD, short).roofline == short.memory_bytes / h100.memory.value


def test_decoding_reads_the_cache_of_kv_heads():
    cache = Problem(8, 32, 8192, 128, kv_heads=8)
    assert kernel_model.decode_seconds(CHIPS["H100"], cache) == 2 * 8 * 8 * 8192 * 128 * 2 / 3.35e12


def test_an_unknown_chip_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="chip must be one of A100, L4, H100, B200; got 'V100'"):
        chips.chip("V100")
    with pytest.raises(SystemExit):
        roofline.main(["--chips", "A100,V100"])
    assert "got 'V100'" in capsys.readouterr().err


def test_a_kernel_that_does_not_fit_is_an_error():
    large = dataclasses.replace(BOTH, stages=8)
    with pytest.raises(ValueError, match="bf16_128 does not fit L4: 255 registers, 294912 bytes"):
        predict(CHIPS["L4"], large, LONG)


def figures_of(module: object) -> list[Figure]:
    return [value for value in vars(module).values() if isinstance(value, Figure)]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_figure_is_printed_with_its_source(chip: Chip):
    page = roofline.render([chip], KERNELS, OTHERS, {})
    used = [*figures_of(chips), *figures_of(kernel_model), *chips.figures(chip).values()]
    assert len(used) >= 15
    for figure in used:
        assert figure.source
        assert re.search(rf"\| +{re.escape(f'{figure.value:g}')} \| +{re.escape(figure.source)} \|", page)


def test_page_has_all_kinds_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = roofline.render([CHIPS["H100"], CHIPS["L4"]], KERNELS, OTHERS, {})
    assert "key_gradient_bf16_128 (" in page
    assert "forward + backward" in page
    assert page.endswith("whose tiles are not modelled: DECODE.\n")
    out = tmp_path / "roofline.md"
    roofline.main(["--chips", "A100", "--out", str(out)])
    assert capsys.readouterr().out == out.read_text()
    assert "no kernel was timed" in out.read_text()
    assert "A100, head_dim 128: 128 queries by 8 warps" in out.read_text()


def test_two_passes_stand_in_for_one_where_both_do_not_fit():
    large = dataclasses.replace(BOTH, stages=8, outputs="both")
    halves = [dataclasses.replace(kernel, element="BFloat16") for kernel in (KEY, VALUE)]
    passes = roofline.backward(CHIPS["H100"], [large, *halves, QUERY], LONG, {})
    assert [kernel.name for kernel, _ in passes] == ["f16_128_key", "f16_128_value", "bf16_128"]
    assert roofline.backward(CHIPS["H100"], [large, halves[0], QUERY], LONG, {}) == []


def test_tiles_that_are_not_compiled_are_no_part_of_training():
    wide, _ = parse_variants(roofline.ALTERNATIVES)
    pages = [roofline.render([CHIPS["H100"]], [*KERNELS, *more], OTHERS, {}) for more in ([], wide)]
    trained = [[line for line in page.splitlines() if "forward + backward" in line] for page in pages]
    assert trained[0] == trained[1] != []
    assert "bf16_128_wide, 128 x 64, 4 warps, not compiled |" in pages[1]
