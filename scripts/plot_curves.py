"""Plot the unlearn quality and the utility of several runs over their epochs.

    python scripts/plot_curves.py curves.png paper=models/unlearned/A "with warmup=models/unlearned/B"

The runs must have been evaluated during training (evaluation.every_epochs above 0). Also prints a table of each run's lowest
utility and last scores.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import argparse

from common.errors import UserError
from common.files import read_json_lines
from common.results import HISTORY
from evaluation.plots import new_figure

SCORES = {"unlearn_quality": "unlearn quality", "utility": "utility"}


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The evaluated epochs of a run, from its history.jsonl.

    Raises:
        UserError: when there is no history, or no epoch was evaluated.
    """
    path = folder / HISTORY
    if not path.exists():
        raise UserError(f"{folder}: no {HISTORY}; name the folder of a finished run")
    evaluated = [record for record in read_json_lines(path) if "utility" in record]
    if not evaluated:
        raise UserError(f"{path}: no epoch was evaluated; run it with evaluation.every_epochs=1")
    return evaluated


def worst_and_last(curves: dict[str, list[dict[str, float]]]) -> str:
    """A row per run: its lowest utility and the epoch of it, and both scores of the last evaluated epoch."""
    lines = ["| run | worst utility | at epoch | last utility | last unlearn quality |", "|---|---:|---:|---:|---:|"]
    for name, curve in curves.items():
        worst, last = min(curve, key=lambda record: record["utility"]), curve[-1]
        lines.append(
            f"| {name} | {worst['utility']:.1f} | {worst['epoch']} | {last['utility']:.1f} | {last['unlearn_quality']:.1f} |"
        )
    return "\n".join(lines)


def plot_epochs(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One panel per score, with a line per run."""
    figure, panels = new_figure(9, 3.5, panels=len(SCORES))
    for axes, (score, label) in zip(panels, SCORES.items(), strict=True):
        for name, curve in curves.items():
            x, y = ([record[key] for record in curve] for key in ("epoch", score))
            axes.plot(x, y, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
    axes.legend(frameon=False)
    figure.savefig(path)


def named_folders(words: list[str]) -> dict[str, Path]:
    """Name -> folder from arguments NAME=FOLDER.

    Raises:
        UserError: for an argument of another form, and for a name that occurs twice.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.rpartition("=")
        if not name:
            raise UserError(f"{word}: expected NAME=FOLDER")
        if name in folders:
            raise UserError(f"{word}: the name {name} is given twice")
        folders[name] = Path(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png", type=Path, help="PNG file to write")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="label of a run in the plot, and its folder")
    arguments = parser.parse_args()
    try:
        if arguments.png.suffix != ".png":
            raise UserError(f"{arguments.png}: expected the name of the picture, ending in .png, as the first argument")
        curves = {name: read_curve(folder) for name, folder in named_folders(arguments.runs).items()}
    except UserError as error:
        sys.exit(f"\nError: {error}")
    print(worst_and_last(curves))
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    plot_epochs(curves, arguments.png)


if __name__ == "__main__":
    main()
