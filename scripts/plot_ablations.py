"""Plot what each setting of PMC does, from the results of the comparison compare/ablations.

    python scripts/compare_methods.py -cn=compare/ablations
    python scripts/plot_ablations.py ablations.png models/comparisons/ablations/results.csv

A panel for each setting that the recipe changes: unlearn quality and utility, means and standard deviations over seeds.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import argparse
import csv
import statistics
from collections import defaultdict

from omegaconf import OmegaConf

from common.cli import recipe_config
from common.errors import UserError
from evaluation.plots import new_figure

RECIPE = "compare/ablations"
BASE = "PMC"  # the method with the settings of its recipe
SCORES = {"unlearn_quality": "unlearn quality", "utility": "utility"}

Points = dict[float, list[dict[str, float]]]  # value of a setting -> the scores of each run


def changed_setting(words: str) -> tuple[str, float]:
    """The key and the value of the one override in a method's arguments."""
    (override,) = [word for word in words.split() if not word.startswith("-")]
    key, _, value = override.partition("=")
    return key, float(value)


def read_points(results: Path) -> dict[str, Points]:
    """Setting -> its values, the recipe's own among them, each with the scores of its runs.

    Raises:
        UserError: when the file has no run of the recipe's own settings, or of no other ones.
    """
    methods = recipe_config(RECIPE).comparison.methods
    runs = defaultdict(list)
    with results.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if all(row.get(column) for column in ("name", *SCORES)):
                runs[row["name"]].append({score: float(row[score]) for score in SCORES})
    if not runs[BASE] or not any(runs[name] for name in methods if name != BASE):
        raise UserError(
            f"{results}: no run of {BASE}, or none with another setting; run scripts/compare_methods.py -cn={RECIPE}"
        )
    points: dict[str, Points] = {}
    for name, words in methods.items():
        if name != BASE and runs[name]:
            key, value = changed_setting(words)
            points.setdefault(key, {})[value] = runs[name]
    recipe = recipe_config("PMC-unlearn-tiny")
    for key in points:
        points[key][float(OmegaConf.select(recipe, key))] = runs[BASE]
    return points


def plot_settings(points: dict[str, Points], path: Path) -> None:
    """One panel per setting, with a line per score."""
    figure, panels = new_figure(2.6 * len(points), 3, panels=len(points))
    for axes, (key, runs_by_value) in zip(panels, points.items(), strict=True):
        values = sorted(runs_by_value)
        for score, label in SCORES.items():
            columns = [[run[score] for run in runs_by_value[value]] for value in values]
            spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
            axes.errorbar(range(len(values)), list(map(statistics.fmean, columns)), spread, marker="o", label=label)
        axes.set(xlabel=key.partition(".")[2].replace("_", " "), ylim=(0, 102))
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    panels[0].set_ylabel("percent")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png", type=Path, help="PNG file to write")
    parser.add_argument("results", type=Path, help="results.csv of the comparison")
    arguments = parser.parse_args()
    try:
        if arguments.png.suffix != ".png":
            raise UserError(f"{arguments.png}: expected the name of the picture, ending in .png, as the first argument")
        if not arguments.results.is_file():
            raise UserError(f"{arguments.results}: no such file")
        points = read_points(arguments.results)
    except UserError as error:
        sys.exit(f"\nError: {error}")
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    plot_settings(points, arguments.png)


if __name__ == "__main__":
    main()
