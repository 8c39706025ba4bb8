"""Compiles the benchmark's small C++ sources on the fly, once for every text and compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent


class CompilerUnavailableError(RuntimeError):
    """No C++ compiler, or it refused the source."""


def cache_folder() -> Path:
    """Where the compiled libraries stay between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_ext-benchmarks"


def compile_library(name: str) -> Path:
    """Compiles ``benchmarks/<name>.cpp`` to a shared library and returns its path.

    Raises:
        CompilerUnavailableError: there is no compiler (``$CXX``, else ``g++``), or it failed.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CompilerUnavailableError(f"no C++ compiler: {compiler!r} is not on PATH")
    source = SOURCES / f"{name}.cpp"
    digest = hashlib.sha256(compiler.encode() + source.read_bytes()).hexdigest()[:16]
    library = cache_folder() / f"{name}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside its final place and renamed, so that another process never loads half a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / library.name
            command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", str(source), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CompilerUnavailableError(
                    f"{compiler} failed on {source.name}: {done.stderr.strip()[:500]}"
                )
            fresh.replace(library)
    return library
