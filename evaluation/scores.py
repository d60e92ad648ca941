"""What is found out about one model: scores, with what a reader needs to judge them, and the values of single rows."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean


class Missing(Exception):
    """Something that a score needs was not given; the text says what and how to give it."""


@dataclass
class Scores:
    """Scores by name, and what belongs to them.

    Attributes:
        values: name -> value; None where it could not be computed, with the reason in `notes`.
        higher_is_better: name -> True, False, or None where neither is.
        ideal: name -> the value that a model that never saw the forget set would have, where that is a number.
        counts: name -> rows that the value is taken over.
        left_out: name -> rows without a value (an answer without a token, an empty answer), where there are any.
        notes: name -> why it is None, or what a reader must know of it.
        histograms: name -> {"edges", "counts"}.
        rows: name -> {"split", "values"}: the value of each row of the split, in its order.
        generations: a row a greedy answer.
        samples: a row a question with its sampled answers.
    """

    values: dict[str, float | None] = field(default_factory=dict)
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)
    ideal: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rows: dict[str, dict] = field(default_factory=dict)
    generations: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)

    def add(
        self,
        name: str,
        value: float | None,
        higher_is_better: bool | None,
        count: int | None = None,
        ideal: float | None = None,
        note: str | None = None,
    ) -> None:
        """Note a score."""
        self.values[name] = value
        self.higher_is_better[name] = higher_is_better
        for place, given in ((self.counts, count), (self.ideal, ideal), (self.notes, note)):
            if given is not None:
                place[name] = given

    def mean(self, name: str, split: str, values: Sequence[float | None], higher_is_better: bool | None) -> None:
        """Note the mean over a split's rows, and the values; rows without one (None) are counted and left out.

        Args:
            values: one for each row of the split, in its order.
        """
        kept = [value for value in values if value is not None]
        self.rows[name] = {"split": split, "values": list(values)}
        note = None if kept else f"no row of {split} has a value"
        self.add(name, fmean(kept) if kept else None, higher_is_better, len(kept), note=note)
        if len(kept) < len(values):
            self.left_out[name] = len(values) - len(kept)

    @contextlib.contextmanager
    def null_if_missing(self, higher_is_better: dict[str, bool | None]) -> Iterator[None]:
        """Around what computes these scores: where something that they need was not given, they are null and say why."""
        try:
            yield
        except Missing as missing:
            for name, better in higher_is_better.items():
                if name not in self.values:
                    self.add(name, None, better, note=str(missing))


@dataclass
class Evaluation:
    """The scores of one model.

    Attributes:
        scores: with what belongs to them.
        seconds: where the time went; `evaluation` is all of it.
    """

    scores: Scores
    seconds: dict[str, float]
