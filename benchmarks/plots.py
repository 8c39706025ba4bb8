"""Time and memory against sequence length, as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

_STYLES = {
    "naive": {"color": "#999999", "marker": "s"},
    "torch": {"color": "#e69f00", "marker": "o"},
    "attn_ext": {"color": "#0072b2", "marker": "D", "linewidth": 2.2},
}
_DTYPE_TITLES = {"float32": "float32", "bfloat16": "bfloat16"}
_DIRECTION_TITLES = {"forward": "forward", "training": "forward + backward"}


def plot_time(results: list[dict], path: Path) -> bool:
    """Milliseconds of the forward against length, one panel a dtype; False if there is nothing to plot."""
    sweep = [result for result in results if result["suite"] == "dense" and result["group"] == "length"]
    panels = {
        f"{title}, forward": [result for result in sweep if result["dtype"] == dtype]
        for dtype, title in _DTYPE_TITLES.items()
    }
    return _plot(
        panels,
        lambda figures: figures["ms"]["median"] if "ms" in figures else None,
        "Milliseconds a call",
        path,
        contenders=("naive", "torch", "attn_ext"),
    )


def plot_memory(results: list[dict], path: Path) -> bool:
    """MiB of peak memory in float32 against length, by direction; False if there is nothing to plot."""
    measured = [result for result in results if result["suite"] == "memory" and result["dtype"] == "float32"]
    panels = {
        f"float32, {title}": [result for result in measured if result["direction"] == direction]
        for direction, title in _DIRECTION_TITLES.items()
    }
    return _plot(
        panels,
        # A logarithmic axis has no zero: less than a tenth of a MiB counts as that.
        lambda figures: max(figures["mib"], 0.1) if "mib" in figures else None,
        "Peak memory beyond\ninputs and outputs, MiB",
        path,
        contenders=("naive", "torch", "attn_ext"),
    )


def _plot(
    panels: dict[str, list[dict]],
    figure_of: Callable[[dict], float | None],
    label: str,
    path: Path,
    contenders: tuple[str, ...],
) -> bool:
    panels = {title: results for title, results in panels.items() if results}
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, results) in zip(axes[0], panels.items(), strict=True):
        for name in contenders:
            points = [
                (result["query_length"], value)
                for result in sorted(results, key=lambda result: result["query_length"])
                if (value := figure_of(result["contenders"].get(name, {}))) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, **_STYLES[name])
        shape = results[0]
        axis.set_title(f"{title}, {shape['heads']} heads of {shape['head_dim']}")
        _format_axes(axis, sorted({result["query_length"] for result in results}))
    axes[0][0].set_ylabel(label)
    axes[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _format_axes(axis: Axes, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("Sequence length L, tokens")
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
