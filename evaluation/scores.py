"""The scores of one model, each with what a reader needs to judge it, and the values of single rows."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from common.results import GENERATIONS, ROWS, SAMPLES


class Missing(Exception):
    """Something that a score needs was not given; the message names it, and the key that gives it."""


@dataclass
class Score:
    """One score.

    Attributes:
        value: None where it could not be computed; `note` has the reason.
        higher_is_better: None where neither direction is better.
        count: rows that the value is taken over.
        ideal: the value of a model that never saw the forget set, where that is a number.
        left_out: rows without a value (an answer without a token, an empty answer).
        note: why the value is None, or what a reader must know of it.
        histogram: {"edges", "counts"}.
    """

    value: float | None
    higher_is_better: bool | None
    count: int | None = None
    ideal: float | None = None
    left_out: int = 0
    note: str | None = None
    histogram: dict[str, list[float]] | None = None


@dataclass
class Scores:
    """Everything that was measured on one model.

    Attributes:
        by_name: name -> score.
        rows: name -> {"split", "values"}: the value of each row of the split, in its order. Not every name is a score's: an
            AUC is computed from the rows of two splits.
        generations: one row per greedy answer.
        samples: one row per question with its sampled answers.
        seconds: part of the evaluation -> its time; `evaluation` is the total.
    """

    by_name: dict[str, Score] = field(default_factory=dict)
    rows: dict[str, dict] = field(default_factory=dict)
    generations: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Score:
        return self.by_name[name]

    @property
    def values(self) -> dict[str, float | None]:
        return {name: score.value for name, score in self.by_name.items()}

    def add(self, name: str, value: float | None, higher_is_better: bool | None, **details: Any) -> None:
        """Record a score; `details` are the other fields of `Score`."""
        self.by_name[name] = Score(value, higher_is_better, **details)

    def mean(self, name: str, split: str, values: Sequence[float | None], higher_is_better: bool | None) -> None:
        """Record the mean over a split's rows, and the values; rows without a value (None) are left out and counted.

        Args:
            values: one for each row of the split, in its order.
        """
        kept = [value for value in values if value is not None]
        self.rows[name] = {"split": split, "values": list(values)}
        note = None if kept else f"no row of {split} has a value"
        left_out = len(values) - len(kept)
        mean = fmean(kept) if kept else None
        self.add(name, mean, higher_is_better, count=len(kept), left_out=left_out, note=note)

    @contextlib.contextmanager
    def null_if_missing(self, higher_is_better: dict[str, bool | None]) -> Iterator[None]:
        """For the code that computes these scores: if it raises Missing, those not yet recorded are null, with the reason."""
        try:
            yield
        except Missing as missing:
            for name, better in higher_is_better.items():
                if name not in self.by_name:
                    self.add(name, None, better, note=str(missing))

    def as_result(self) -> dict[str, dict]:
        """The part of result.json that was measured: one dictionary per field, with the scores that have it."""

        def column(key: str) -> dict[str, Any]:
            columns = {name: getattr(score, key) for name, score in self.by_name.items()}
            return {name: value for name, value in columns.items() if value is not None}

        return {
            "scores": self.values,
            "higher_is_better": {name: score.higher_is_better for name, score in self.by_name.items()},
            "ideal": column("ideal"),
            "counts": column("count"),
            "left_out": {name: score.left_out for name, score in self.by_name.items() if score.left_out},
            "notes": column("note"),
            "histograms": column("histogram"),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def row_files(self) -> dict[str, list[dict]]:
        """The files beside result.json: name -> rows; only the greedy answers are written even where there are none."""
        rows = [{"name": name, **values} for name, values in self.rows.items()]
        optional = {SAMPLES: self.samples, ROWS: rows}
        return {GENERATIONS: self.generations} | {name: rows for name, rows in optional.items() if rows}
