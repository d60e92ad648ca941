"""Plots of the report."""

from pathlib import Path


def quality_over_time(finetuned: dict | None, history: list[dict]) -> list[tuple[float, float, float]]:
    """(minutes of sampling and training, unlearn quality, utility), the finetuned model at 0 minutes."""
    curve = []
    if finetuned:
        curve.append((0.0, finetuned["scores"]["unlearn_quality"], finetuned["scores"]["utility"]))
    seconds = 0.0
    for record in history:
        seconds += record["seconds_training"] + record.get("seconds_sampling", 0.0)
        if "unlearn_quality" in record:
            curve.append((seconds / 60, record["unlearn_quality"], record["utility"]))
    return curve


def plot(curve: list[tuple[float, float, float]], path: Path) -> None:
    """Draw the curve as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    minutes, quality, utility = zip(*curve, strict=True)
    unit, factor = ("minutes", 1) if minutes[-1] >= 2 else ("seconds", 60)
    times = [value * factor for value in minutes]
    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # The two labels at the right end must not lie on one another.
    apart = 4 if quality[-1] >= utility[-1] else -4
    shift = apart if abs(quality[-1] - utility[-1]) < 8 else 0
    lines = ((quality, "unlearn quality", "#b5432e", shift), (utility, "utility", "#2f6f9f", -shift))
    for values, label, color, up in lines:
        axes.plot(times, values, marker="o", markersize=4, linewidth=2, color=color)
        place = {"textcoords": "offset points", "va": "center", "color": color}
        axes.annotate(f"{label} {values[-1]:.1f}", (times[-1], values[-1]), (8, 1.5 * up), **place)
    axes.set(xlabel=f"{unit} of unlearning (sampling and training)", ylabel="percent, higher is better", ylim=(0, 102))
    axes.set_xlim(0, times[-1] * 1.32)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)
