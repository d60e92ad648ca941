"""Scores of several models as Markdown tables."""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from common.results import method_name, result_of

# Column of a table of methods -> name of the score in result.json, and number of decimals.
COLUMNS = {
    "unlearn quality": ("unlearn_quality", 1),
    "utility": ("utility", 1),
    "forget recall": ("rougeL_recall/forget", 2),
    "retain recall": ("rougeL_recall/retain", 2),
    "P(true answer)": ("tofu/probability/forget", 2),
    "extraction strength": ("memorization/extraction_strength", 2),
    "UDS": ("depth/uds", 2),
    "forget quality": ("tofu/forget_quality", 3),
    "loss AUC": ("privacy/auc/loss", 2),
    "privleak": ("privacy/privleak", 1),
    "relearned recall": ("relearning/rougeL_recall", 2),
    "model utility": ("tofu/model_utility", 3),
    "perplexity of forget answers": ("fluency/perplexity", 1),
    "distinct-2": ("fluency/distinct_2", 2),
    "empty": ("forget_answers_empty", 2),
    "minutes": ("minutes", 2),
}

P_VALUES = ("tofu/forget_quality", "openunlearning/forget_quality")  # they range over many orders of magnitude
BEFORE = ("vanilla", "finetuned")  # subfolders of a run with the results of the models before it


def as_text(text: str) -> str:
    r"""Text that is not ours as a single line of Markdown that shows it as it is; to be used within a line or a table cell.

    >>> print(as_text("a_b | <b>\n# ![x](y)"))
    a_b \| \<b\> # !\[x\](y)
    """
    # An underscore within a word has no meaning in Markdown.
    return re.sub(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))


def results_before(folder: Path) -> dict[str, dict]:
    """The results of the models before a run, by name. One that was itself unlearned has its method in its name."""
    found = {}
    for name in BEFORE:
        if result := result_of(folder / name):
            method = method_name(result["config"])
            found[f"start ({method})" if method else name] = result
    return found


def minutes_of_stage(result: dict) -> float | None:
    """Minutes of the stage that made the model, sampling included and evaluation not; None if none made it."""
    seconds = result.get("seconds", {})
    spent = seconds.get("unlearning", seconds.get("finetuning"))
    return None if spent is None else spent / 60


def headline_table(results: dict[str, dict]) -> str:
    """A row per model: the headline scores, the empty forget answers, and the minutes of the stage that made the model."""
    lines = [
        "| model | unlearn quality | utility | forget recall | retain recall | empty forget answers | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        scores, minutes = result["scores"], minutes_of_stage(result)
        lines.append(
            f"| {as_text(name)} | {scores['unlearn_quality']:.1f} | {scores['utility']:.1f} "
            f"| {scores['rougeL_recall/forget']:.2f} | {scores['rougeL_recall/retain']:.2f} "
            f"| {100 * scores['forget_answers_empty']:.0f}% | {'-' if minutes is None else f'{minutes:.1f}'} |"
        )
    legend = "Unlearn quality and utility: percent, higher is better. Recall: ROUGE-L against the ground truth, 0 to 1."
    return "\n".join(lines) + "\n\n" + legend


def score_table(results: dict[str, dict]) -> str:
    """A row per score with a column per model; the notes of the scores follow the table."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["scores"]))
    lines = [f"| score | better | {' | '.join(map(as_text, results))} |", "|---|---|" + "---:|" * len(results)]
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
        lines.append(f"\n{as_text(', '.join(named))}: {as_text(note)}.")
    return "\n".join(lines)


def _better(name: str, results: dict[str, dict]) -> str:
    """The ideal value of a score or, without one, the better direction."""
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


def is_number(value: float | None) -> bool:
    """Whether a score is known and finite."""
    return value is not None and math.isfinite(value)


def average(score: str, values: Sequence[float]) -> float:
    """The mean over seeds, or the median of p-values: their mean would be that of the largest one."""
    return statistics.median(values) if score in P_VALUES else statistics.fmean(values)


def deviation(score: str, values: Sequence[float]) -> float | None:
    """The standard deviation over seeds (n - 1); None for fewer than two values, and for p-values."""
    return None if score in P_VALUES or len(values) < 2 else statistics.stdev(values)


def cell(score: str, values: Sequence[float | None], digits: int) -> str:
    """The average of the known values, with their standard deviation if there are several.

    >>> cell("utility", [1.0, 2.0, None], 1), cell("utility", [3.0], 2), cell("utility", [None], 1)
    ('1.5 ± 0.7', '3.00', '-')
    >>> cell("tofu/forget_quality", [0.5, 0.25, 0.001], 2)
    '0.25'
    """
    known = list(filter(is_number, values))
    if not known:
        return "-"
    mean, spread = number(average(score, known), digits), deviation(score, known)
    if spread is None:
        return mean
    return f"{mean} ± {spread:.1e}" if "e" in mean else f"{mean} ± {spread:.{digits}f}"


def cell_with_count(score: str, values: Sequence[float], digits: int, runs: int) -> str:
    """`cell`, with the number of values if some of this number of runs have none."""
    text = cell(score, values, digits)
    return f"{text} (n={len(values)})" if 0 < len(values) < runs else text


def number(value: float, digits: int) -> str:
    """Format with this number of decimals; in scientific notation what is large or would be rounded to 0.

    >>> number(2.345, 1), number(1234567.0, 1), number(8e-10, 3)
    ('2.3', '1.2e+06', '8.0e-10')
    """
    readable = value == 0 or 0.5 * 10**-digits <= abs(value) < 1e5
    return f"{value:.{digits}f}" if readable else f"{value:.1e}"
