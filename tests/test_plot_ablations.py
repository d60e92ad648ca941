"""The figure of PMC's settings: each value beside the recipe's own, means over seeds."""

import csv

import pytest

from common.errors import UserError
from common.files import ROOT
from scripts.plot_ablations import changed_setting, plot_settings, read_points


def written(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "seed", "unlearn_quality", "utility"])
        writer.writerows(rows)
    return path


def test_each_setting_has_its_values_and_the_recipe_s_own(tmp_path):
    rows = [["PMC", 0, 90.0, 97.0], ["PMC", 1, 92.0, 99.0], ["2 samples", 0, 80.0, 99.0], ["lambda 8", 0, "", ""]]
    points = read_points(written(tmp_path / "results.csv", rows))
    assert list(points) == ["method.num_samples"], "a setting without a run is left out"
    assert {
        value: [run["unlearn_quality"] for run in runs] for value, runs in points["method.num_samples"].items()
    } == {
        2.0: [80.0],
        10.0: [90.0, 92.0],  # the recipe's own number of samples
    }
    plot_settings(points, tmp_path / "settings.png")
    assert (tmp_path / "settings.png").read_bytes().startswith(b"\x89PNG")


def test_results_without_the_recipe_s_own_settings_are_refused(tmp_path):
    message = "no run of PMC, or none with another setting; run scripts/compare_methods.py -cn=compare/ablations"
    for rows in ([["2 samples", 0, 80.0, 99.0]], [["PMC", 0, 90.0, 97.0]], [["PMC", 0, 90.0, ""]]):
        with pytest.raises(UserError, match=message):
            read_points(written(tmp_path / "results.csv", rows))
    with pytest.raises(UserError, match=message):
        read_points(ROOT / "README.md")


def test_the_setting_that_a_method_changes():
    assert changed_setting("-cn=PMC-unlearn-tiny method.num_samples=5") == ("method.num_samples", 5.0)
