"""Stops drawing samples that can no longer be selected; the selection stays the same.

PMC selects the sample with the highest reward among a question's samples and its best so far. Some
rewards never rise as a sample grows: with 1 - ROUGE-L recall, words that match the reference in order still match when more
words follow. Then the reward of a sample's beginning is an upper bound, and a sample whose bound is too low is stopped.
"""

import math
from collections.abc import Sequence

from generation.sampler import PartialSample
from unlearning.rewards import Scorer


class EarlyStopping:
    """The `generation.sampler.StoppingCriteria` of one optimizer step; computes the reward of every complete sample once.

    Args:
        best: net reward of each question's best sample so far; -infinity if there is none.
        references: initial response to each question.
        scorer: computes rewards, and their upper bounds.
        among_samples: whether a complete sample can rule out another one; false where penalties are subtracted later.
    Attributes:
        rewards: by question and sample: the reward, or its upper bound where the sample was stopped.
        stopped: the samples that were stopped, by question and sample.
    """

    every = 8  # tokens between two checks; more frequent checks take more time than they save

    def __init__(self, best: Sequence[float], references: Sequence[str], scorer: Scorer, among_samples: bool = True):
        self.best, self.references, self.scorer, self.among_samples = best, references, scorer, among_samples
        self.leader = [(-math.inf, 0)] * len(best)  # highest reward of a complete sample, and minus its index
        self.rewards: dict[tuple[int, int], float] = {}
        self.stopped: set[tuple[int, int]] = set()

    def check(self, finished: Sequence[PartialSample], running: Sequence[PartialSample]) -> list[bool]:
        """Score the finished samples; returns for each running sample whether to stop it."""
        for question, sample, ids in finished:
            (reward,) = self.scorer.rewards(self.references[question], [ids])
            self.rewards[question, sample] = reward
            if self.among_samples:
                self.leader[question] = max(self.leader[question], (reward, -sample))
        return [self.has_lost(partial) for partial in running]

    def has_lost(self, partial: PartialSample) -> bool:
        """Whether the best so far or a complete sample will be selected instead of this one, however it continues.

        Ties are decided as in `unlearning.selection.select`: a new sample replaces an equal best so far, and of equal
        samples the first is selected.
        """
        question, sample, ids = partial
        bound = self.scorer.upper_bound(self.references[question], ids)
        lost = bound < self.best[question] or (bound, -sample) < self.leader[question]
        if lost:
            self.rewards[question, sample] = bound
            self.stopped.add((question, sample))
        return lost

    def rewards_of(self, samples: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """The rewards of all samples of each question, in their order."""
        return [
            [self.rewards[question, sample] for sample in range(len(answers))]
            for question, answers in enumerate(samples)
        ]
