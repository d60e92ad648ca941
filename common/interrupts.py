"""Ctrl-C and SIGTERM end the process without a traceback. Every main imports this first, as its other imports take seconds.

SIGTERM exits as an error does, so that a sweep's table is still written. Training replaces both by a checkpoint.
"""

import signal
import sys


def _quiet(kind, error, traceback):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _quiet
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
