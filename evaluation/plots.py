"""The common style of all plots, the plot in an unlearning run's report, and that of relearning."""

import re
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, BLUE, GRAY = "#b5432e", "#2f6f9f", "#999999"


def new_figure(width: float, height: float, panels: int = 1, grid: str = "both") -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, side by side; `figure.savefig(path)` writes it.

    Args:
        width, height: in inches.
        grid: axis whose grid lines are drawn: x, y or both.
    """
    from matplotlib.figure import Figure  # imported here: it is slow, and most commands draw nothing

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, alpha=0.3)
    return figure, all_axes


def quality_over_time(finetuned: dict | None, history: list[dict]) -> list[tuple[float, float, float]]:
    """Points (minutes of sampling and training, unlearn quality, utility); the finetuned model is at 0 minutes."""
    start = finetuned and finetuned["scores"]
    curve = [(0.0, start["unlearn_quality"], start["utility"])] if start else []
    of_epochs = zip(minutes_of_epochs(history), history, strict=True)
    return curve + [
        (minutes, record["unlearn_quality"], record["utility"])
        for minutes, record in of_epochs
        if "unlearn_quality" in record
    ]


def minutes_of_epochs(history: list[dict]) -> list[float]:
    """Minutes of sampling and training from the start of a run to the end of each epoch."""
    seconds = (record.get("seconds_training", 0.0) + record.get("seconds_sampling", 0.0) for record in history)
    return [total / 60 for total in accumulate(seconds)]


def plot_quality_over_time(curve: list[tuple[float, float, float]], path: Path) -> None:
    """Draw the curve of `quality_over_time` as a PNG."""
    minutes, quality, utility = zip(*curve, strict=True)
    unit, factor = ("minutes", 1) if minutes[-1] >= 2 else ("seconds", 60)
    times = [value * factor for value in minutes]
    figure, (axes,) = new_figure(7, 4, grid="y")
    # The labels at the right end are moved apart if they would overlap.
    apart = 4 if quality[-1] >= utility[-1] else -4
    shift = apart if abs(quality[-1] - utility[-1]) < 8 else 0
    for values, label, color, up in ((quality, "unlearn quality", RED, shift), (utility, "utility", BLUE, -shift)):
        axes.plot(times, values, marker="o", markersize=4, linewidth=2, color=color)
        style = {"textcoords": "offset points", "va": "center", "color": color}
        axes.annotate(f"{label} {values[-1]:.1f}", (times[-1], values[-1]), (8, 1.5 * up), **style)
    axes.set(xlabel=f"{unit} of unlearning (sampling and training)", ylabel="percent, higher is better", ylim=(0, 102))
    axes.set_xlim(0, times[-1] * 1.32)
    figure.savefig(path)


def relearning_curves(results: dict[str, dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What was relearned from ("forget" or "retain" rows) -> model -> points (epochs, forget recall), from 0 epochs on.

    Args:
        results: name of a model -> its result.json. Those that were not measured after several numbers of epochs are left out.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for model, result in results.items():
        for name, recall in result["scores"].items():
            if found := re.fullmatch(r"relearning/(?:on_(\w+)/)?rougeL_recall@(\d+)", name):
                of_models = curves.setdefault(found[1] or "forget", {})
                before = (0, result["scores"]["rougeL_recall/forget"])
                of_models.setdefault(model, [before]).append((int(found[2]), recall))
    return curves


def plot_relearning(curves: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Draw the curves of `relearning_curves` as a PNG: a panel per kind of rows, a line per model."""
    figure, panels = new_figure(4.5 * len(curves) + 1.5, 3.5, panels=len(curves))
    for axes, (rows, of_models) in zip(panels, curves.items(), strict=True):
        for model, points in of_models.items():
            axes.plot(*zip(*sorted(points), strict=True), marker=".", label=model)
        axes.set(xlabel=f"epochs on {rows} rows", ylabel="forget recall", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
