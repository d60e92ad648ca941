"""Stops samples that can no longer be picked while they are still being drawn; what is picked stays the same.

PMC keeps the lowest score s of a question's samples and of its stored pick. Where a longer text never scores lower than
its beginning (ROUGE-L recall: words that follow one another in the beginning do so in the whole), s of the beginning is
a lower bound, and a sample whose bound has lost already need not be finished.
"""

import math
from collections.abc import Callable, Sequence

from generation.sampler import PartialSample

EVERY = 8  # tokens between two checks; more often costs more than it saves


class EarlyStopping:
    """A stopping_criteria of `generation.sampler.generate` for one optimizer step.

    Args:
        stored: for each question the score (or what it costs with its penalty) of its stored pick; infinity for none.
        score: (question, a complete sample's ids) -> its score; infinity where that cannot be said yet.
        bound: (question, the ids of a sample's beginning) -> a lower bound of its score.
    Attributes:
        bounds: of each sample that was stopped, by question and sample.
    """

    every = EVERY

    def __init__(
        self,
        stored: Sequence[float],
        score: Callable[[int, list[int]], float],
        bound: Callable[[int, list[int]], float],
    ):
        self.stored, self.score, self.bound = stored, score, bound
        self.best = [(math.inf, 0)] * len(stored)  # lowest score of the finished samples, and the first that has it
        self.bounds: dict[tuple[int, int], float] = {}

    def check(self, finished: Sequence[PartialSample], running: Sequence[PartialSample]) -> list[bool]:
        for question, sample, ids in finished:
            self.best[question] = min(self.best[question], (self.score(question, ids), sample))
        return [self.has_lost(draft) for draft in running]

    def has_lost(self, draft: PartialSample) -> bool:
        """Whether the stored pick or a finished sample wins over all that this one can become.

        As in `unlearning.pmc.select`: the stored pick loses a tie, and of equal samples the first wins.
        """
        question, sample, ids = draft
        bound = self.bound(question, ids)
        lost = bound > self.stored[question] or (bound, sample) > self.best[question]
        if lost:
            self.bounds[question, sample] = bound
        return lost


def complete_words(text: str) -> str:
    """The text without its last word, which may go on."""
    return text[: max((place for place, character in enumerate(text) if character.isspace()), default=0)]
