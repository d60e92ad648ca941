"""Ctrl-C and SIGTERM end the process without a traceback. Every main imports this first, as its other imports take seconds.

SIGTERM exits as an error does, so that a sweep's table is still written. Training replaces both by a checkpoint.
"""

import os
import signal
import sys
import threading

received = 0  # number of the signal that stopped this process's job; 0: none


def _quiet(kind, error, traceback):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def _again(unraisable):
    """A destructor swallowed Ctrl-C: interrupt the process once more, when it has ended."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and not sys.is_finalizing():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()  # unlike interrupt_main, it ends a sleep
    else:
        sys.__unraisablehook__(unraisable)


def left_to_sweep(number, frame):
    """The handler of Ctrl-C in a job whose sweep runs in another process, which stops the job by SIGTERM."""


sys.excepthook = _quiet
sys.unraisablehook = _again
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
