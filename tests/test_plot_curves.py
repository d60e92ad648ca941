"""Curves of several runs side by side."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json_lines
from scripts.plot_curves import main, named_folders, plot_epochs, read_curve, worst_and_last


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
    assert worst_and_last(curves).splitlines()[2:] == [
        "| a | 70.0 | 2 | 80.0 | 42.0 |",
        "| b | 60.0 | 1 | 60.0 | 40.0 |",
    ]
    plot_epochs(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluated_epochs_is_named(tmp_path):
    with pytest.raises(UserError, match="no history.jsonl"):
        read_curve(tmp_path)
    write_json_lines(tmp_path / "history.jsonl", [{"epoch": 1}])
    with pytest.raises(UserError, match="evaluation.every_epochs=1"):
        read_curve(tmp_path)


def test_runs_are_named_once_and_the_picture_first(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="A: expected NAME=FOLDER"):
        named_folders(["A"])
    with pytest.raises(UserError, match="x=B: the name x is given twice"):
        named_folders(["x=A", "x=B"])
    assert named_folders(["method.gamma=1=A"]) == {"method.gamma=1": Path("A")}
    run = write_history(tmp_path / "a", [90.0])
    monkeypatch.setattr("sys.argv", ["curves", f"x={run}", f"y={run}"])
    with pytest.raises(SystemExit, match="expected the name of the picture"):
        main()
    monkeypatch.setattr("sys.argv", ["curves", str(tmp_path / "new/c.png"), f"method.gamma=1={run}"])
    main()
    assert "| method.gamma=1 | 90.0 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "new/c.png").exists()
