"""The built extension and its import: layering, symbols, cost, choice of the instruction set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, require, run

from attn_ext import _C, testing

IMPORT_BUDGET = 0.150  # seconds beyond `import torch`


# Layering


@pytest.mark.parametrize("directory", ["core", "cpu", "cuda", "emulation"])
def test_kernels_know_nothing_of_torch_and_python(directory: str) -> None:
    offending = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted((ROOT / "csrc" / directory).rglob("*"))
        if path.is_file()
        for line in path.read_text().splitlines()
        if re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|Python\.h|bindings)', line)
    ]
    assert offending == []


# The extension


def dynamic_symbols(which: str) -> list[str]:
    listing = run(require("nm"), "-D", "--demangle", which, _C.__file__)
    return [line.split(maxsplit=1)[-1] for line in listing.splitlines()]


def test_extension_uses_only_the_stable_interfaces() -> None:
    assert Path(_C.__file__).name == "_C.abi3.so"
    private = re.compile(r"\b(at|c10|torch)::|\bTHP")
    assert [name for name in dynamic_symbols("--undefined-only") if private.search(name)] == []


def test_extension_exports_nothing_of_its_own() -> None:
    exported = [name for name in dynamic_symbols("--defined-only") if "attn_ext" in name]
    assert exported == []


# Import


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def test_import_prints_nothing() -> None:
    completed = run_python("import attn_ext")
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_import_is_quick() -> None:
    code = (
        "import torch, time; start = time.perf_counter(); import attn_ext; print(time.perf_counter() - start)"
    )
    assert min(float(run_python(code).stdout) for _ in range(5)) < IMPORT_BUDGET


@pytest.mark.parametrize("name", testing.available_isas())
def test_environment_chooses_the_instruction_set(name: str) -> None:
    completed = run_python("import attn_ext; print(attn_ext._C.isa_current())", ATTN_EXT_ISA=name)
    assert completed.stdout.strip() == name, completed.stderr


def test_unknown_instruction_set_is_an_error_that_lists_the_valid_ones() -> None:
    completed = run_python("import attn_ext", ATTN_EXT_ISA="sse9")
    assert completed.returncode != 0
    error = completed.stderr.splitlines()[-1]
    assert error.startswith("ValueError: ATTN_EXT_ISA")
    assert all(name in error for name in ("sse9", *_C.isa_names()))


def test_selecting_an_instruction_set_checks_its_name() -> None:
    before = _C.isa_current()
    with pytest.raises(ValueError, match="must be one of baseline, avx2"):
        _C.isa_select("sse9")
    with pytest.raises(TypeError, match="must be a str"):
        _C.isa_select(2)
    with pytest.raises(ValueError, match="must be one of"):
        _C.isa_supported("")
    assert _C.isa_current() == before
