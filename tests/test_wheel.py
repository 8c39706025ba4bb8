"""What is shipped: the source distribution and the wheel, and no AVX where a processor may lack it."""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from programs import ROOT, require, run

import attn_ext

COMPILE_BUDGET = 90.0  # CPU seconds: 50 to 75 on one machine on different days


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source distribution unpacks to."""
    directory = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", directory, ROOT)
    (archive,) = directory.glob("*.tar.gz")
    run("tar", "-xf", archive, "-C", directory)
    return directory / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel_build(source_tree: Path) -> tuple[Path, str]:
    """The wheel made from the source distribution, and what the build printed."""
    environment = {**os.environ, "ATTN_EXT_CUDA": "0"}  # cuda/test_cuda_build.py is about the other
    log = run(sys.executable, "-m", "build", "--no-isolation", "--wheel", source_tree, env=environment)
    (wheel,) = (source_tree / "dist").glob("*.whl")
    return wheel, log


def test_wheel_serves_every_python_from_3_10(wheel_build: tuple[Path, str]) -> None:
    wheel, _ = wheel_build
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"attn_ext-{attn_ext.__version__}-cp310-abi3-{tag}.whl"


def test_build_is_within_its_budget_and_without_warnings(wheel_build: tuple[Path, str]) -> None:
    _, log = wheel_build
    seconds = float(re.search(r"compiled attn_ext\._C in ([\d.]+) CPU seconds", log).group(1))
    assert seconds < COMPILE_BUDGET
    assert re.findall(r".*csrc/.*warning:.*", log) == []


def test_wheel_works_in_an_empty_environment(wheel_build: tuple[Path, str], tmp_path: Path) -> None:
    wheel, _ = wheel_build
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-I", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # torch from here, without the .pth files that make this working tree importable
    (site_packages / "torch_from_outside.pth").write_text(sysconfig.get_path("platlib") + "\n")

    code = "import attn_ext, attn_ext.info as i; print(attn_ext.__file__); raise SystemExit(i.main([]))"
    output = run(python, "-I", "-c", code, cwd=tmp_path)
    assert output.splitlines()[0] == str(site_packages / "attn_ext" / "__init__.py")
    assert "self-check" in output


# A processor without AVX never meets an AVX instruction


def disassemble(objdump: str, file: Path) -> dict[str, list[str]]:
    """Mnemonics and operands of every function in an object file, by symbol."""
    functions: dict[str, list[str]] = {}
    body: list[str] = []
    for line in run(objdump, "-d", "--no-show-raw-insn", file).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = functions.setdefault(header.group(1), [])
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(.*)", line):
            body.append(instruction.group(1))
    return functions


def uses_avx(body: list[str]) -> bool:
    """VEX and EVEX mnemonics begin with v; nothing else that a compiler emits does."""
    return any(
        instruction.startswith("v") or re.search(r"%[yz]mm|%k[1-7]", instruction) for instruction in body
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX belongs to x86-64")
def test_avx_stays_behind_the_dispatch(wheel_build: tuple[Path, str]) -> None:
    wheel, _ = wheel_build
    objdump, nm = require("objdump"), require("nm")
    objects = sorted((wheel.parent.parent / "build").rglob("*.o"))
    assert {"baseline.o", "dispatch.o", "ops.o", "module.o", "avx2.o"} <= {path.name for path in objects}
    saw_avx = False
    for path in objects:
        with_avx = {name for name, body in disassemble(objdump, path).items() if uses_avx(body)}
        if path.name.startswith("avx"):
            saw_avx |= bool(with_avx)
            # An inline function that other files define too: the linker keeps one copy and may keep this one.
            shared = {
                line.split()[-1] for line in run(nm, path).splitlines() if re.search(r"\s[WVu]\s", line)
            }
            assert with_avx & shared == set(), path.name
        else:
            assert with_avx == set(), path.name
    assert saw_avx
