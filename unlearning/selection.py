"""Which sample of a question is selected: the one with the highest reward, less penalties, or one drawn by its reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidate:
    """A sample that a question may be trained on.

    Attributes:
        reward: in [0, 1]; 1: nothing in common with the initial response.
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


def draw(candidates: Sequence[Candidate], temperature: float, rng: np.random.Generator) -> Candidate:
    """One of a question's new samples, drawn with probability softmax(net reward / temperature).

    This is the Bradley-Terry model of a choice between several samples, by which the theory of PMC (arXiv 2507.04219)
    describes the selection. `select` then compares the drawn sample with the best so far by their net rewards, so the
    temperature has an effect on which sample of a step competes, and the best so far never becomes worse.

    Args:
        candidates: at least one.
        temperature: above 0. The lower, the likelier the sample with the highest net reward.
        rng: makes one draw.
    """
    highest = max(candidate.net_reward for candidate in candidates)
    weights = np.array([math.exp((candidate.net_reward - highest) / temperature) for candidate in candidates])
    return candidates[int(rng.choice(len(candidates), p=weights / weights.sum()))]
