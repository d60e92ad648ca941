"""A lock on a run's folder, so that only one command at a time works there."""

import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import is_first_process

log = logging.getLogger(__name__)
LOCK = ".lock"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
NOT_SUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other command works in the folder. Only the first process takes the lock.

    The operating system releases it when the process ends, also after a crash. A folder that cannot be written to is not
    locked: its result can still be read. A file system without locks gives a warning.

    Raises:
        UserError: if another command works in the folder.
    """
    with contextlib.ExitStack() as stack:
        if is_first_process():
            _take(folder, stack)
        yield


def _take(folder: Path, stack: contextlib.ExitStack) -> None:
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock)
    except Timeout as error:
        raise UserError(
            f"output_dir={folder}: another command is using this folder{_described(holder_of(folder))}. Wait until it ends, "
            "stop it, or name another folder"
        ) from error
    except OSError as error:
        if error.errno not in (*NOT_WRITABLE, *NOT_SUPPORTED):
            raise
        if error.errno in NOT_SUPPORTED:
            log.warning(
                "%s: this file system has no locks (%s); make sure that no other command uses this folder",
                folder,
                error.strerror,
            )
        return
    stack.callback(_clear, folder)  # before the release: FileLock does not take a lock whose file was removed
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    (folder / LOCK).write_text(json.dumps({**holder, "command": shlex.join(sys.argv)}), encoding="utf-8")


def _clear(folder: Path) -> None:
    """Remove the lock's file, and the folder if nothing else is in it."""
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def holder_of(folder: Path) -> dict[str, Any]:
    """Who works in a folder: `host`, `pid`, `since` and `command`; empty if nobody does or its lock does not say."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / LOCK).read_text(encoding="utf-8"))
    return {}


def _described(holder: dict[str, Any]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in holder.items())})" if holder else ""
