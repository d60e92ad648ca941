"""The scores of one model, with the details needed to interpret them, and the values of single rows."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from common.results import GENERATIONS, ROWS, SAMPLES


class Missing(Exception):
    """An input of a score is missing. The message names the input and its configuration key."""


@dataclass
class Score:
    """One score.

    Attributes:
        value: None if it could not be computed; `note` has the reason.
        higher_is_better: None if neither direction is better.
        count: number of rows that the value is computed from.
        ideal: the value of a model that was never trained on the forget set, if that is a fixed number.
        left_out: number of rows without a value, such as empty answers.
        note: why the value is None, or how to interpret it.
        histogram: dictionary with the keys "edges" and "counts".
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
    """All measurements of one model.

    Attributes:
        by_name: name -> score.
        rows: name -> {"split": its role, "values": one per row of the split, in its order}. Some names are not scores: an
            AUC is computed from the rows of two splits.
        generations: one row per greedy answer.
        samples: one row per question with its sampled answers.
        seconds: part of the evaluation -> its duration in seconds; `evaluation` is the total.
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
        """Record the values of a split's rows, and their mean. Rows without a value (None) are left out and counted.

        Args:
            values: one for each row of the split, in its order.
        """
        kept = [value for value in values if value is not None]
        self.rows[name] = {"split": split, "values": list(values)}
        note = None if kept else f"no row of {split} has a value"
        mean = fmean(kept) if kept else None
        self.add(name, mean, higher_is_better, count=len(kept), left_out=len(values) - len(kept), note=note)

    @contextlib.contextmanager
    def null_if_missing(self, higher_is_better: dict[str, bool | None]) -> Iterator[None]:
        """If the block raises Missing, record those of these scores that it has not recorded as null, with the reason."""
        try:
            yield
        except Missing as missing:
            for name, better in higher_is_better.items():
                if name not in self.by_name:
                    self.add(name, None, better, note=str(missing))

    def as_result(self) -> dict[str, dict]:
        """The measured part of result.json: a dictionary for each field, from the names of the scores that have it."""

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
        """Name -> rows of the files next to result.json. Empty files are left out, except that of the greedy answers."""
        rows = [{"name": name, **values} for name, values in self.rows.items()]
        optional = {SAMPLES: self.samples, ROWS: rows}
        return {GENERATIONS: self.generations} | {name: rows for name, rows in optional.items() if rows}
