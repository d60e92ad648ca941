"""Write a report on any runs: which setting to use, tables, plots, answers.

    python evaluation/report.py models/unlearned/PMC-unlearn-tiny
    python evaluation/report.py models/unlearned models/evaluated --output models/report

Reads the runs in the folders and their subfolders, with the evaluations of their models, and writes

    report.html    one page that needs no network: tables, plots, answers before and after
    report.md      the table in Markdown
    report.tex     the table in LaTeX, with booktabs
    results.csv    a row per run with all settings that differ and all scores
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import argparse
import csv
import io
import logging
import re
from collections.abc import Sequence

from common.errors import UserError
from common.files import is_first_process, write_text
from common.sweeps import Sweep
from evaluation.report_page import page
from evaluation.run_records import (
    Group,
    Run,
    grouped,
    has_run,
    place,
    read_evaluations,
    read_runs,
    score_names,
    shortened,
    shown_value,
    varied_keys,
)
from evaluation.summary import summary
from evaluation.tables import COLUMNS, P_VALUES, as_text, cell_with_count

DIGITS = 4  # significant digits of a setting in tables; results.csv has all

log = logging.getLogger(__name__)


def write_reports(runs: Sequence[Run], groups: Sequence[Group], folder: Path, title: str) -> Path:
    """Write the four files on runs and their groups to a folder; returns the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", markdown(runs, groups, title))
    write_text(folder / "report.tex", latex(groups))
    write_text(folder / "results.csv", as_csv(runs, groups))
    write_text(folder / "report.html", page(runs, groups, title))
    return folder / "report.html"


def write_page(folders: Sequence[Path], target: Path, title: str) -> Path:
    """Write only report.html on the runs in these folders; returns its path."""
    runs = read_runs(folders)
    write_text(target / "report.html", page(runs, grouped(runs), title))
    return target / "report.html"


def report_sweep(sweep: Sweep) -> None:
    """Print the table of a sweep's runs and the runs without a result, and write the report."""
    if not is_first_process():
        return
    try:
        runs = runs_of_sweep(sweep)
        groups = grouped(runs)
        page_path = write_reports(runs, groups, sweep.folder, f"Sweep of {sweep.parent.name}")
        text = overview(groups)
    except Exception as error:  # the runs themselves are safe, and the sweep's own error is printed next
        log.error("no report of the sweep: %s", error)
        return
    print(f"\n{text}\n")
    if sweep.runs:
        done = sum(run.status == "done" and run.folder in sweep.runs for run in runs)
        print(f"{done} of {len(sweep.runs)} runs are finished.")
    for run in runs:
        if run.status != "done":
            print(f"- {run.folder.name}: {run.status}")
    print(f"Report: {page_path}")


def runs_of_sweep(sweep: Sweep) -> list[Run]:
    """The runs of a sweep, those without a result of the sweep's configuration by name and with the reason.

    In a sweep of evaluations each one is a run, as they differ in settings of the evaluation.
    """
    if not sweep.runs:
        return read_runs([sweep.parent]) if has_run(sweep.parent) else []
    of_evaluation = all("metrics" in cfg for cfg in sweep.runs.values())
    begun = [folder for folder in sweep.runs if has_run(folder)]
    runs = read_evaluations(begun) if of_evaluation else read_runs(begun)
    for run in runs:
        if run.folder in sweep.runs and run.status == "done" and not sweep.has_result(run.folder):
            run.status = "not begun: its folder has the result of an earlier configuration or model"
    return runs + [Run(folder, folder.name, {}, "not begun") for folder in sweep.runs if folder not in begun]


def overview(groups: Sequence[Group]) -> str:
    """The table and the sentences, for the terminal."""
    if not groups:
        return "No run is finished."
    return "\n".join([method_table(groups), "", *summary(groups)])


def method_table(groups: Sequence[Group]) -> str:
    """A row per setting in Markdown: means over seeds with standard deviations; best in bold, * on the Pareto front."""
    keys, columns = varied_keys(groups), _measured(groups)
    seeds = max((len(group.runs) for group in groups), default=1)
    header = ["method", *shortened(keys).values(), *(["seeds"] if seeds > 1 else []), *columns]
    lines = [f"| {' | '.join(map(as_text, header))} |", "|---|" + "---:|" * (len(header) - 1)]
    for group in groups:
        cells = [f"{as_text(group.name)}{' *' if group.on_front else ''}"]
        cells += [as_text(shown_value(group.varied[key], DIGITS)) if key in group.varied else "" for key in keys]
        cells += [str(len(group.runs))] if seeds > 1 else []
        for score, digits in columns.values():
            text = with_count(group, score, digits)
            cells.append(f"**{text}**" if score in group.best else text)
        lines.append(f"| {' | '.join(cells)} |")
    has_p_values = any(score in P_VALUES for score, _ in columns.values())
    median = "; of p-values (forget quality) the median" if has_p_values else ""
    notes = f"Mean ± standard deviation over seeds{median}." if seeds > 1 else ""
    front = "\\* on the Pareto front of unlearn quality and utility." if any(group.on_front for group in groups) else ""
    return "\n".join(lines) + f"\n\n{' '.join(filter(None, (notes, front)))}".rstrip()


def with_count(group: Group, score: str, digits: int) -> str:
    """The score's mean and deviation; with the number of runs if some of the group lack it."""
    return cell_with_count(score, group.values(score), digits, len(group.runs))


def _measured(groups: Sequence[Group]) -> dict[str, tuple[str, int]]:
    """The columns of which some group has a value."""
    return {title: column for title, column in COLUMNS.items() if any(group.values(column[0]) for group in groups)}


def markdown(runs: Sequence[Run], groups: Sequence[Group], title: str) -> str:
    parts = [f"# {as_text(title)}", *map(as_text, summary(groups)), *([method_table(groups)] if groups else [])]
    if missing := [run for run in runs if run.status != "done"]:
        lines = [f"- {as_text(str(run.folder.name))}: {as_text(run.status)}" for run in missing]
        parts += ["## Without a result", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def as_latex(text: str) -> str:
    """Text as LaTeX shows it.

    >>> print(as_latex("a_b & 5% ± 1"))
    a\\_b \\& 5\\% $\\pm$ 1
    """
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return re.sub(r"[\\~^±&%$#_{}]", lambda match: named.get(match[0], f"\\{match[0]}"), text)


def latex(groups: Sequence[Group]) -> str:
    r"""The table for a paper; it needs \usepackage{booktabs}."""
    keys, columns = varied_keys(groups), _measured(groups)
    header = ["method", *shortened(keys).values(), *columns]
    rows = []
    for group in groups:
        cells = [as_latex(group.name)]
        cells += [as_latex(shown_value(group.varied[key], DIGITS)) if key in group.varied else "" for key in keys]
        for score, digits in columns.values():
            text = as_latex(with_count(group, score, digits))
            cells.append(rf"\textbf{{{text}}}" if score in group.best else text)
        rows.append(" & ".join(cells) + r" \\")
    references = sum(group.reference for group in groups)
    body = [*rows[:references], *([r"\midrule"] if 0 < references < len(rows) else []), *rows[references:]]
    columns_of_table = f"l{'r' * (len(header) - 1)}"
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{columns_of_table}}}",
            r"\toprule",
            " & ".join(map(as_latex, header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def as_csv(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """A row per run: name, seed, status, folder, the settings that differ between runs, all scores in full precision."""
    keys, scores = varied_keys(groups), score_names(groups)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "reference", "seed", "status", "folder", *keys, *scores])
    for run in runs:
        values = [run.scores.get(score) for score in scores]
        found = [shown_value(run.settings[key]) if key in run.settings else "" for key in keys]
        table.writerow([run.name, run.reference, run.seed, run.status, place(run.folder), *found, *values])
    return text.getvalue()


def argument_parser() -> argparse.ArgumentParser:
    about, _, rest = __doc__.partition("\n\n")
    form = argparse.ArgumentParser(
        "report.py", description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form.add_argument("folders", nargs="+", type=Path, help="folders with runs, in any depth")
    form.add_argument("--output", type=Path, help="folder of the report; by default report/ in the first folder")
    form.add_argument("--title", help="heading of the report; by default the folders' names")
    return form


def main(words: Sequence[str]) -> None:
    given = argument_parser().parse_args(words)
    folders = [folder.resolve() for folder in given.folders]
    runs = read_runs(folders)
    groups = grouped(runs)
    title = given.title or ", ".join(folder.name for folder in folders)
    try:
        path = write_reports(runs, groups, given.output or folders[0] / "report", title)
    except OSError as error:
        raise UserError(f"--output={error.filename}: {error.strerror}; name another folder") from error
    print(f"{overview(groups)}\n\nReport: {path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"\nError: {error}")
