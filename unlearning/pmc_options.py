"""PMC's settings, and its options that are off by default: fluency penalty, rising temperature, losses on initial responses."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat

from common.collate import IGNORED, batches_by_length, collate
from common.config import Fraction, section
from common.data import Row
from common.losses import answer_losses
from common.prompts import Example
from unlearning.sampling import OwnAnswerSettings
from unlearning.selection import Candidate
from unlearning.token_losses import TokenLosses
from unlearning.trainer import UnlearningTrainer

MAX_TEMPERATURE_MULTIPLIER = 10.0  # draws from the top_k tokens are then nearly uniform

log = logging.getLogger(__name__)


@section
class PMCSettings(OwnAnswerSettings):
    gamma: PositiveFloat = 1.0
    """Weight of the collapse loss and of the losses on initial responses."""
    lambda_unlearning: NonNegativeFloat | Literal["auto"] = 1.5
    temperature: NonNegativeFloat = 1.25
    top_p: Fraction = 0.95
    top_k: NonNegativeInt = 50
    stalled_temperature_factor: float = Field(1.0, ge=1)
    """Multiplies the temperature of a question at each step in which all its samples, and the best so far, have the reward 0,
    up to a factor of 10 in total; 1: off."""
    fluency_weight: NonNegativeFloat = 0.0
    """Weight of a sample's mean NLL per token under the model before unlearning, subtracted from its reward; 0: off."""
    selection_temperature: NonNegativeFloat = 0.0
    """0: the sample with the highest reward is selected; else one is drawn with probability
    softmax(reward / selection_temperature), and replaces the best so far unless its reward is lower."""
    contrast_weight: NonNegativeFloat = 0.0
    """Weight of the SimNPO loss (arXiv 2410.07163) on the initial responses, which makes them unlikely; 0: off."""
    contrast_beta: PositiveFloat = 1.0
    """The larger, the earlier the contrast loss fades: its gradient is halved where the mean NLL per token is 1.1 / beta."""
    relabeling_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of other labels for the distinctive words of the initial responses, those that are neither
    in the question nor in more than a tenth of the retain answers; a token's label is the model's likeliest one before
    unlearning that does not spell the same word; 0: off."""
    early_stopping: bool = True
    """Stop samples that can no longer be selected; only for rewards that never rise as a sample grows,
    and with selection_temperature=0."""

    @field_validator("stalled_temperature_factor")
    @classmethod
    def can_be_raised(cls, factor: float, info: ValidationInfo) -> float:
        if factor > 1 and info.data.get("temperature") == 0:
            raise ValueError("temperature=0 cannot be raised; give it a temperature above 0")
        return factor


class FluencyPenalty:
    """Subtracts from a reward `weight` times the sample's mean NLL per token under the reference model.

    Args:
        trainer: the trainer whose reference model computes the NLL.
        weight: above 0.
    """

    def __init__(self, trainer: UnlearningTrainer, weight: float):
        self.trainer, self.weight = trainer, weight

    def penalize(
        self,
        prompts: list[list[int]],
        best: list[Candidate | None],
        candidates: list[list[Candidate]],
        all_of_them: bool = False,
    ) -> list[list[Candidate]]:
        """The candidates that can still be selected, with their penalties.

        A penalty is never negative. So a candidate whose reward alone is below the net reward of the best so far, or of
        the candidate with the highest reward, cannot be selected, and its penalty is not computed.

        Args:
            prompts: token ids of each question.
            best: the best sample so far of each question.
            candidates: the samples of each question, without penalties.
            all_of_them: return also those that cannot be selected; for a selection that is drawn.
        """
        if all_of_them:
            return self.with_penalties(prompts, candidates, [-math.inf] * len(candidates))
        floor = [candidate.net_reward if candidate else -math.inf for candidate in best]
        top = [max(of_question, key=lambda candidate: candidate.reward) for of_question in candidates]
        first = self.with_penalties(prompts, [[candidate] for candidate in top], floor)
        floor = [max([low, *(c.net_reward for c in penalized)]) for low, penalized in zip(floor, first, strict=True)]
        rest = [[c for c in of_question if c is not own] for of_question, own in zip(candidates, top, strict=True)]
        return [a + b for a, b in zip(first, self.with_penalties(prompts, rest, floor), strict=True)]

    def with_penalties(
        self, prompts: list[list[int]], candidates: list[list[Candidate]], floor: list[float]
    ) -> list[list[Candidate]]:
        """The candidates of each question whose reward is at least its floor, with their penalties."""
        kept = [[c for c in of_question if c.reward >= low] for of_question, low in zip(candidates, floor, strict=True)]
        examples = [Example(prompt, c.answer) for prompt, own in zip(prompts, kept, strict=True) for c in own]
        nll = iter(self.mean_nll(examples))
        return [[replace(candidate, penalty=self.weight * next(nll)) for candidate in own] for own in kept]

    def mean_nll(self, examples: Sequence[Example]) -> list[float]:
        """Mean NLL per token of each answer under the reference model, in nats."""
        batch_size = 2 * self.trainer.args.per_device_train_batch_size  # the rows of a training pass
        means = torch.zeros(len(examples))
        with self.trainer.reference.active() as model:
            for indices in batches_by_length(list(map(len, examples)), batch_size):
                batch = self.trainer._prepare_inputs(collate([examples[index] for index in indices]))
                losses, rows = answer_losses(model, batch)
                sums = losses.new_zeros(len(indices)).index_add(0, rows, losses)
                means[indices] = (sums / torch.bincount(rows, minlength=len(indices))).cpu()
        return means.tolist()


def num_labels(example: Example) -> int:
    """Number of the answer's tokens that have a loss."""
    return sum(label != IGNORED for label in example.targets)


class InitialResponseLosses:
    """Losses on the initial responses, so that less of the answers is left in the weights.

    contrast:   -(2/beta) log sigmoid(beta * NLL/length), the mean over questions; the loss of SimNPO (arXiv 2410.07163)
    relabeling: CE of the labels of `unlearning.relabeling`, the mean over labels

    Both are computed on the model's own greedy answers from before training. The data set's forget answers are not read.

    Args:
        trainer: the trainer that the losses are logged with.
        settings: PMC's settings, with a `contrast_weight` or a `relabeling_weight` above 0.
    """

    def __init__(self, trainer: UnlearningTrainer, settings: PMCSettings):
        self.trainer, self.settings = trainer, settings
        weights = {"collapse": 1.0, "contrast": settings.contrast_weight, "relabeling": settings.relabeling_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.step_tokens: dict[str, float] = {}

    def groups(
        self, selected: list[Example], initial: list[Example], relabeled: list[Example]
    ) -> list[tuple[Example, ...]]:
        """For each forget row of the optimizer step the example of each loss, in the order of `weights`."""
        examples = {"collapse": selected, "contrast": initial, "relabeling": relabeled}
        self.step_tokens = {name: self.trainer.total(sum(map(num_labels, examples[name]))) for name in self.weights}
        return list(zip(*(examples[name] for name in self.weights), strict=True))

    def loss(self, forget: TokenLosses) -> torch.Tensor:
        """Cross-entropy of the selected samples + the weighted losses on the initial responses."""
        terms = {}
        for position, name in enumerate(self.weights):
            of_examples = forget.position == position
            if name == "contrast":
                mean_nll = forget.nll[of_examples] / forget.lengths[of_examples]
                terms[name] = forget.preference_loss(mean_nll, self.settings.contrast_beta)
                self.trainer.add_to_epoch(initial_nll=forget.mean_over_rows(mean_nll.detach()))
            else:
                # A step may have no label of relabeling.
                terms[name] = forget.losses[of_examples[forget.rows]].sum() / max(1, self.step_tokens[name])
        self.trainer.add_to_epoch(**{f"{name}_loss": value.detach() for name, value in terms.items()})
        return sum(self.weights[name] * value for name, value in terms.items())


class StalledTemperature:
    """Multiplies the temperature of a stalled question: one whose samples, and the best so far, all have the reward 0.

    They are the initial response then, or with `min_len` empty.

    Attributes:
        multipliers: by row index; 1, or missing, for questions that are not stalled.
        stalled_epochs: consecutive epochs in which more than half of the sampled questions were stalled.
    """

    def __init__(self, settings: PMCSettings):
        self.settings = settings
        self.multipliers: dict[int, float] = {}
        self.stalled_epochs = 0

    def of_rows(self, rows: list[Row]) -> list[float] | None:
        """The temperature for each row; None if all rows use the setting."""
        if self.settings.stalled_temperature_factor == 1:
            return None
        return [self.settings.temperature * self.multipliers.get(row.index, 1.0) for row in rows]

    def update(self, row: Row, candidates: list[Candidate]) -> None:
        """Raise the row's multiplier if all its candidates, old and new, have the reward 0; else reset it to 1."""
        raised = self.multipliers.get(row.index, 1.0) * self.settings.stalled_temperature_factor
        stalled = all(candidate.reward == 0 for candidate in candidates)
        self.multipliers[row.index] = min(raised, MAX_TEMPERATURE_MULTIPLIER) if stalled else 1.0

    def warn_when_stalled(self, fraction: float) -> None:
        """Warn when, in two consecutive epochs, more than half of the sampled questions were stalled."""
        self.stalled_epochs = self.stalled_epochs + 1 if fraction > 0.5 else 0
        if self.stalled_epochs == 2:
            log.warning(
                "for %.0f%% of the questions every sample has the reward 0, so there is nothing to select. If samples are the "
                "initial responses, these are memorized too strongly. Raise method.stalled_temperature_factor (now %g; 1.5 is "
                "usual), method.temperature (now %g), method.top_p or method.num_samples (now %d), or finetune for fewer "
                "epochs (training.num_epochs there).",
                100 * fraction,
                self.settings.stalled_temperature_factor,
                self.settings.temperature,
                self.settings.num_samples,
            )

    def state_to_save(self) -> dict[str, Any]:
        return {"multipliers": list(self.multipliers.items()), "stalled_epochs": self.stalled_epochs}

    def load_state(self, state: dict[str, Any]) -> None:
        self.multipliers, self.stalled_epochs = dict(state["multipliers"]), state["stalled_epochs"]
