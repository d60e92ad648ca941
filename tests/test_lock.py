"""Two commands do not work in one folder."""

import json
import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from common.errors import UserError
from common.files import ROOT
from common.lock import LOCK, locked
from common.runs import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from common.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder run/."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_command_is_refused_and_told_who_works_there(holder, tmp_path):
    message = rf"run: another command is using this folder \(host .+, pid {holder.pid}, since .+, command .+\)"
    for _ in range(2):
        with pytest.raises(UserError, match=message), locked(tmp_path / "run"):
            pass


def test_a_killed_command_holds_no_lock(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("mine")
    with locked(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_run_can_begin_in_a_folder_with_only_a_lock(tmp_path):
    run = RunFolder(tmp_path / "run", {"seed": 0})
    with run.locked():
        assert (run.open() / "run.json").exists()


def test_only_the_first_process_takes_the_lock(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(self):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "_acquire", unsupported)
    with locked(tmp_path / "run"):
        pass
    assert "this file system has no locks (Operation not supported)" in caplog.text


def test_a_folder_that_cannot_be_written_to_can_still_be_read(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "_acquire", denied)
    with locked(tmp_path / "run"):
        pass
