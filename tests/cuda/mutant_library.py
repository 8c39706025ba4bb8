"""Emulated kernels, as they are and with a planted defect: how they are built, and how the defect shows."""

from __future__ import annotations

import ctypes
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda_programs import SOURCES
from emulated import Device
from forward_mutants import Mutant
from operators import build_arguments
from programs import ROOT

from tools import emulation

DIRECTORY = ROOT / "build" / "emulation" / "mutants"
STEPS = 1 << 22  # accesses of a block, many times what a whole kernel needs

Problem = Callable[[Any], None]


class Subject(NamedTuple):
    """What defects are planted in, and what is to notice them."""

    files: tuple[str, ...]  # of csrc/cuda: the selector and the small kernels
    lines: Callable[[str], set[tuple[str, str]]]  # of variants.def: KIND and name, for a mutant's variant
    variants: Mapping[str, Any]  # by name: what problems are given
    problems: tuple[Problem, ...]
    by: Callable[[str], AbstractContextManager]  # puts the operators of a namespace in the place of the CPU's
    device: Device


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _variants(wanted: set[tuple[str, str]]) -> tuple[str, dict[str, list[str]]]:
    """variants.def with these lines only; and the lines, by kind."""
    text, lines = [], {}
    for line in (ROOT / "csrc" / "core" / "variants.def").read_text().splitlines():
        entry = re.match(r"([A-Z_]+)\((\w+), ", line)
        if entry and entry.groups() in wanted:
            lines.setdefault(entry[1].lower(), []).append(line)
        if not entry or entry.groups() in wanted:
            text.append(line)
    return "\n".join(text), lines


def build(subject: Subject, variant: str, mutant: Mutant | None = None) -> Path:
    """A library whose operators have these kernels only; the mutant's file comes before that of csrc."""
    key = repr((subject.files, variant, mutant)).encode()
    directory = DIRECTORY / hashlib.sha256(key).hexdigest()[:16]
    text, kernels = _variants(subject.lines(variant))
    _write(directory / "core" / "variants.def", text)
    if mutant is not None:
        genuine = (ROOT / "csrc" / mutant.file).read_text()
        assert genuine.count(mutant.old) == 1, f"{mutant.what}: {mutant.file} has changed"
        _write(directory / mutant.file, genuine.replace(mutant.old, mutant.new))
    own = [f"-iquote{directory}", "-Wno-error"]
    sources: list[tuple[Path, list[str]]] = []
    files = subject.files  # compiled with the first kernels, since that takes least time
    for kind, lines in kernels.items():
        includes = "".join(f'#include "cuda/{file}"\n' for file in (*files, f"{kind}_instance.cuh"))
        sources.append((directory / f"{kind}.cu", own))
        _write(directory / f"{kind}.cu", "\n".join([includes, *lines, ""]))
        files = ()
    operators = [f"-Dattn_ext_emulated={_namespace(mutant)}"]  # two libraries may not define the same ones
    return emulation.build(
        [*sources, (ROOT / "csrc" / "bindings" / "emulated.cpp", operators), SOURCES / "absent.cpp"],
        directory / "kernels.so",
        **build_arguments(),
    )


def _namespace(mutant: Mutant | None) -> str:
    return "attn_ext_genuine" if mutant is None else "attn_ext_mutant"


class _Kernels:
    """Those of a variant, on the emulator."""

    def __init__(self, subject: Subject, variant: str, mutant: Mutant | None = None) -> None:
        library = build(subject, variant, mutant)
        torch.ops.load_library(library)
        self._emulator = emulation.Emulator(library)
        self._emulator.library.attn_ext_emulated_device(*map(ctypes.c_int, subject.device))
        self._subject, self._variant, self._namespace = subject, subject.variants[variant], _namespace(mutant)

    def results(self, problem: Problem) -> tuple[Counter[str], str]:
        """What a problem's launches executed and their accesses cost; and what is wrong."""
        torch.manual_seed(0)
        self._emulator.start(seed=1, access_sites=True, steps_per_block=STEPS)
        wrong = ""
        try:
            with self._subject.by(self._namespace):
                problem(self._variant)
        except Exception as error:  # an assertion, or what the callers of operators make of a fault
            wrong = self._emulator.errors() or str(error) or "wrong"
        return self._counters(), wrong

    def _counters(self) -> Counter[str]:
        counters: Counter[str] = Counter()
        statistics = self._emulator.statistics()
        for launch in statistics["launches"]:
            counts = {name: count for name, count in launch.items() if isinstance(count, int)}
            counters.update({f"{launch['kernel']}: {name}": count for name, count in counts.items()})
        for site in statistics["sites"]:
            cost = "wavefronts" if site["space"] == "shared" else "sectors"
            counters[f"{site['kernel']}: {site['operation']}: {cost}"] += site[cost]
        return counters


def noticed(subject: Subject, mutant: Mutant) -> str:
    """How the defect shows first, by results and else by counters; nothing, if it does not."""
    genuine, kernels = _Kernels(subject, mutant.variant), _Kernels(subject, mutant.variant, mutant)
    of_mutant = {}
    for problem in subject.problems:
        of_mutant[problem], wrong = kernels.results(problem)
        if wrong:
            _, of_genuine = genuine.results(problem)
            assert not of_genuine, f"{problem.__name__}: {of_genuine}"
            return f"{problem.__name__}: {wrong.splitlines()[0]}"
    for problem, counters in of_mutant.items():
        expected, wrong = genuine.results(problem)
        assert not wrong, f"{problem.__name__}: {wrong}"
        if counters != expected:
            name = min(name for name in counters | expected if counters[name] != expected[name])
            return f"{problem.__name__}: {name}: {counters[name]}, not {expected[name]}"
    return ""


def main(subject: Subject, mutants: Sequence[Mutant]) -> None:
    """Prints what is noticed of the mutant whose index is the argument of the program, if anything."""
    torch.set_num_threads(1)
    print(noticed(subject, mutants[int(sys.argv[1])]))
