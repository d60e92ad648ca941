"""Partial Model Collapse (arXiv 2507.04219): unlearn by training on the model's own answers.

    python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny

1. Initial responses: before training, generate the finetuned model's greedy answer to every forget question.
2. Sample: for each forget question of an optimizer step, draw `num_samples` answers from the current model.
3. Score: the reward of a sample is 1 - its ROUGE-L recall against the initial response.
4. Select: keep for each question the sample with the highest reward so far. A question whose best reward is 1 is solved:
   it is not sampled again. (With `selection_temperature`, the sample of a step that competes is drawn by its reward.)
5. Train: loss = CE(selected samples) + lambda_unlearning * CE(retain answers).

The forget answers of the data set are never read. Options that are off by default are in `unlearning.pmc_options`.
Samples that can no longer be selected are stopped while they are drawn (`unlearning.early_stopping`).
"""

import math
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainingArguments

from common.data import Row
from common.errors import UserError
from common.prompts import Example
from common.results import PICKS
from unlearning import pmc_log
from unlearning.early_stopping import EarlyStopping
from unlearning.pmc_options import FluencyPenalty, InitialResponseLosses, PMCSettings, StalledTemperature
from unlearning.reference_model import ReferenceModel, ShardedReferenceModel
from unlearning.relabeling import relabel
from unlearning.sampling import OwnAnswerTrainer
from unlearning.selection import Candidate, draw, select
from unlearning.token_losses import TokenLosses
from unlearning.trainer import UnlearningData

SELECTION_KEY = 6  # rng key of `UnlearningTrainer.rng`


class PMC(OwnAnswerTrainer):
    """Trains on the model's own answers, selected to be least like the initial responses.

    Attributes:
        relabeled: the initial responses with the labels of the relabeling loss, by row index; empty without that loss.
        best: the best sample so far, by row index.
        picks: rows of picks.jsonl, see `pmc_log.new_picks`.
    """

    Settings = PMCSettings
    logged_terms = ("collapse_loss", "contrast_loss", "relabeling_loss", "initial_nll")  # each where it is computed

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: PMCSettings):
        self.needs_reference = settings.fluency_weight > 0
        super().__init__(model, args, data, settings)
        # A drawn selection needs the reward of every sample, as each has a probability.
        self.stops_early = settings.early_stopping and self.scorer.is_monotone and not settings.selection_temperature
        self.fluency = FluencyPenalty(self, settings.fluency_weight) if settings.fluency_weight else None
        self.temperature = StalledTemperature(settings)
        on_initial = settings.contrast_weight or settings.relabeling_weight
        self.initial_losses = InitialResponseLosses(self, settings) if on_initial else None
        self.relabeled: dict[int, Example] = {}
        self.best: dict[int, Candidate] = {}
        self.picks: list[dict[str, Any]] = []

    def new_reference(self) -> ReferenceModel | ShardedReferenceModel:
        if self.is_fsdp_enabled:
            raise UserError(
                f"FSDP: method.fluency_weight={self.settings.fluency_weight:g} runs the reference model for a different number "
                "of samples in each process, and with sharded weights they would wait for each other; use fluency_weight=0"
            )
        return super().new_reference()

    def before_training(self) -> None:
        super().before_training()
        if self.settings.relabeling_weight:
            rows, text = self.data.forget, self.data.prompts.text
            batch_size = self.args.per_device_train_batch_size
            with self.timing("sampling"), self.sampled_model() as model:
                examples = relabel(model, rows, self.initial_examples(rows), self.data.retain, text, batch_size)
            self.relabeled = {row.index: example for row, example in zip(rows, examples, strict=True)}

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        """Steps 2 to 4: sample, score and select the answers that this optimizer step trains on."""
        with self.timing_of_step():
            active = [row for row in rows if not self.is_solved(row)]
            early_stopping = self.new_early_stopping(active) if self.stops_early else None
            samples = self.sample(active, early_stopping, self.temperature.of_rows(active))
            candidates = self.score(active, samples, early_stopping)
            self.select(active, candidates)
            self.gather_selected(active)
        stopped = len(early_stopping.stopped) if early_stopping else 0
        self.add_to_epoch(**pmc_log.sample_sums([self.best[row.index] for row in rows], candidates, stopped))
        return [self.own_example(row, self.best[row.index].answer) for row in rows]

    def own_example(self, row: Row, answer: list[int]) -> Example:
        """A question with the model's own answer. If that was cut at `max_length`, an EOS token replaces its last token."""
        *beginning, last = answer
        ending = last if last in self.eos_token_ids else self.data.prompts.eos_token_id
        return Example(self.prompt_ids[row.index], [*beginning, ending])

    def initial_examples(self, rows: list[Row]) -> list[Example]:
        """The questions with their initial responses."""
        return [self.own_example(row, self.initial_tokens[row.index]) for row in rows]

    def forget_groups(self, rows: list[Row]) -> list[tuple[Example, ...]]:
        if not self.initial_losses:
            return super().forget_groups(rows)
        relabeled = [self.relabeled[row.index] for row in rows] if self.relabeled else []
        return self.initial_losses.groups(self.forget_examples(rows), self.initial_examples(rows), relabeled)

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        return self.initial_losses.loss(forget) if self.initial_losses else forget.cross_entropy

    def is_solved(self, row: Row) -> bool:
        return row.index in self.best and self.best[row.index].reward == 1

    def score(
        self, rows: list[Row], samples: list[list[list[int]]], early_stopping: EarlyStopping | None
    ) -> list[list[Candidate]]:
        """Step 3: every sample with its reward, or an upper bound of it where the sample was stopped."""
        # With early stopping the samples were scored while they were drawn.
        rewards = early_stopping.rewards_of(samples) if early_stopping else self.rewards(rows, samples)
        return [list(map(Candidate, *of_question)) for of_question in zip(rewards, samples, strict=True)]

    def select(self, rows: list[Row], candidates: list[list[Candidate]]) -> None:
        """Step 4: update the best sample so far of each question."""
        best = [self.best.get(row.index) for row in rows]
        prompts = [self.prompt_ids[row.index] for row in rows]
        drawn = self.settings.selection_temperature > 0
        selectable = self.fluency.penalize(prompts, best, candidates, all_of_them=drawn) if self.fluency else candidates
        for row, best_so_far, sampled, allowed in zip(rows, best, candidates, selectable, strict=True):
            self.best[row.index] = select(best_so_far, [self.draw(row, allowed)] if drawn else allowed)
            self.temperature.update(row, [self.best[row.index], *sampled])

    def draw(self, row: Row, candidates: list[Candidate]) -> Candidate:
        return draw(candidates, self.settings.selection_temperature, self.rng(SELECTION_KEY, row))

    def new_early_stopping(self, rows: list[Row]) -> EarlyStopping:
        best = [self.best[row.index].net_reward if row.index in self.best else -math.inf for row in rows]
        references = [self.initial_responses[row.index] for row in rows]
        # Penalties are computed after all samples are drawn, so until then no sample can rule out another.
        return EarlyStopping(best, references, self.scorer, among_samples=not self.fluency)

    def gather_selected(self, rows: list[Row]) -> None:
        """Send the selected samples to all processes, since shuffling moves questions between processes."""
        if self.args.world_size > 1:
            own = [(row.index, self.best[row.index], self.temperature.multipliers[row.index]) for row in rows]
            for index, candidate, multiplier in gather_object(own):
                self.best[index], self.temperature.multipliers[index] = candidate, multiplier

    def epoch_record(self, steps: int) -> dict[str, float]:
        self.temperature.warn_when_stalled(self.epoch_means("sampled_questions", ["stalled"]).get("stalled", 0.0))
        self.picks += pmc_log.new_picks(self)
        return pmc_log.epoch_record(self, super().epoch_record(steps))

    def row_files(self):
        return super().row_files() | {PICKS: self.picks}

    def state_to_save(self) -> dict[str, Any]:
        return super().state_to_save() | {
            "best": [[index, asdict(candidate)] for index, candidate in self.best.items()],
            "temperature": self.temperature.state_to_save(),
            "picks": self.picks,
            "relabeled": [[index, asdict(example)] for index, example in self.relabeled.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.best = {index: Candidate(**candidate) for index, candidate in state["best"]}
        self.temperature.load_state(state["temperature"])
        self.picks = state["picks"]
        self.relabeled = {index: Example(**example) for index, example in state["relabeled"]}
