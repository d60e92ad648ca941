"""Ctrl-C and SIGTERM in a sweep whose jobs run in other processes of this machine (docs/launchers.md).

The sweep's process sends SIGTERM to the jobs, waits until each has saved a checkpoint, and ends with the sweep's table. A job
leaves Ctrl-C, which a terminal sends to all processes, to it.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from common import interrupts
from common.errors import Interrupted
from common.lock import holder_of

log = logging.getLogger(__name__)
CHECK_INTERVAL = 0.2  # seconds


def stop_jobs_on_signals(folders: Callable[[], Iterable[Path]]) -> None:
    """In the sweep's process: on the first SIGTERM or Ctrl-C stop the jobs, then end. A second one ends at once.

    Args:
        folders: a function that returns the folders of the sweep's runs.
    """

    def stop(number: int, frame: Any) -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        log.warning("signal %d: the jobs save a checkpoint and stop (send it again to stop at once)", number)
        stop_jobs(folders())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}


def stop_jobs(folders: Iterable[Path]) -> None:
    """Send SIGTERM to each process of this sweep that works in one of the folders, and wait until none does."""
    folders, sent = list(folders), set()
    while working := {holder_of(folder).get("pid") for folder in folders} & _processes_of_jobs().keys():
        for pid in working - sent:
            with contextlib.suppress(ProcessLookupError):  # has just ended
                os.kill(pid, signal.SIGTERM)
        sent |= working
        time.sleep(CHECK_INTERVAL)
    for process in _processes_of_jobs().values():
        # Has not begun to work. Those of submitit would outlive this process.
        with contextlib.suppress(psutil.Error):  # has just ended
            if any("submitit" in word for word in process.cmdline()):
                process.kill()


def _processes_of_jobs() -> dict[int, psutil.Process]:
    """Process id -> process of each one that this process started, directly or not, and that has not ended."""
    return {process.pid: process for process in psutil.Process().children(recursive=True) if not _has_ended(process)}


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def leave_signals_to_sweep() -> None:
    """In a job's process, before the job: SIGTERM ends it, and Ctrl-C is left to the sweep's process.

    Raises:
        Interrupted: if this process was stopped in an earlier job. A launcher may use it for the next one all the same.
    """
    if interrupts.received:
        raise Interrupted(interrupts.received)
    signal.signal(signal.SIGINT, interrupts.left_to_sweep)
    signal.signal(signal.SIGTERM, _end_job)


def _end_job(number: int, frame: Any) -> None:
    interrupts.received = number
    raise Interrupted(number)
