"""Refusals (answers such as "I don't know"), for the methods that train on them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from pydantic import field_validator

from common.config import section
from common.data import Row
from common.files import resolve_path
from common.prompts import Example
from unlearning.trainer import MethodSettings, UnlearningTrainer

REFUSAL_KEY = 3  # of `UnlearningTrainer.draw_index`


@section
class RefusalSettings(MethodSettings):
    refusals: str = "data/refusals.txt"
    """File with one refusal per line; one is drawn for each question and step."""

    @field_validator("refusals")
    @classmethod
    def has_refusals(cls, path: str) -> str:
        if Path(resolve_path(path)).is_char_device():  # would never end
            raise ValueError("is a device; expected a text file with one refusal per line")
        try:
            refusals = read_refusals(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot be read ({error}); expected a text file with one refusal per line") from error
        if not refusals:
            raise ValueError("the file is empty; expected one refusal per line")
        return path


@cache
def read_refusals(path: str) -> list[str]:
    """The lines of a file, without empty ones. A relative path is looked up in the working folder, then in the repository.

    Raises:
        OSError, UnicodeDecodeError: when the file cannot be read.
    """
    lines = Path(resolve_path(path)).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def refusal_example(trainer: UnlearningTrainer, row: Row) -> Example:
    """The row's question, answered by a refusal that is drawn for this optimizer step."""
    refusals = read_refusals(trainer.settings.refusals)
    return trainer.example(replace(row, answer=refusals[trainer.draw_index(REFUSAL_KEY, row, len(refusals))]))
