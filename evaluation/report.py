"""A run's report for people: a table, a plot over time and example answers, as report.md and report.png.

It is made from the files in the run's folder alone: result.json, generations.jsonl and history.jsonl of the run, and the
results of the models before it in vanilla/ and finetuned/.
"""

from pathlib import Path

from common.runs import result_of
from common.runtime import read_json_lines, write_text
from evaluation.result import GENERATIONS, HISTORY

EXAMPLES = 5
BEFORE = ("vanilla", "finetuned")


def write_report(folder: Path, method: str) -> None:
    """Write report.md and report.png into a folder that holds an unlearning run's results.

    Args:
        method: name of the unlearning method, as the table shows it.
    """
    results = {name: result_of(folder / name) for name in BEFORE}
    results = {name: result for name, result in results.items() if result} | {method: result_of(folder)}
    curve = quality_over_time(results.get("finetuned"), read_json_lines(folder / HISTORY))
    parts = [f"# Unlearning with {method}", table(results)]
    if len(curve) > 1:
        plot(curve, folder / "report.png")
        parts += ["## Over time", "![Unlearn quality and utility over time](report.png)"]
    parts += [examples(folder, split, name) for split, name in (("forget", "forgotten"), ("retain", "kept"))]
    write_text(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def table(results: dict[str, dict]) -> str:
    """The models side by side: headline scores, empty forget answers, minutes of the stage that made each."""
    lines = [
        "| model | unlearn quality | utility | forget recall | retain recall | empty forget answers | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        scores, seconds = result["scores"], result["seconds"]
        stage = seconds.get("unlearning", seconds.get("finetuning"))
        lines.append(
            f"| {name} | {scores['unlearn_quality']:.1f} | {scores['utility']:.1f} "
            f"| {scores['rougeL_recall/forget']:.2f} | {scores['rougeL_recall/retain']:.2f} "
            f"| {100 * scores['forget_answers_empty']:.0f}% | {'-' if stage is None else f'{stage / 60:.1f}'} |"
        )
    legend = "Unlearn quality and utility: percent, higher is better. Recall: ROUGE-L against the ground truth, 0 to 1."
    return "\n".join(lines) + "\n\n" + legend


def full_table(results: dict[str, dict]) -> str:
    """The models side by side, a row a score, and below it why some are missing."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["scores"]))
    lines = [f"| score | better | {' | '.join(results)} |", "|---|---|" + "---:|" * len(results)]
    for name in names:
        values = [_number(result["scores"].get(name)) for result in results.values()]
        lines.append(f"| {name} | {_better(name, results)} | {' | '.join(values)} |")
    notes: dict[str, dict[str, list[str]]] = {}  # note -> score -> models
    for model, result in results.items():
        left_out = [(name, f"{rows} rows without a value are left out") for name, rows in result["left_out"].items()]
        for name, note in [*result["notes"].items(), *left_out]:
            notes.setdefault(note, {}).setdefault(name, []).append(model)
    for note, models_of in notes.items():
        named = [
            name if len(models) == len(results) else f"{name} ({', '.join(models)})"
            for name, models in models_of.items()
        ]
        lines.append(f"\n{', '.join(named)}: {note}.")
    return "\n".join(lines)


def _better(name: str, results: dict[str, dict]) -> str:
    """Which way a score is better: a direction, or the value that it should have."""
    for result in results.values():
        if name in result["ideal"]:
            return f"{result['ideal'][name]:.3g}"
        if result["higher_is_better"].get(name) is not None:
            return "higher" if result["higher_is_better"][name] else "lower"
    return ""


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


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


def examples(folder: Path, split: str, name: str) -> str:
    """The first questions of a split with the reference and the answers before and after."""
    after = _answers(folder, split)[:EXAMPLES]
    before = {row["index"]: row["answer"] for row in _answers(folder / "finetuned", split)}
    lines = [f"## To be {name}: {len(after)} questions of the {split} split"]
    for row in after:
        lines.append(f"**{row['question']}**\n")
        lines.append(f"- truth: {row['reference']}")
        if row["index"] in before:
            lines.append(f"- before: {_shown(before[row['index']])}")
        lines.append(f"- after: {_shown(row['answer'])}\n")
    return "\n".join(lines).rstrip()


def _answers(folder: Path, split: str) -> list[dict]:
    path = folder / GENERATIONS
    return [row for row in read_json_lines(path) if row["split"] == split] if path.is_file() else []


def _shown(answer: str) -> str:
    return " ".join(answer.split()) or "(empty)"
