"""What a result records."""

import json
import platform
import subprocess
from importlib.metadata import version

import pytest

from common import results
from common.results import git_commit, package_versions, write_result
from evaluation.scores import Scores
from tests.helpers import TOKEN


def test_versions_are_recorded():
    found = package_versions()
    assert found["python"] == platform.python_version()
    assert {name: found[name] for name in ("torch", "transformers")} == {
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    assert set(found) <= {"python", *results.RECORDED_PACKAGES}


def test_a_copy_that_is_killed_leaves_no_result(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    write_result(tmp_path / "run", {}, {results.GENERATIONS: []}, {"seed": 0})
    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        results.copy_result(tmp_path / "run", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(results, "RECORDED_PACKAGES", ("torch", "no-such-package"))
    assert set(package_versions()) == {"python", "torch"}


def test_no_token_is_in_a_result(tmp_path, monkeypatch):
    for name in ("HUGGINGFACE_LOGIN_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    scores = Scores(generations=[{"answer": "a"}], seconds={"evaluation": 1.0})
    scores.add("utility", 50.0, True)
    write_result(tmp_path, scores.as_result(), scores.row_files(), {"seed": 0})
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"scores", "versions", "git_commit", "device", "peak_memory_bytes", "config", "id"} <= set(result)
    assert not [path for path in tmp_path.iterdir() if TOKEN in path.read_text()]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit, in the place of this one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "commit.gpgsign=false", "commit", "-m", "one")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path, git("rev-parse", "HEAD")


def test_the_commit_of_a_clean_checkout(repository):
    folder, commit = repository
    (folder / "untracked").write_text("x")
    assert len(commit) == 40
    assert git_commit() == commit


def test_the_commit_of_a_changed_checkout_is_marked(repository):
    folder, commit = repository
    (folder / "file").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_there_is_no_commit_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert git_commit() is None


def test_there_is_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
