"""The leaderboard of the docs is what its results say."""

import csv
import statistics

from omegaconf import OmegaConf

from common.files import ROOT
from tests.helpers import docs_generator

BOARDS = sorted((ROOT / "docs/leaderboard").glob("*.csv"))


def write_results(path, rows):
    keys = ["name", "reference", "seed", "unlearn_quality", "utility", "tofu/forget_quality", "depth/uds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([keys, *rows])
    return path


def test_rows_are_means_references_come_first_and_methods_by_unlearn_quality(tmp_path):
    rows = [
        ["NPO", "False", 0, 80.0, 99.0, 0.01, ""],
        ["PMC", "False", 0, 90.0, 97.0, 1e-9, ""],
        ["PMC", "False", 1, 92.0, 99.0, 0.5, ""],
        ["PMC", "False", 2, "", "", "", ""],
        ["retain-only", "True", 0, 70.0, 100.0, 1.0, ""],
    ]
    page = docs_generator().leaderboard_page(write_results(tmp_path / "tiny.csv", rows))
    header, _, *lines = [line for line in page.splitlines() if line.startswith("|")]
    assert header == "| method | seeds | unlearn quality | utility | forget quality |", (
        "a score that no run has is left out"
    )
    assert lines == [
        "| *retain-only* | 1 | 70.0 | 100.0 | 1.000 |",
        "| PMC | 2 | 91.0 ± 1.4 | 98.0 ± 1.4 | 0.250 |",
        "| NPO | 1 | 80.0 | 99.0 | 0.010 |",
    ]
    assert "- PMC: `python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny`" in page and "method=npo" in page


def test_every_method_of_a_board_has_its_settings_and_readme_s_figures_are_the_board_s():
    assert BOARDS
    for path in BOARDS:
        results = docs_generator().results_by_name(path)
        methods = [name for name, runs in results.items() if runs[0]["reference"] == "False"]
        recipe = OmegaConf.load(docs_generator().compare_recipe(path)).comparison
        assert set(methods) <= recipe.methods.keys()
    tiny = docs_generator().results_by_name(ROOT / "docs/leaderboard/tiny.csv")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("PMC", "IDK", "NPO"):
        quality = [float(run["unlearn_quality"]) for run in tiny[name]]
        assert f"| {statistics.fmean(quality):.1f} ± {statistics.stdev(quality):.1f} |" in readme, name
