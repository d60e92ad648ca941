"""Curves of several runs side by side."""

import pytest

from common.runtime import UserError, write_json_lines
from evaluation.curves import plot, read_curve, table


def write_history(folder, utilities):
    folder.mkdir()
    records = [{"epoch": i + 1, "utility": u, "unlearn_quality": 40.0 + i} for i, u in enumerate(utilities)]
    records.insert(1, {"epoch": 1, "retain_loss": 0.5})  # an epoch that was not evaluated
    write_json_lines(folder / "history.jsonl", records)
    return folder


def test_the_table_has_the_worst_epoch_and_the_last(tmp_path):
    curves = {
        "a": read_curve(write_history(tmp_path / "a", [90.0, 70.0, 80.0])),
        "b": read_curve(write_history(tmp_path / "b", [60.0])),
    }
    assert table(curves).splitlines()[2:] == ["| a | 70.0 | 2 | 80.0 | 42.0 |", "| b | 60.0 | 1 | 60.0 | 40.0 |"]
    plot(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluated_epochs_is_named(tmp_path):
    with pytest.raises(UserError, match="no history.jsonl"):
        read_curve(tmp_path)
    write_json_lines(tmp_path / "history.jsonl", [{"epoch": 1}])
    with pytest.raises(UserError, match="evaluation.every_epochs=1"):
        read_curve(tmp_path)
