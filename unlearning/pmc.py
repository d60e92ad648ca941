"""Partial Model Collapse (arXiv 2507.04219): unlearn by training on the model's own answers.

    python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny

1. Before training, the finetuned model answers every forget question greedily: the *initial responses*.
2. For each forget question of an optimizer step, draw `num_samples` answers from the current model.
3. Score each: s = ROUGE-L recall of the sample against the initial response (1 - reward).
4. Keep per question the answer with the lowest s so far; one whose s is 0 is not sampled again. Samples that cannot be
   picked any more are stopped while they are drawn (`unlearning.early_stopping`). An option adds to s how unlikely the answer
   was before unlearning, for fluent picks.
5. Train: cross-entropy on the kept answers + lambda_unlearning * cross-entropy on retain answers. An option lets the
   weight of the former grow over the first epochs.

The forget answers of the data set are never looked at.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from hydra.utils import get_method, instantiate
from pydantic import Field, ValidationInfo, field_validator
from transformers import PreTrainedModel, TrainingArguments

from common.collate import collate
from common.config import section
from common.data import Row
from common.losses import answer_losses
from common.model import eos_token_ids
from common.prompts import Example
from generation.replica import Replica
from generation.sampler import generate
from generation.token_sampling import SamplingSettings
from unlearning.early_stopping import EarlyStopping, complete_words
from unlearning.trainer import MethodSettings, UnlearningData, UnlearningTrainer

log = logging.getLogger(__name__)


@section
class PMCSettings(MethodSettings):
    gamma: float = Field(1.0, gt=0, description="weight of the collapse loss")
    lambda_unlearning: float = Field(1.5, ge=0, description="weight of the retain loss, 0: retain rows are not used")
    num_samples: int = Field(5, ge=1, description="answers drawn for each forget question and step")
    temperature: float = Field(1.25, ge=0, description="the logits are divided by it; 0 is greedy")
    stalled_temperature_factor: float = Field(
        1.0,
        ge=1,
        description="multiplies the temperature of a question whose samples all equal its initial response, "
        "at each attempt and up to ten times in all; 1: off",
    )
    top_p: float = Field(
        0.95, gt=0, le=1, description="draw from the smallest set of likeliest tokens with at least this probability"
    )
    top_k: int = Field(50, ge=0, description="draw from the k likeliest tokens; 0: all")
    max_length: int = Field(200, ge=1, description="prompt and sampled answer together, in tokens")
    min_len: int = Field(0, ge=0, description="answers of fewer words score worse, by exp(-words); 0: off")
    fluency_weight: float = Field(
        0.0,
        ge=0,
        description="weight, in an answer's score, of its mean -log p per token under the model before unlearning; 0: off",
    )
    prune: bool = Field(
        True, description="stop samples that can no longer be picked, for rewards that never rise as a sample grows"
    )
    sampling_batch_size: int | None = Field(
        None, ge=1, description="answers drawn side by side, at most; null: as many as a tenth of the memory holds"
    )
    reward: Any = Field(
        default_factory=lambda: {"_target_": "unlearning.rewards.rouge_l"},
        description="function (reference, samples) -> list of rewards in [0, 1]",
    )

    @field_validator("temperature")
    @classmethod
    def samples_differ(cls, temperature: float, info: ValidationInfo) -> float:
        if temperature == 0 and info.data.get("num_samples", 1) > 1:
            raise ValueError(
                f"all {info.data['num_samples']} samples would be the same greedy answer; "
                "expected more than 0, or num_samples=1"
            )
        return temperature

    @field_validator("stalled_temperature_factor")
    @classmethod
    def can_be_raised(cls, factor: float, info: ValidationInfo) -> float:
        if factor > 1 and info.data.get("temperature") == 0:
            raise ValueError("temperature=0 cannot be raised; give it a temperature above 0")
        return factor

    @field_validator("reward")
    @classmethod
    def exists(cls, reward: Any) -> Any:
        target = reward.get("_target_") if isinstance(reward, dict) else reward
        try:
            get_method(target)
        except (ValueError, ImportError, TypeError, AttributeError) as error:
            raise ValueError(f"{target}: no such function ({str(error).splitlines()[0]})") from error
        return reward


MAX_TEMPERATURE_MULTIPLIER = (
    10.0  # times the set temperature, at most, for a stalled question: near-uniform draws of the top_k tokens
)


@dataclass(frozen=True)
class Candidate:
    """An answer that a question may be trained on.

    Attributes:
        score: s; 0: nothing of the initial response left.
        answer: its ids.
        penalty: fluency_weight times how unlikely the model before unlearning finds it, 0 or more.
    """

    score: float
    answer: list[int]
    penalty: float = 0.0

    @property
    def cost(self) -> float:
        return self.score + self.penalty


def scores(rewards: Sequence[float], samples: Sequence[str], min_len: int) -> list[float]:
    """s = 1 - reward; samples of w < min_len words get min(1, s + exp(-w)).

    >>> scores([1.0, 1.0], ["a b", "a b c"], min_len=3)
    [0.1353352832366127, 0.0]
    """
    result = []
    for reward, sample in zip(rewards, samples, strict=True):
        s, words = 1.0 - reward, len(sample.split())
        result.append(min(1.0, s + math.exp(-words)) if words < min_len else s)
    return result


def select(stored: Candidate | None, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest cost, the first of equals, unless the stored pick's cost is lower still.

    Without a fluency_weight costs are scores.
    """
    best = min(candidates, key=lambda pick: pick.cost, default=stored)
    return best if stored is None or best.cost <= stored.cost else stored


class PMC(UnlearningTrainer):
    """Trains on the model's own answers, picked to be least like the initial responses."""

    Settings = PMCSettings

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: PMCSettings):
        # Made before super() wraps the model. A model kept in bfloat16 already is its own replica.
        self.replica = Replica(model, torch.bfloat16) if args.bf16 and model.dtype != torch.bfloat16 else None
        self.needs_reference = settings.fluency_weight > 0
        super().__init__(model, args, data, settings)
        self.reward = instantiate(settings.reward, _partial_=True)
        self.prunes = settings.prune and getattr(self.reward.func, "is_monotone", False)
        self.eos_token_ids = eos_token_ids(model, data.prompts.eos_token_id)
        self.prompt_ids = {row.index: data.prompts.prompt(row.question) for row in data.forget}
        self.initial_responses: dict[int, str] = {}  # by row index, as is the memory
        self.memory: dict[int, Candidate] = {}
        self.temperature_multipliers: dict[
            int, float
        ] = {}  # of stalled questions: what the set temperature is multiplied by
        self.seconds["sampling"] = 0.0
        self.stalled_epochs = 0

    # --- step 1 ---

    def before_training(self) -> None:
        started = time.perf_counter()
        rows = self.data.forget
        settings = SamplingSettings(self.settings.max_length, batch_size=self.settings.sampling_batch_size)
        prompts = [self.prompt_ids[row.index] for row in rows]
        answers = generate(self.sampled_model(), prompts, settings, self.eos_token_ids, description="initial responses")
        texts = [self.data.prompts.text(answer[0]) for answer in answers]
        self.initial_responses = {row.index: text for row, text in zip(rows, texts, strict=True)}
        self.seconds["sampling"] += time.perf_counter() - started

    # --- steps 2 to 4 ---

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        started = time.perf_counter()
        open_rows = [row for row in rows if row.index not in self.memory or self.memory[row.index].score > 0]
        early_stopping = self.early_stopping(open_rows) if self.prunes else None
        candidates = []
        for question, (row, answers) in enumerate(zip(open_rows, self.sample(open_rows, early_stopping), strict=True)):
            values = self.score(row, answers)
            if early_stopping:
                values = [early_stopping.bounds.get((question, sample), value) for sample, value in enumerate(values)]
            candidates.append([Candidate(value, answer) for value, answer in zip(values, answers, strict=True)])
            self.count(candidates[-1])
        for row, drawn, picks in zip(open_rows, candidates, self.penalized(open_rows, candidates), strict=True):
            self.memory[row.index] = select(self.memory.get(row.index), picks)
            self.adapt_temperature(row, drawn)
        self.share_memory(open_rows)
        self.add_to_epoch(
            questions=len(rows),
            selected_score=sum(self.memory[row.index].score for row in rows),
            selected_penalty=sum(self.memory[row.index].penalty for row in rows),
            finished=sum(self.memory[row.index].score == 0 for row in rows),
            pruned=len(early_stopping.bounds) if early_stopping else 0,
        )
        elapsed = time.perf_counter() - started
        self.seconds["sampling"] += elapsed
        self.add_to_epoch(seconds_sampling=elapsed)
        return [Example(self.prompt_ids[row.index], self.memory[row.index].answer) for row in rows]

    def sample(self, rows: list[Row], early_stopping: EarlyStopping | None) -> list[list[list[int]]]:
        """`num_samples` answers of the current model to each row's question, as token ids."""
        if not rows:
            return []
        s = self.settings
        settings = SamplingSettings(s.max_length, s.num_samples, s.temperature, s.top_k, s.top_p, s.sampling_batch_size)
        prompts = [self.prompt_ids[row.index] for row in rows]
        keys = [(self.args.seed, self.state.global_step, row.index) for row in rows]
        options = {"description": "sampling", "stopping_criteria": early_stopping}
        if s.stalled_temperature_factor > 1:
            options["temperatures"] = [s.temperature * self.temperature_multipliers.get(row.index, 1.0) for row in rows]
        return generate(self.sampled_model(), prompts, settings, self.eos_token_ids, keys, **options)

    def penalized(self, rows: list[Row], candidates: list[list[Candidate]]) -> list[list[Candidate]]:
        """The candidates that may be picked, with their penalties.

        A penalty is never negative, so a candidate whose score alone is above the cost of the stored pick, or of the
        candidate with the lowest score, has lost and need not be asked about.
        """
        if not self.settings.fluency_weight:
            return candidates
        most = [self.memory[row.index].cost if row.index in self.memory else math.inf for row in rows]
        lowest = [min(picks, key=lambda pick: pick.score) for picks in candidates]
        first = self.with_penalties(rows, [[pick] for pick in lowest], most)
        most = [min([cost, *(pick.cost for pick in picks)]) for cost, picks in zip(most, first, strict=True)]
        others = [[p for p in picks if p is not own] for picks, own in zip(candidates, lowest, strict=True)]
        return [a + b for a, b in zip(first, self.with_penalties(rows, others, most), strict=True)]

    def with_penalties(
        self, rows: list[Row], candidates: list[list[Candidate]], most: list[float]
    ) -> list[list[Candidate]]:
        """Those of each row's candidates whose score is at most so much, with their penalties."""
        left = [[pick for pick in picks if pick.score <= cost] for picks, cost in zip(candidates, most, strict=True)]
        prompts = [self.prompt_ids[row.index] for row in rows]
        asked = [Example(prompt, pick.answer) for prompt, picks in zip(prompts, left, strict=True) for pick in picks]
        found = iter(self.surprise(asked))
        return [[replace(p, penalty=self.settings.fluency_weight * next(found)) for p in picks] for picks in left]

    def surprise(self, examples: list[Example]) -> list[float]:
        """Mean -log p of each answer's tokens, in nats, under the model before unlearning."""
        at_once = 2 * self.args.per_device_train_batch_size  # the rows of a training pass
        order = sorted(range(len(examples)), key=lambda place: len(examples[place]))
        means = [0.0] * len(examples)
        with self.reference.active() as model:
            for start in range(0, len(order), at_once):
                places = order[start : start + at_once]
                batch = self._prepare_inputs(collate([examples[place] for place in places]))
                losses, rows = answer_losses(model, batch)
                sums = losses.new_zeros(len(places)).index_add(0, rows, losses)
                for place, mean in zip(places, sums / torch.bincount(rows, minlength=len(places)), strict=True):
                    means[place] = mean.item()
        return means

    def adapt_temperature(self, row: Row, drawn: list[Candidate]) -> None:
        """Draw a question hotter the next time while nothing but its initial response is sampled."""
        multiplier = self.temperature_multipliers.pop(row.index, 1.0)
        if self.memory[row.index].score == 1 and all(pick.score == 1 for pick in drawn):
            self.temperature_multipliers[row.index] = min(
                multiplier * self.settings.stalled_temperature_factor, MAX_TEMPERATURE_MULTIPLIER
            )

    def sampled_model(self) -> PreTrainedModel:
        """The current model, in the type that it is sampled in."""
        return self.replica.refresh() if self.replica else self.model

    def score(self, row: Row, answers: list[list[int]]) -> list[float]:
        texts = [self.data.prompts.text(answer) for answer in answers]
        rewards = self.reward(self.initial_responses[row.index], texts)
        return scores(rewards, texts, self.settings.min_len)

    def lower_bound(self, row: Row, beginning: list[int]) -> float:
        """A score that no answer with this beginning falls below."""
        text = complete_words(self.data.prompts.text(beginning))
        return scores(self.reward(self.initial_responses[row.index], [text]), [text], min_len=0)[0]

    def early_stopping(self, rows: list[Row]) -> EarlyStopping:
        stored = [self.memory[row.index].cost if row.index in self.memory else math.inf for row in rows]

        def score(question: int, answer: list[int]) -> float:
            # With penalties, which are known when all samples are drawn, only the stored pick can be said to win.
            return math.inf if self.settings.fluency_weight else self.score(rows[question], [answer])[0]

        return EarlyStopping(
            stored,
            score=score,
            bound=lambda question, beginning: self.lower_bound(rows[question], beginning),
        )

    def share_memory(self, rows: list[Row]) -> None:
        """Let all processes know the picks of this step's rows: a shuffled question goes to another one every epoch."""
        if self.args.world_size == 1:
            return
        own = [(row.index, self.memory[row.index], self.temperature_multipliers.get(row.index)) for row in rows]
        for index, pick, temperature_multipliers in gather_object(own):
            self.memory[index] = pick
            if temperature_multipliers:
                self.temperature_multipliers[index] = temperature_multipliers
            else:
                self.temperature_multipliers.pop(index, None)

    # --- step 5 ---

    # --- the epoch's line ---

    def count(self, candidates: list[Candidate]) -> None:
        self.add_to_epoch(
            sampled_questions=1,
            all_equal_initial=all(pick.score == 1 for pick in candidates),
            samples=len(candidates),
            sample_score=sum(pick.score for pick in candidates),
            sample_tokens=sum(len(pick.answer) for pick in candidates),
        )

    def epoch_record(self, steps: int) -> dict[str, float]:
        total = self.epoch_sum
        questions, samples, sampled = total("questions"), total("samples"), total("sampled_questions")
        losses = super().epoch_record(steps)
        record = {"collapse_loss": losses.pop("forget_loss"), **losses}
        record["selected_score"] = total("selected_score") / questions
        if self.settings.fluency_weight:
            record["selected_surprise"] = total("selected_penalty") / questions / self.settings.fluency_weight
        record["finished"] = total("finished") / questions
        if samples:
            # A sample that was stopped counts with the score that it would at least have had.
            record["sample_score_at_least" if self.prunes else "sample_score"] = total("sample_score") / samples
            record["sample_tokens"] = total("sample_tokens") / samples
            if self.prunes:
                record["pruned"] = total("pruned") / samples
        record["seconds_sampling"] = total("seconds_sampling") / self.args.world_size
        self.warn_when_stalled(total("all_equal_initial") / sampled if sampled else 0.0)
        return record

    def warn_when_stalled(self, share: float) -> None:
        """Say so when, two epochs running, all samples of most questions equal the initial response."""
        self.stalled_epochs = self.stalled_epochs + 1 if share > 0.5 else 0
        if self.stalled_epochs == 2:
            log.warning(
                "for %.0f%% of the questions every sample equals the initial response, so there is nothing to select: "
                "the model knows these answers too well by heart. Raise method.stalled_temperature_factor (now %g; 1.5 "
                "is usual), method.temperature (now %g), method.top_p or method.num_samples (now %d), or finetune for fewer "
                "epochs (training.num_epochs there).",
                100 * share,
                self.settings.stalled_temperature_factor,
                self.settings.temperature,
                self.settings.num_samples,
            )

    # --- checkpoints ---

    def state_to_save(self) -> dict[str, Any]:
        return super().state_to_save() | {
            "initial_responses": list(self.initial_responses.items()),
            "memory": [[index, pick.score, pick.answer, pick.penalty] for index, pick in self.memory.items()],
            "temperature_multipliers": list(self.temperature_multipliers.items()),
            "stalled_epochs": self.stalled_epochs,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.initial_responses = dict(state["initial_responses"])
        self.memory = {index: Candidate(*pick) for index, *pick in state["memory"]}
        self.temperature_multipliers = dict(state["temperature_multipliers"])
        self.stalled_epochs = state["stalled_epochs"]
