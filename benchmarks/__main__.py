"""``python -m benchmarks [suite ...]``: attn_ext against its peers, as tables, JSON and pictures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from . import plots, report
from .cases import SUITES, Case
from .contest import BASELINE, time_case
from .environment import ISA_ENVIRONMENT, isa_environment, unlocked_mkl_environment, unlocked_mkl_reason
from .machine import ROOT, describe_commit, describe_machine
from .memory import measure_case, memory_cases
from .native import CompilerUnavailableError
from .peak import measure_peak
from .peers import EXTRAS, load_peers
from .timing import FULL, QUICK, clock_for

SCHEMA_VERSION = 1
_SUITE_NAMES = ("dense", "training", "memory", "overhead")
_TIME_PLOT, _MEMORY_PLOT = "time_vs_length.png", "memory_vs_length.png"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help=f"of {', '.join(_SUITE_NAMES)}; all by default"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every contender (1)")
    parser.add_argument("--quick", action="store_true", help="a short selection, under a minute")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help=f"further contenders, separated by commas: {', '.join(EXTRAS)} or all",
    )
    parser.add_argument(
        "--isa", choices=ISA_ENVIRONMENT, help="hold attn_ext, torch, MKL and oneDNN to this instruction set"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results (DIR/results.json)")
    parser.add_argument(
        "--render",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: report earlier results together",
    )
    parser.add_argument(
        "--publish", action="store_true", help="also write docs/benchmarks.md and the pictures in docs/images"
    )
    # What the process with the unlocked MKL is told: only torch and attn_ext are compared in it.
    parser.add_argument("--baseline-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.suites if name not in _SUITE_NAMES]:
        parser.error(f"unknown suite {unknown[0]!r}: choose from {', '.join(_SUITE_NAMES)}")
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    arguments.suites = arguments.suites or list(_SUITE_NAMES)
    arguments.json = arguments.json or arguments.out / "results.json"
    return arguments


def select_cases(suite: str, quick: bool, only: str) -> list[Case]:
    """The cases of a suite that the options leave."""
    if suite == "memory":
        cases = memory_cases((1024, 2048), ("float32",)) if quick else memory_cases()
    else:
        cases = [case for case in SUITES[suite] if case.quick or not quick]
    return [case for case in cases if only in case.name]


def measure(arguments: argparse.Namespace) -> dict:
    """Runs the suites; returns the document that the JSON file holds."""
    torch.set_num_threads(arguments.threads)
    peers, versions = load_peers([name for name in arguments.peers.split(",") if name])
    if arguments.baseline_only:
        peers = [peer for peer in peers if peer.name in ("attn_ext", BASELINE)]
    for name, version in versions.items():
        if version.startswith("missing"):
            print(f"{name} is {version}", file=sys.stderr)
    try:
        peak: dict[str, object] = dict(measure_peak(arguments.threads))
    except CompilerUnavailableError as reason:
        peak = {"missing": str(reason)}
    results = []
    for suite in arguments.suites:
        cases = select_cases(suite, arguments.quick, arguments.only)
        with tqdm(cases, desc=suite, unit="case", disable=None) as progress:
            for case in progress:
                progress.set_postfix_str(case.name)
                if suite == "memory":
                    contenders = measure_case(case, peers, threads=arguments.threads)
                else:
                    plan = QUICK if arguments.quick else FULL
                    contenders = time_case(case, peers, threads=arguments.threads, plan=plan)
                results.append({"suite": suite, "case": case.name, **asdict(case), "contenders": contenders})
    return {
        "schema": SCHEMA_VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "settings": {
            "threads": arguments.threads,
            "clock": clock_for(arguments.threads),
            "quick": arguments.quick,
            "isa": arguments.isa,
        },
        "peers": versions,
        "peak": peak,
        "mkl_unlocked": _compare_with_unlocked_mkl(arguments, results),
        "results": results,
    }


def _compare_with_unlocked_mkl(arguments: argparse.Namespace, results: list[dict]) -> str:
    """Adds to every result, as ``mkl_unlocked``, attn_ext's speed relative to torch with all MKL kernels.

    Returns:
        What was done, or why nothing was.
    """
    suites = [suite for suite in arguments.suites if suite in ("dense", "training")]
    if arguments.baseline_only or not suites:
        return "not asked for"
    if reason := unlocked_mkl_reason():
        return f"not measured: {reason}"
    try:
        environment = os.environ | unlocked_mkl_environment()
    except CompilerUnavailableError as reason:
        return f"not measured: {reason}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks", *suites, "--baseline-only", "--out", folder]
        command += ["--threads", str(arguments.threads), "--only", arguments.only]
        command += ["--quick"] if arguments.quick else []
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            return f"not measured: its process ended with status {done.returncode}"
        unlocked = json.loads(file.read_text())["results"]
    speedups = {
        (result["suite"], result["case"]): result["contenders"].get("attn_ext", {}).get("speedup")
        for result in unlocked
    }
    for result in results:
        if speedup := speedups.get((result["suite"], result["case"])):
            result["mkl_unlocked"] = speedup
    return "measured in a process of its own, again interleaved"


def merge(documents: list[dict]) -> dict:
    """One document of several, measured on one machine from one commit.

    Raises:
        ValueError: they differ in what makes figures comparable.
    """
    first, *others = documents
    for other in others:
        for key in ("schema", "machine", "commit", "settings"):
            if other[key] != first[key]:
                raise ValueError(
                    f"results to be reported together differ in {key}: {first[key]} and {other[key]}"
                )
    merged = {
        (result["suite"], result["case"]): result for document in documents for result in document["results"]
    }
    return documents[-1] | {"results": list(merged.values())}


def publish(text: str, folder: Path, docs: Path = ROOT / "docs") -> None:
    """Copies the report and the pictures of ``folder`` to the documentation."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = [name for name in (_TIME_PLOT, _MEMORY_PLOT) if (folder / name).exists()]
    for name in pictures:
        shutil.copy(folder / name, images / name)
    embedded = "\n".join(f"\n![{Path(name).stem.replace('_', ' ')}](images/{name})" for name in pictures)
    (docs / "benchmarks.md").write_text(f"{text}{embedded}\n" if embedded else text)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    wanted = isa_environment(arguments.isa) if arguments.isa else {}
    if not wanted.items() <= os.environ.items():
        # The libraries read these variables when they are loaded, so the process starts over with them.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *argv], os.environ | wanted)
    if arguments.render:
        document = merge([json.loads(file.read_text()) for file in arguments.render])
    else:
        document = measure(arguments)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plots.plot_time(document["results"], arguments.out / _TIME_PLOT)
    plots.plot_memory(document["results"], arguments.out / _MEMORY_PLOT)
    text = report.render(document)
    (arguments.out / "benchmarks.md").write_text(text)
    print(text)
    if arguments.publish:
        publish(text, arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
