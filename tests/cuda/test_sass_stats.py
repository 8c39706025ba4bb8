"""Statistics of machine code: instructions of loops, registers and spills."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from cuda_programs import SOURCES, require_toolkit
from programs import run

from tools import sass_stats
from tools.sass_stats import Resources

# The outer loop 0x10-0x80 has an inner one, 0x20-0x50, and a block out of line, 0xa0-0xb0; 0xc0 is dead.
LISTING = """
code for sm_80
        Function : nested
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;   /* 0x0 */
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/               @P1 BRA 0xa0 ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/                   BRA P2, 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   STL [R1], R2 ;
        /*00b0*/                   BRA 0x70 ;
        /*00c0*/                   BRA 0x10 ;
"""


def test_loops_are_found_by_dominators() -> None:
    ((key, instructions),) = sass_stats.parse_sass(LISTING).items()
    assert key == ("sm_80", "nested")
    outer, inner = sass_stats.natural_loops(instructions)
    assert (outer.head, inner.head) == (0x10, 0x20)
    assert [i.address for i in inner.instructions] == [0x20, 0x30, 0x40, 0x50]
    assert [i.address for i in outer.instructions] == [*range(0x10, 0x90, 0x10), 0xA0, 0xB0]
    assert sass_stats.tensor_core_loops(instructions) == [inner]
    assert inner.counts == Counter({"HMMA": 1, "padding": 1, "MUFU.EX2": 1, "branch": 1})


def test_code_without_loops() -> None:
    assert sass_stats.natural_loops([]) == []
    assert sass_stats.parse_sass("no code here") == {}


def test_log_of_ptxas() -> None:
    log = """
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""
    assert sass_stats.parse_ptxas_log(log) == {
        ("sm_90a", "first"): Resources(255, 8, 4, 12, 1024),
        ("sm_80", "second"): Resources(32),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cubin, and what ptxas says of it."""
    nvcc, cubin = require_toolkit("nvcc"), tmp_path_factory.mktemp("sass") / "mma_loop.cubin"
    source = SOURCES / "mma_loop.cu"
    return cubin, run(nvcc, "-arch=sm_80", "-std=c++17", "-Xptxas", "-v", "-cubin", source, "-o", cubin)


def test_resources_of_a_kernel(compiled: tuple[Path, str]) -> None:
    resources = sass_stats.parse_ptxas_log(compiled[1])["sm_80", "mma_loop"]
    assert 32 < resources.registers <= 255
    assert resources.spill_loads == resources.spill_stores == resources.static_shared == 0


def test_instructions_of_a_kernel(
    compiled: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    require_toolkit("cuobjdump")
    (instructions,) = sass_stats.disassemble(compiled[0]).values()
    (loop,) = sass_stats.tensor_core_loops(instructions)
    assert loop.counts["HMMA"] == 8
    assert loop.counts["LDG"] == 9
    assert loop.counts["MUFU.EX2"] == loop.counts["LDL/STL"] == 0
    assert sass_stats.count(instructions)["MUFU.EX2"] == 32
    assert len(sass_stats.natural_loops(instructions)) >= 2

    (tmp_path / "log").write_text(compiled[1])
    assert sass_stats.main([str(compiled[0]), "--log", str(tmp_path / "log"), "--only", "mma"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sm_80 mma_loop\n  Resources(registers=")
    assert "8 HMMA" in printed
    assert sass_stats.main([str(compiled[0]), "--only", "nothing"]) == 0
    assert capsys.readouterr().out == ""


def test_turns() -> None:
    """The fewest instructions of a way around, by the number of copies on it."""
    text = [
        ("", "LDGSTS.E", "R0"),  # 0x00
        ("@P0", "BRA", "0x40"),  # 0x10: around the next two
        ("", "LDGSTS.E", "R0"),
        ("", "HMMA.16816.F32", "R0"),
        ("", "FFMA", "R0"),  # 0x40
        ("@!PT", "LDS", "R0"),
        ("@P1", "BRA", "0x0"),
    ]
    code = [sass_stats.SassInstruction(16 * i, *instruction) for i, instruction in enumerate(text)]
    (loop,) = sass_stats.natural_loops(code)
    assert loop.turns() == {1: 4, 2: 6}
