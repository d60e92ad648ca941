"""Errors that the user can fix, and functions for their messages."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Parts of error messages from safetensors and torch.save, whose errors have no errno.
SIGNS_OF_A_FULL_DISK = ("No space left", "inline_container", "PytorchStreamWriter", "file write failed")

# What libraries raise for values that they cannot use.
LIBRARY_ERRORS = (ValueError, TypeError, ImportError, RuntimeError, OverflowError)

MIN_LIKENESS = 0.6  # of a word that is suggested
# Former names of keys.
RENAMED = {"prune": "early_stopping", "side_by_side": "interleaved"}


class UserError(Exception):
    """A problem that the user can fix. The message names the key or file, the value, and what to do."""


@contextlib.contextmanager
def library_errors_as_user_error(key: str) -> Iterator[None]:
    """Turn `LIBRARY_ERRORS` into a UserError that begins with the key."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        raise UserError(f"{key}: {reason(error)}") from error


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Begin the message of a UserError with the key that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


class Interrupted(SystemExit):
    """The run was stopped by SIGTERM or Ctrl-C and wrote a checkpoint. Exits with 128 + the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


class Pruned(Exception):
    """A run of a sweep was ended in training, as its utility is below the sweep's floor.

    Attributes:
        epoch: after which the scores were computed.
        utility: of that epoch, in percent.
    """

    def __init__(self, epoch: int, utility: float, floor: float):
        super().__init__(epoch, utility, floor)  # all arguments: launchers send it from process to process
        self.epoch, self.utility, self.floor = epoch, utility, floor

    def __str__(self) -> str:
        return f"utility {self.utility:.1f} after epoch {self.epoch} is below hydra.sweeper.min_utility={self.floor:g}"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean '<prefix>x'?` with the closest known word x, or an empty string if none is close or x is the word.

    For a key's former name (`RENAMED`), that is its new name. "lamda" is close to "lambda_unlearning", whose part it resembles.
    """
    parent, dot, last = word.rpartition(".")
    meant = f"{parent}{dot}{RENAMED.get(last, last)}"
    likeness = {other: _likeness(meant, other) for other in known}
    closest = max(likeness, key=likeness.get, default=word)
    is_close = closest != word and likeness[closest] >= MIN_LIKENESS
    return f"; did you mean '{prefix}{closest}'?" if is_close else ""


def _likeness(word: str, known: str) -> float:
    """Similarity of two dotted keys, in [0, 1]. Of keys in one section only the last names are compared, also with single
    words of the known name ("lamda" with the "lambda" of "lambda_unlearning")."""
    parent, _, last = word.rpartition(".")
    other_parent, _, other = known.rpartition(".")
    if parent != other_parent:
        return difflib.SequenceMatcher(None, word, known).ratio()
    parts = [part for part in other.split("_") if part != other]
    of_parts = [difflib.SequenceMatcher(None, last, part).ratio() - 0.1 for part in parts]
    return max([difflib.SequenceMatcher(None, last, other).ratio(), *of_parts])


def first_line(error: Exception, limit: int = 300) -> str:
    """First line of the error's message, of at most `limit` characters; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def reason(error: Exception) -> str:
    """Last line of the message of the error's cause, or of the error itself if it has none."""
    cause = error.__cause__ or error
    return (str(cause).strip() or repr(cause)).splitlines()[-1]


@contextlib.contextmanager
def full_disk_as_user_error(folder: str | Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a UserError."""
    try:
        yield
    except Exception as error:
        named = any(sign in str(error) for sign in SIGNS_OF_A_FULL_DISK)
        if not named and getattr(error, "errno", None) not in FULL_DISK:
            raise
        raise UserError(
            f"{folder}: no space left on the device. Nothing was replaced: an earlier result of this run is still complete. "
            "Free some space and run the same command again; save_model=false needs much less."
        ) from error
