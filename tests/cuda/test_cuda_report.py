"""The report on compiled kernels: occupancy, main loops, the table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from cuda_programs import require_toolkit

from tools import cuda_report
from tools.cuda_report import Kernel
from tools.occupancy import MULTIPROCESSORS, occupancy, resident_blocks
from tools.sass_stats import Resources, SassInstruction


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("80", 128, 32, 0, 16),  # by threads
        ("80", 32, 16, 0, 32),  # by blocks
        ("80", 128, 168, 24 << 10, 3),  # by registers: 168 * 32 are 21 units of 256
        ("80", 128, 169, 24 << 10, 2),
        ("80", 128, 64, 40 << 10, 4),  # by shared memory, of which 1 KiB a block is reserved
        ("75", 128, 64, 32 << 10, 2),  # where nothing is reserved
        ("86", 128, 64, 99 << 10, 1),
        ("90", 256, 255, 96 << 10, 1),
        ("80", 128, 64, 164 << 10, 0),  # does not fit
    ],
)
def test_resident_blocks(arch: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert resident_blocks(arch, threads, registers, shared) == blocks
    share = blocks * threads / 32 / MULTIPROCESSORS[arch].warps
    assert occupancy(arch, threads, registers, shared) == share


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of 75, 80, .*; got '70'"):
        resident_blocks("70", 128, 64, 0)


def code(*opcodes: str, start: int) -> list[SassInstruction]:
    """A loop of these, and a branch back."""
    listing = [SassInstruction(start + 16 * i, "", opcode, "R0") for i, opcode in enumerate(opcodes)]
    return [*listing, SassInstruction(start + 16 * len(opcodes), "@P0", "BRA", f"0x{start:x}")]


def test_main_loop_is_the_one_without_checks() -> None:
    checked = code("HMMA.16816.F32", "ISETP.GT", "FSEL", "MUFU.EX2", start=0)
    whole = code("HMMA.16816.F32", "MUFU.EX2", start=0x50)
    single = code("HMMA.16816.F32", start=0x200)
    assert cuda_report.main_loop(checked + whole) == (Counter({"HMMA": 1, "MUFU.EX2": 1, "branch": 1}), 3)
    assert cuda_report.main_loop(whole + code("HMMA", "HMMA", start=0x80))[0]["HMMA"] == 2
    assert cuda_report.main_loop(code("FFMA", start=0)) == (Counter(), None)
    assert cuda_report.main_loop(single) == (Counter({"HMMA": 1, "branch": 1}), 2)


def test_main_loop_is_the_one_that_copies() -> None:
    """Loops over steps of a product lie inside it, and what its turns execute is then not known."""
    products = code("HMMA.16816.F32", "HMMA.16816.F32", start=0x10)
    tiles = [
        SassInstruction(0, "", "LDGSTS.E", "R0"),
        *products,
        SassInstruction(0x40, "@P1", "BRA", "0x0"),
    ]
    assert cuda_report.main_loop(tiles) == (Counter({"HMMA": 2, "LDGSTS": 1, "branch": 2}), None)


def test_table() -> None:
    loop = Counter(
        {"HMMA": 64, "LDSM": 32, "FFMA": 70, "FADD": 50, "MOV": 3, "integer": 4, "padding": 5, "branch": 2}
    )
    fast = Kernel("forward_fast", "80", 128, 24 << 10, Resources(168, 0, 4, 8, 1024), loop, 180)
    plain = Kernel("forward_plain", "90", 64, 0, Resources(40), Counter())
    _, first, second = cuda_report.report([fast, plain]).split("## sm_")
    header, rule, row = first.splitlines()[2:5]
    assert header.startswith(
        "| kernel | threads | registers | spilled | shared KiB | blocks (occupancy) | loop | turn |"
    )
    assert header.count("|") == rule.count("|") == row.count("|")
    cells = ("`forward_fast`", 128, 168, 12, 25, "3 (19%)", 225, 180, 64, 32, 0, 0, 120, 0, 7, 0)
    assert row == f"| {' | '.join(map(str, cells))} |"
    assert second.splitlines()[4].startswith("| `forward_plain` | 64 | 40 | 0 | 0 | 24 (75%) |  |")


def test_report_of_a_compiled_kernel(tmp_path: Path) -> None:
    require_toolkit("nvcc")
    require_toolkit("cuobjdump")
    out = tmp_path / "report.md"
    assert cuda_report.main(["--archs", "80", "--only", "forward_bf16_32.", "--out", str(out)]) == 0
    (row,) = [line for line in out.read_text().splitlines() if line.startswith("| `forward")]
    name, threads, _, spilled, _, _, _, _, products, *_ = [cell.strip() for cell in row.split("|")[1:-1]]
    assert (name, threads, spilled) == ("`forward_bf16_32`", "128", "0")
    assert int(products) >= 32
