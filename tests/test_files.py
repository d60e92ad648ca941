"""Where a path leads, and files that appear whole."""

import errno
import os
from pathlib import Path

import pytest

from common.files import (
    ROOT,
    looks_local,
    read_json,
    read_json_lines,
    resolve_path,
    write_json,
    write_json_lines,
    write_text,
)


def test_a_path_is_looked_for_in_the_working_folder_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("data/tiny") == str(ROOT / "data" / "tiny")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    assert resolve_path("data/tiny") == str(tmp_path / "data" / "tiny")


def test_a_hub_id_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("microsoft/phi-1_5") == "microsoft/phi-1_5"


def test_a_path_in_the_home_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "tofu").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/tofu") == str(tmp_path / "tofu")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        *[("./x", True), ("../x/y", True), ("/a/b", True), ("~/x", True), ("models/x", True), ("a/b/c", True)],
        *[("x", True), ("locuslab/TOFU", False), ("meta-llama/Llama-3.2-3B-Instruct", False)],
    ],
)
def test_a_folder_is_told_from_a_hub_id(path, local):
    assert looks_local(path) is local


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_written_and_replaced(tmp_path):
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "né\n")
    assert (tmp_path / "a").read_bytes() == "né\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("where", ["fsync", "write", "replace"])
def test_the_old_file_stays_whole_when_writing_fails(tmp_path, monkeypatch, where):
    file = tmp_path / "a"
    write_text(file, "old")
    text = "new"
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif where == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        text = "new \ud800"  # cannot be encoded
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_text(file, text)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_json_is_read_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "é": "“x”\n"}
    write_json(tmp_path / "a", value)
    assert read_json(tmp_path / "a") == value


@pytest.mark.parametrize("text", ["plain", "two\nlines", "\u2028 and \u2029", "next\x85line", "\x0b\x0c\x1c", "日本"])
def test_json_lines_are_read_back(tmp_path, text):
    """Whatever a model generates: only a newline separates rows."""
    rows = [{"answer": text}, {"answer": "second"}]
    write_json_lines(tmp_path / "a", rows)
    assert read_json_lines(tmp_path / "a") == rows


def test_one_json_line_a_row(tmp_path):
    write_json_lines(tmp_path / "a", [{"x": "1\n2"}, {"x": 2}])
    assert (tmp_path / "a").read_text() == '{"x": "1\\n2"}\n{"x": 2}\n'
