"""What a metric group is: scores that share their cost, switched on and off together, stated in one file of metrics/."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evaluation.context import EvaluationContext
from evaluation.scores import Scores


@dataclass(frozen=True)
class ScoreDescription:
    """One score, or several alike, for a reader; the documentation is generated from it.

    Attributes:
        pattern: name of the score; `*` stands for what varies.
        better: the better direction, or the ideal value.
        meaning: what is computed.
        not_shown: what a good value does not show.
    """

    pattern: str
    better: str
    meaning: str
    not_shown: str


@dataclass(frozen=True)
class MetricGroup:
    """A metric group.

    Attributes:
        name: as in `metrics=[...]`; its scores begin with it (those of `headline` do not).
        measure: adds the scores of the model under evaluation.
        scores: descriptions of the scores.
        roles: roles of the splits that are read (keys of `data.splits`).
        models: models that the evaluated one is compared to, of `retain_model` and `base_model`.
        settings: class of the configuration section that has the group's name.
        check: raises UserError for settings that cannot work, before anything is loaded.
        optional: needs packages that are not always installed, so that `metrics=full` leaves it out.
    """

    name: str
    measure: Callable[[EvaluationContext, Scores], None]
    scores: tuple[ScoreDescription, ...]
    roles: tuple[str, ...]
    models: tuple[str, ...] = ()
    settings: type | None = None
    check: Callable[[Any], None] | None = None
    optional: bool = False
