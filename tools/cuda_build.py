"""How setup.py compiles the CUDA kernels: by which nvcc, for which architectures, with which commands.

The kernels know nothing of torch: nvcc compiles them whatever torch is installed, with or without a GPU.
Every line of csrc/core/variants.def becomes a source of its own, so that variants are compiled side by side.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tools import cuda_toolkit

DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")
MINIMUM_VERSION = (12, 0)  # of nvcc: the first that compiles C++20


class Toolchain(NamedTuple):
    """What compiles the kernels, and what for."""

    nvcc: Path
    version: tuple[int, int]
    archs: tuple[str, ...]  # compute capabilities without the point, or "native"


def choose(environment: Mapping[str, str]) -> Toolchain | None:
    """What the environment asks for; None: an extension without CUDA.

    Args:
        environment: ``ATTN_EXT_CUDA`` is ``0``, ``1``, or ``auto`` (the default): 1 if there is an nvcc.
            ``ATTN_EXT_CUDA_ARCHS`` is a list like ``80;90``, or ``native``.

    Raises:
        ValueError: one of them is something else, or names an architecture that this nvcc does not know.
        FileNotFoundError: CUDA is asked for and there is no nvcc; says what to install.
    """
    wanted = environment.get("ATTN_EXT_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"ATTN_EXT_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    try:
        nvcc = cuda_toolkit.nvcc()
    except FileNotFoundError:
        if wanted == "1":
            raise
        return None
    version = parse_version(_output(nvcc, "--version"))
    if version < MINIMUM_VERSION:
        if wanted == "1":
            raise ValueError(f"{nvcc} is of CUDA {_dotted(version)}; {_dotted(MINIMUM_VERSION)} is needed")
        return None
    known = re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    return Toolchain(nvcc, version, parse_archs(environment.get("ATTN_EXT_CUDA_ARCHS"), known))


def parse_version(text: str) -> tuple[int, int]:
    """The version in what ``nvcc --version`` prints."""
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def parse_archs(text: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """The architectures of ``ATTN_EXT_CUDA_ARCHS``, in rising order.

    Args:
        text: like ``"80;90"``; ``"native"``; None or empty: those of `DEFAULT_ARCHS` that are known.
        known: to nvcc.

    Raises:
        ValueError: the list names what is not known.
    """
    known = set(known)
    if not text:
        return tuple(arch for arch in DEFAULT_ARCHS if arch in known)
    if text == "native":
        return (text,)
    archs = {arch.strip() for arch in re.split("[;, ]", text) if arch.strip()}
    if not archs or not archs <= known:
        raise ValueError(
            f"ATTN_EXT_CUDA_ARCHS must be native, or some of {';'.join(sorted(known, key=int))}, got {text!r}"
        )
    return tuple(sorted(archs, key=int))


def nvcc_flags(toolchain: Toolchain, root: Path) -> list[str]:
    """The flags of every source: machine code for each architecture, PTX for those that come later."""
    *_, last = archs = toolchain.archs
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    host = ["-Wall", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-ffile-prefix-map={root}/="]
    return [
        "-std=c++20",
        "-O3",
        "--fmad=false",  # a product fused in one place and rounded in another would not cancel
        "--expt-relaxed-constexpr",
        "--Werror=all-warnings",
        *(f"-Xcompiler={flag}" for flag in host),
        f"-I{root / 'csrc'}",
        *(["--compress-mode=size"] if toolchain.version >= (12, 8) else []),
        *(["-arch=native"] if archs == ("native",) else targets),
    ]


def variant_sources(variants: str) -> dict[str, str]:
    """The sources that the lines of variants.def, KIND(name, ...), stand for, by file name."""
    sources = {}
    for line in variants.splitlines():
        if entry := re.match(r"([A-Z_]+)\((\w+)", line):
            kind, name = entry.group(1).lower(), entry.group(2)
            sources[f"{kind}_{name}.cu"] = f'#include "cuda/{kind}_instance.cuh"\n\n{line}\n'
    return sources


def kernel_sources(root: Path, directory: Path) -> list[Path]:
    """All that nvcc compiles; sources of variants are written to the directory, if they are not there yet."""
    sources = sorted((root / "csrc" / "cuda").glob("*.cu"))
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in variant_sources((root / "csrc" / "core" / "variants.def").read_text()).items():
        sources.append(directory / name)
        if not sources[-1].exists() or sources[-1].read_text() != text:
            sources[-1].write_text(text)
    return sources


def ninja_file(toolchain: Toolchain, root: Path, sources: Mapping[Path, Path]) -> str:
    """The build of each object from its source; sources: by object."""
    command = shlex.join(map(str, (toolchain.nvcc, *nvcc_flags(toolchain, root)))).replace("$", "$$")
    lines = [
        "rule nvcc",
        f"  command = {command} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {_ninja_path(result)}: nvcc {_ninja_path(source)}" for result, source in sources.items()),
    ]
    return "\n".join(lines) + "\n"


def compile_kernels(
    toolchain: Toolchain, root: Path, directory: Path, environment: Mapping[str, str]
) -> list[Path]:
    """Compiles what is not up to date.

    Args:
        toolchain: see `choose`.
        root: of the repository.
        directory: for what is generated and built.
        environment: ``MAX_JOBS`` is the number of compilers that run at a time.

    Returns:
        The objects.

    Raises:
        FileNotFoundError: there is no ninja; says what to install.
        subprocess.CalledProcessError: a source does not compile; the compiler has said why.
    """
    directory = directory.resolve()
    sources = kernel_sources(root, directory / "variants")
    objects = {directory / f"{source.stem}.o": source for source in sources}
    (directory / "build.ninja").write_text(ninja_file(toolchain, root, objects))
    jobs = environment.get("MAX_JOBS")
    try:
        subprocess.run(["ninja", "-C", directory, *(["-j", jobs] if jobs else [])], check=True)
    except FileNotFoundError:
        raise FileNotFoundError("there is no ninja to build the CUDA kernels: pip install ninja") from None
    return list(objects)


def link_flags() -> list[str]:
    """How the CUDA runtime is linked: statically, as it may be missing where the extension is loaded."""
    return [str(cuda_toolkit.static_runtime()), "-ldl", "-lrt", "-lpthread"]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))
