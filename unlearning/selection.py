"""Which sample of a question is selected: the one with the highest reward, less penalties."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A sample that a question may be trained on.

    Attributes:
        reward: in [0, 1]; 1: no word of the initial response is left.
        answer: token ids.
        penalty: fluency penalty, 0 or more (`unlearning.pmc_options.FluencyPenalty`).
    """

    reward: float
    answer: list[int]
    penalty: float = 0.0

    @property
    def net_reward(self) -> float:
        return self.reward - self.penalty


def select(best: Candidate | None, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the highest net reward, the first of equals; `best` if its net reward is higher."""
    chosen = max(candidates, key=lambda candidate: candidate.net_reward, default=best)
    return chosen if best is None or chosen.net_reward >= best.net_reward else best
