"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .peak import peak_for

SUITE_TITLES = {
    "dense": "Forward",
    "training": "Forward and backward",
    "memory": "Peak memory beyond inputs and outputs",
    "overhead": "Cost of a call",
}
_OURS = "attn_ext"


def render(document: dict) -> str:
    """The whole document as written to the JSON file, as Markdown."""
    parts = [render_header(document)]
    for suite, title in SUITE_TITLES.items():
        if any(result["suite"] == suite for result in document["results"]):
            parts.append(f"## {title}\n\n{render_suite(document, suite)}")
    if notes := _notes(document["results"]):
        parts.append("## Not measured\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def render_header(document: dict) -> str:
    """Machine, software, peak and method, one bullet each."""
    machine, settings = document["machine"], document["settings"]
    clock = {"cpu": "process CPU time", "wall": "wall time"}[settings["clock"]]
    threads = f"{settings['threads']} thread" + "s" * (settings["threads"] > 1)
    peak = document["peak"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in peak.items() if isinstance(rate, float))
    lines = [
        render_machine(machine),
        f"Measured arithmetic peak of {threads}, GFLOP/s: {rates}."
        if rates
        else f"Arithmetic peak not measured: {peak.get('missing')}.",
        f"Contenders: {_contenders(document['peers'])}.",
        f"{threads.capitalize()}, {clock}; interleaved rounds, median and half the interquartile range; "
        "x torch is the speed relative to torch, round by round, quartiles in brackets; above 1 is faster.",
        f"MKL with its vendor check bypassed: {document['mkl_unlocked']}.",
        "Of CPUs only: docs/roofline.md predicts what the CUDA kernels take.",
        f"Commit {document['commit']}, {document['date']}.",
    ]
    return "# Benchmarks\n\n" + "\n".join(f"- {line}" for line in lines)


def render_machine(machine: dict) -> str:
    """What `describe_machine` says, as a sentence."""
    return (
        f"Machine: {machine['cpu']} ({machine['cpu_model']}), {machine['cores']} cores, "
        f"{' '.join(machine['isa'])}; torch {machine['torch']} on {machine['torch_isa']}, "
        f"attn_ext on {machine['attn_ext_isa']}."
    )


def _contenders(versions: dict[str, str]) -> str:
    """``attn_ext (0.1.0); torch, math, naive (2.13.0)``."""
    names: dict[str, list[str]] = {}
    for name, version in versions.items():
        names.setdefault(version, []).append(name)
    return "; ".join(f"{', '.join(same)} ({version})" for version, same in names.items())


def render_suite(document: dict, suite: str) -> str:
    """The tables of one suite."""
    results = [result for result in document["results"] if result["suite"] == suite]
    if suite == "memory":
        return _memory_table(results)
    if suite == "overhead":
        return "Microseconds a call.\n\n" + _time_table(results, _microseconds)
    parts = []
    if others := [result for result in results if result["group"] != "decode"]:
        columns = {f"{_OURS} ms": lambda result, ours: f"{ours['ms']['median']:.3g}"}
        if "float32" in (peak := document["peak"]):
            columns["of peak"] = lambda result, ours: (
                f"{ours['gflops'] / peak_for(peak, result['dtype']):.0%}"
            )
        title = "GFLOP/s (4 B H Lq Lk D, half when causal, x 3.5 with the backward)."
        parts.append(f"{title}\n\n{_time_table(others, _gflops, columns)}")
    if decode := [result for result in results if result["group"] == "decode"]:
        title = "Decode, one new query: milliseconds and GB/s."
        parts.append(f"{title}\n\n{_time_table(decode, _milliseconds_and_bandwidth)}")
    return "\n\n".join(parts)


def _time_table(
    results: list[dict],
    cell: Callable[[dict], str],
    columns: dict[str, Callable[[dict, dict], str]] | None = None,
) -> str:
    """A column a contender, further ones about ours (functions of result and our figures), and speedups."""
    names = _contender_names(results)
    columns = columns or {}
    unlocked = any("mkl_unlocked" in result for result in results)
    rows = []
    for result in results:
        contenders = result["contenders"]
        ours = contenders.get(_OURS, {})
        row = [result["case"]]
        row += [cell(contenders[name]) if "ms" in contenders.get(name, {}) else "-" for name in names]
        row += [column(result, ours) if "ms" in ours else "-" for column in columns.values()]
        row.append(_speedup(ours.get("speedup")))
        if unlocked:
            row.append(_speedup(result.get("mkl_unlocked")))
        rows.append(row)
    header = ["case", *names, *columns, "x torch", *["x torch, MKL unlocked"] * unlocked]
    return markdown_table(header, rows)


def _microseconds(figures: dict) -> str:
    return f"{1e3 * figures['ms']['median']:.2f}{_spread(figures)}"


def _gflops(figures: dict) -> str:
    return f"{figures['gflops']:.1f}{_spread(figures)}"


def _milliseconds_and_bandwidth(figures: dict) -> str:
    return f"{figures['ms']['median']:.3g} ms, {figures['gbps']:.1f} GB/s"


def _spread(figures: dict) -> str:
    """Half the interquartile range, relative to the median; a single round has none."""
    if figures["rounds"] == 1:
        return ""
    times = figures["ms"]
    return f" ±{(times['q3'] - times['q1']) / 2 / times['median']:.0%}"


def _memory_table(results: list[dict]) -> str:
    names = _contender_names(results)
    others = [name for name in names if name != _OURS]
    rows = []
    for result in results:
        mib = {name: figures["mib"] for name, figures in result["contenders"].items() if "mib" in figures}
        row = [result["case"], *(f"{mib[name]:.1f}" if name in mib else "-" for name in names)]
        row += [
            f"{max(mib[name], 1.0) / max(mib[_OURS], 1.0):.1f}" if name in mib and _OURS in mib else "-"
            for name in others
        ]
        rows.append(row)
    header = ["case", *names, *(f"{name} / {_OURS}" for name in others)]
    return "MiB; ratios count less than 1 MiB as 1.\n\n" + markdown_table(header, rows)


def _contender_names(results: list[dict]) -> list[str]:
    """In order of appearance, without those that have no figure at all."""
    names = dict.fromkeys(name for result in results for name in result["contenders"])
    return [
        name
        for name in names
        if any("excluded" not in result["contenders"].get(name, {"excluded": ""}) for result in results)
    ]


def _speedup(spread: dict | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['median']:.2f} ({spread['q1']:.2f}-{spread['q3']:.2f})"


def _notes(results: Iterable[dict]) -> list[str]:
    """Why contenders have no figure, those of one reason on one line."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, figures in result["contenders"].items():
            if "excluded" in figures:
                cases.setdefault((name, figures["excluded"]), []).append(result["case"])
    return [f"{name}: {', '.join(where)}: {reason}" for (name, reason), where in cases.items()]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to one width, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])
