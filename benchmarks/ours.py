"""The project's own trainer, with samples that stop where the plain way's stop.

Neither pruning nor the skipping of finished questions counts: random answers would finish every question at once.
"""

import time
from unittest.mock import patch

from benchmarks.plain import sample_lengths
from common.data import Row
from common.sampling import generate
from common.training import answer_tokens
from unlearning import pmc


class TimedPMC(pmc.PMC):
    """PMC that notes where an optimizer step's time goes, as `PlainPMC` does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.end_token_ids = []
        self.initial_responses = {row.index: row.answer for row in self.data.forget}
        self.reset()

    def reset(self) -> None:
        self.memory.clear()  # every question is sampled in every step
        self.spent = {"sampling": 0.0, "scoring": 0.0}
        self.sampled_tokens = self.trained_tokens = self.label_tokens = 0

    def sample(self, rows: list[Row], pruner: None) -> list[list[list[int]]]:
        limits = [sample_lengths(self.state.global_step, row.index, self.settings.num_samples) for row in rows]
        started = time.perf_counter()
        with patch.object(pmc, "generate", lambda *args, **options: generate(*args, limits=limits, **options)):
            answers = super().sample(rows, pruner)
        self.spent["sampling"] += time.perf_counter() - started
        self.sampled_tokens += sum(len(answer) for some in answers for answer in some)
        return answers

    def score(self, row: Row, answers: list[list[int]]) -> list[float]:
        started = time.perf_counter()
        scores = super().score(row, answers)
        self.spent["scoring"] += time.perf_counter() - started
        return scores

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.trained_tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.label_tokens += sum(answer_tokens(batch["labels"]) for batch in batches)
        return batches, count
