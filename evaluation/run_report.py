"""The report of an unlearning run, report.md and report.png: a table, a plot over time and example answers.

It is made from the files in the run's folder: result.json, generations.jsonl and history.jsonl of the run. The subfolders
vanilla/ and finetuned/ have the results of the earlier models.
"""

from pathlib import Path

from common.files import read_json_lines, write_text
from common.results import GENERATIONS, HISTORY, result_of
from evaluation.plots import plot_quality_over_time, quality_over_time
from evaluation.tables import as_text, headline_table, results_before

EXAMPLES = 5


def write_report(folder: Path, method: str) -> None:
    """Write report.md and report.png into a folder that holds an unlearning run's results.

    Args:
        method: name of the unlearning method in the table.
    """
    results = results_before(folder) | {method: result_of(folder)}
    curve = quality_over_time(result_of(folder / "finetuned"), read_json_lines(folder / HISTORY))
    parts = [f"# Unlearning with {method}", headline_table(results)]
    if len(curve) > 1:
        plot_quality_over_time(curve, folder / "report.png")
        parts += ["## Over time", "![Unlearn quality and utility over time](report.png)"]
    parts += [examples(folder, split, name) for split, name in (("forget", "forgotten"), ("retain", "kept"))]
    write_text(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def examples(folder: Path, split: str, name: str) -> str:
    """The first questions of a split, each with its reference answer and the answers before and after unlearning."""
    after = _answers(folder, split)[:EXAMPLES]
    before = {row["index"]: row["answer"] for row in _answers(folder / "finetuned", split)}
    lines = [f"## To be {name}: {len(after)} questions of the {split} split"]
    for row in after:
        lines += [f"**{_shown(row['question'])}**\n", f"- truth: {_shown(row['reference'])}"]
        if row["index"] in before:
            lines.append(f"- before: {_shown(before[row['index']])}")
        lines.append(f"- after: {_shown(row['answer'])}\n")
    return "\n".join(lines).rstrip()


def _answers(folder: Path, split: str) -> list[dict]:
    path = folder / GENERATIONS
    return [row for row in read_json_lines(path) if row["split"] == split] if path.is_file() else []


def _shown(text: str) -> str:
    return as_text(text) or "(empty)"
