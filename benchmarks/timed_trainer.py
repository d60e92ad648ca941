"""The project's own trainer, timed. With random weights its samples stop where the baseline's stop."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

from benchmarks.baseline import sample_lengths
from common.collate import count_answer_tokens
from common.data import Row
from generation.sampler import PartialSample, generate
from unlearning import pmc, sampling


class StopAtLengths:
    """Stopping criteria of `generate`: every sample stops at its own length.

    On CUDA, where samples are checked every few tokens, they are drawn a little longer and cut.

    Args:
        lengths: lengths of each prompt's samples, in tokens.
    """

    every = 1

    def __init__(self, lengths: Sequence[Sequence[int]]):
        self.lengths = lengths

    def check(self, finished: Sequence[PartialSample], running: Sequence[PartialSample]) -> list[bool]:
        return [len(ids) >= self.lengths[prompt][sample] for prompt, sample, ids in running]


def generate_lengths(lengths: Sequence[Sequence[int]], *args, **options) -> list[list[list[int]]]:
    """The answers of `generate`, each of the given length in tokens; other arguments are passed on."""
    answers = generate(*args, **options | {"stopping_criteria": StopAtLengths(lengths)})
    return [
        [ids[:length] for ids, length in zip(samples, some, strict=True)]
        for samples, some in zip(answers, lengths, strict=True)
    ]


class TimedPMC(pmc.PMC):
    """PMC that records where an optimizer step's time goes, as `BaselinePMC` does."""

    forced_lengths = True  # samples stop where `sample_lengths` says

    def __init__(self, *args):
        super().__init__(*args)
        self.scorer.rewards = self.timed(self.scorer.rewards)
        self.scorer.upper_bound = self.timed(self.scorer.upper_bound)
        self.reset()

    def reset(self) -> None:
        self.spent = {"sampling": 0.0, "scoring": 0.0}
        self.sampled_tokens = self.trained_tokens = self.label_tokens = 0
        if self.forced_lengths:
            self.best.clear()  # random answers would solve every question at once

    def sample(self, rows: list[Row], *args) -> list[list[list[int]]]:
        draw = generate
        if self.forced_lengths:
            n = self.settings.num_samples
            draw = partial(generate_lengths, [sample_lengths(self.state.global_step, row.index, n) for row in rows])
            self.eos_token_ids = []
        scored, started = self.spent["scoring"], time.perf_counter()
        with patch.object(sampling, "generate", draw):
            answers = super().sample(rows, *args)
        # Early stopping computes rewards during sampling: their time is not counted twice.
        self.spent["sampling"] += time.perf_counter() - started - (self.spent["scoring"] - scored)
        self.sampled_tokens += sum(len(answer) for some in answers for answer in some)
        return answers

    def timed(self, score: Callable) -> Callable:
        """The function, with its time added to the scoring time."""

        def timed_score(*args):
            started = time.perf_counter()
            result = score(*args)
            self.spent["scoring"] += time.perf_counter() - started
            return result

        return timed_score

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.trained_tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.label_tokens += sum(count_answer_tokens(batch["labels"]) for batch in batches)
        return batches, count
