"""Builds CUDA sources for the emulator of csrc/emulation, and drives the result.

A ``.cu`` file is compiled as host C++ with every load and store instrumented; a ``.cpp`` file as it is.
Objects lie in ``build/emulation``, one for each command that makes one, and are made again when a file that
they include has changed.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tools import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "emulation"

_WARNINGS = ["-Wall", "-Wextra", "-Werror"]
_COMMON = ["-std=c++20", "-g", "-fPIC", *_WARNINGS, "-DATTN_EXT_EMULATE", f"-I{ROOT / 'csrc'}"]
_HOST = ["-O3", "-march=native", "-Wno-restrict"]  # GCC 12 finds fault with its own std::string
_KERNEL = ["-O2", "-ffp-contract=off", "-Wno-unknown-pragmas", "-ftrivial-auto-var-init=pattern", "-xc++"]
_KERNEL += ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
_KERNEL += ["-fno-tree-sra"]  # a load of 16 bytes stays one
_KERNEL += ["-fno-tree-tail-merge", "-fno-crossjumping", "-fno-optimize-sibling-calls"]  # so do calls


def build(
    sources: Iterable[Path | tuple[Path, Sequence[str]]],
    output: Path,
    *,
    defines: Sequence[str] = (),
    compile_args: Sequence[str] = (),
    link_args: Sequence[str] = (),
) -> Path:
    """Compiles sources and the emulator into a shared object.

    Args:
        sources: ``.cu`` files, kernels and what launches them, and ``.cpp`` files; each by itself, or with
            arguments of the compiler for it alone.
        output: where to put the shared object.
        defines: macros, ``"NAME"`` or ``"NAME=value"``, for these sources.
        compile_args: further arguments of the compiler for them.
        link_args: further arguments of the linker.

    Returns:
        ``output``, newly built unless all it depends on is older.

    Raises:
        RuntimeError: the compiler failed; with what it said.
        FileNotFoundError: the CUDA headers are nowhere to be found.
    """
    flags = [*_COMMON, *(f"-isystem{path}" for path in cuda_toolkit.include_dirs())]
    own_flags = [*flags, *(f"-D{define}" for define in defines), *compile_args]
    pairs = (source if isinstance(source, tuple) else (source, ()) for source in sources)
    jobs = [(source.resolve(), [*own_flags, *arguments]) for source, arguments in pairs]
    jobs += [(source, flags) for source in sorted((ROOT / "csrc" / "emulation").glob("*.cpp"))]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of several processes build the same objects
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: _compile(*job), jobs))
        link = ["g++", "-shared", *map(str, objects), "-Wl,-Bsymbolic", "-Wl,-z,defs", *link_args]
        _make(link, output, objects)
    return output


def _compile(source: Path, flags: Sequence[str]) -> Path:
    kind = _KERNEL if source.suffix == ".cu" else _HOST
    command = ["g++", *flags, *kind, "-c", str(source)]
    name = f"{source.stem}-{hashlib.sha256(' '.join(command).encode()).hexdigest()[:16]}"
    target, dependencies = OBJECTS / f"{name}.o", OBJECTS / f"{name}.d"
    needs = [source]
    if dependencies.exists():
        needs = [Path(word) for word in dependencies.read_text().replace("\\\n", " ").split()[1:]]
    _make([*command, "-MMD", "-MF", str(dependencies)], target, needs)
    return target


def _make(command: Sequence[str], target: Path, needs: Iterable[Path]) -> None:
    """Runs the command that writes the target, unless the target is newer than all that it needs."""
    stamp = target.with_name(target.name + ".command")
    text = " ".join(command)
    if target.exists() and stamp.exists() and stamp.read_text() == text:
        made = target.stat().st_mtime_ns
        if all(path.exists() and path.stat().st_mtime_ns < made for path in needs):
            return
    partial = target.with_name(f"{target.name}.partial")
    completed = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if completed.returncode:
        raise RuntimeError(f"{text}\n{completed.stderr[-8000:]}")
    partial.replace(target)  # a process that has the old one loaded keeps it
    stamp.write_text(text)


class Emulator:
    """The emulator inside a shared object that :func:`build` made.

    Args:
        library: the shared object.
    """

    READ_ONLY, READ_WRITE, UNDEFINED = range(3)

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self._report = self._function("report", ctypes.c_char_p)
        self._stats = self._function("stats", ctypes.c_char_p)
        self._clear = self._function("clear")
        self._forget = self._function("forget_memory")
        self._config = self._function("config", None, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
        self._register = self._function(
            "register_memory", None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        )

    def _function(self, name: str, result: Any = None, *arguments: Any) -> Any:
        function = getattr(self.library, f"attn_ext_emulation_{name}")
        function.restype, function.argtypes = result, arguments
        return function

    def start(self, *, seed: int = 0, access_sites: bool = False, steps_per_block: int = 1 << 30) -> None:
        """Forgets registered memory, errors and statistics.

        Args:
            seed: of the order in which blocks, warps and lanes run; 0 is that of their ids.
            access_sites: whether to count the transactions at each place of access.
            steps_per_block: accesses and collective operations after which a block is stopped.
        """
        self._clear()
        self._forget()
        self._config(seed, access_sites, steps_per_block)

    def register(self, tensor: torch.Tensor, access: int) -> int:
        """Makes the storage of a tensor device memory until :meth:`start`.

        Args:
            tensor: on the CPU; must outlive its use.
            access: ``READ_ONLY``, ``READ_WRITE``, or ``UNDEFINED``: its contents are lost, and no kernel may
                read a byte before one has written it.

        Returns:
            The address of the first element.
        """
        storage = tensor.untyped_storage()
        self._register(storage.data_ptr(), storage.nbytes(), access)
        return tensor.data_ptr()

    def errors(self) -> str:
        """The faults so far, a line each: ``kind: what happened, N times, at file:line < caller < ...``."""
        return self._report().decode()

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """What the kernels did so far: ``launches``, in order, and ``sites``, the places of access."""
        return json.loads(self._stats())
