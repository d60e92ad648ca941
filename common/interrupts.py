"""Ctrl-C ends the process without a traceback. Every main imports this first, as its other imports take seconds."""

import sys


def _quiet(kind, error, traceback):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _quiet
