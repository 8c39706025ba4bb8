"""How the CUDA tests compile."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import run

from tools import cuda_toolkit

SOURCES = Path(__file__).resolve().parent / "cu"


def require_toolkit(name: str) -> Path:
    """A program of the CUDA toolkit; without it the test is skipped."""
    try:
        return cuda_toolkit.binary(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def compile_ptx(source: Path, arch: str, directory: Path, *options: str) -> str:
    """The PTX of a source file."""
    output = directory / f"{source.stem}_{arch}.ptx"
    nvcc = require_toolkit("nvcc")
    run(nvcc, f"-arch={arch}", "-std=c++17", "-lineinfo", *options, "-ptx", source, "-o", output)
    return output.read_text()
