"""The leaderboard of the docs is what its results say."""

import csv

from omegaconf import OmegaConf

from common.files import ROOT
from evaluation.tables import cell
from tests.helpers import docs_generator

BOARDS = sorted((ROOT / "docs/leaderboard").glob("*.csv"))


def write_results(path, rows):
    keys = ["name", "reference", "seed", "unlearn_quality", "utility", "tofu/forget_quality", "depth/uds", "status"]
    rows = [row if len(row) == len(keys) else [*row, "done"] for row in rows]
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


def test_runs_that_do_not_count_and_scores_of_some_seeds_are_marked(tmp_path):
    rows = [["PMC", "False", 0, 90.0, 97.0, "", 0.9, "done"], ["PMC", "False", 1, 92.0, 99.0, "", "", "done"]]
    rows.append(["PMC", "False", 2, 10.0, 1.0, "", "", "left out: made again"])
    page = docs_generator().leaderboard_page(write_results(tmp_path / "tiny.csv", rows))
    assert "| PMC | 2 | 91.0 ± 1.4 | 98.0 ± 1.4 | 0.90 (n=1) |" in page


def test_every_method_of_a_board_has_its_settings():
    assert BOARDS
    for path in BOARDS:
        results = docs_generator().results_by_name(path)
        methods = [name for name, runs in results.items() if runs[0]["reference"] == "False"]
        recipe = OmegaConf.load(docs_generator().compare_recipe(path)).comparison
        assert set(methods) <= recipe.methods.keys()


def test_readme_s_figures_are_the_boards():
    generator = docs_generator()
    tiny = generator.results_by_name(ROOT / "docs/leaderboard/tiny.csv")
    smollm2 = [generator.results_by_name(path) for path in BOARDS if path.name.startswith("smollm2-cpu.")]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| method | tiny: unlearn quality |")[2].partition("\n\n")[0]
    rows = [[text.strip(" *") for text in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {name for name, *_ in rows} >= {"PMC", "PMC-relabeling", "PMC-contrast"}
    for name, *cells in rows:
        # Of several boards the one with the most seeds.
        boards = [tiny] + sorted((board for board in smollm2 if name in board), key=lambda board: -len(board[name]))[:1]
        scores = [
            cell(score, [float(run[score]) for run in board[name]], 1)
            for board in boards
            for score in ("unlearn_quality", "utility")
        ]
        assert cells[: len(scores)] == scores, name
