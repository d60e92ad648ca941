"""Group relative policy optimization (GRPO, arXiv 2402.03300) of the reward of PMC, on the model's own answers.

For each forget question of an optimizer step a group of answers is sampled from the current model. The reward says how
unlike the initial response a sample is (`unlearning.rewards`). With the mean and the standard deviation of a group's
rewards:

    advantage = (reward - mean) / (standard deviation + 1e-4)
    forget loss = -(advantage * pi / pi_sampled) + kl_weight * KL(pi || pi0), the mean over all tokens of the step's groups
    KL = pi0/pi - log(pi0/pi) - 1 of a sampled token, the estimator of arXiv 2402.03300

The answers were sampled from pi_sampled. Every batch of samples is trained on once, in one optimizer step. So the ratio
is taken as 1, its gradient is that of log pi, and clipping it has no effect and is left out. A group whose rewards are
all equal has no gradient. RULE (arXiv 2506.07171) and PURGE (arXiv 2601.20568) unlearn by GRPO with other rewards: for
refusals, and against words that are forbidden. Here no forget answer is read. The mean over all tokens and the constant
1e-4 are those of the TRL library; the standard deviation is that of the group, divided by n, where TRL divides by n - 1.

RULE begins with rejection steering, training on refusals, since a model that never refuses cannot find a refusal. Here
`num_refusals` answers of each group are refusals, with reward and advantage like those of samples. They are not drawn
from the model, so theirs is no policy gradient, and on their tokens the KL estimator has a bias. This mixture is ours.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=grpo
"""

from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationInfo, field_validator
from pydantic.types import PositiveFloat

from common.config import section
from common.data import Row
from common.prompts import Example
from unlearning.methods.refusals import RefusalSettings, read_refusals
from unlearning.sampling import OwnAnswerSettings, OwnAnswerTrainer
from unlearning.token_losses import TokenLosses

MIN_STD = 1e-4  # added to the standard deviation of a group's rewards
REFUSALS_KEY = 7  # rng key of `UnlearningTrainer.rng`: the refusals of a group


@section
class GRPOSettings(RefusalSettings, OwnAnswerSettings):
    gamma: PositiveFloat = 1.0
    refusals: str = "data/refusals.txt"
    """File with one refusal per line; num_refusals of them are drawn for each question and step."""
    num_samples: PositiveInt = 8
    """Answers in a group: for each forget question and step."""
    temperature: PositiveFloat = 1.0
    """The logits are divided by it, in sampling and in the loss."""
    num_refusals: NonNegativeInt = 0
    """Number of a group's answers that are refusals instead of samples."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the model before unlearning on the samples; 0: off."""

    @field_validator("num_samples")
    @classmethod
    def has_a_mean(cls, num_samples: int) -> int:
        if num_samples < 2:
            raise ValueError(
                "a single answer has the mean reward of its group, so nothing is learned; expected 2 or more"
            )
        return num_samples

    @field_validator("num_refusals")
    @classmethod
    def leaves_a_sample(cls, num_refusals: int, info: ValidationInfo) -> int:
        if num_refusals >= info.data.get("num_samples", num_refusals + 1):
            raise ValueError(f"no sample would be left of num_samples={info.data['num_samples']}; expected less")
        return num_refusals


class GRPO(OwnAnswerTrainer):
    """Raises the probability of samples whose reward is above the mean of their group, and lowers that of the others."""

    Settings = GRPOSettings
    logged_terms = ("forget_kl",)

    def __init__(self, model: Any, args: Any, data: Any, settings: GRPOSettings):
        self.needs_reference = settings.kl_weight > 0
        super().__init__(model, args, data, settings)

    def forget_groups(self, rows: list[Row]) -> list[tuple[Example, ...]]:
        """The group of each row: samples and refusals, each with its advantage as its weight."""
        with self.timing_of_step():
            groups = [own + self.drawn_refusals(row) for row, own in zip(rows, self.sample(rows), strict=True)]
            rewards = self.rewards(rows, groups)
        self.add_to_epoch(
            samples=sum(map(len, groups)),
            sample_reward=sum(map(sum, rewards)),
            sample_tokens=sum(len(answer) for group in groups for answer in group),
            questions=len(rows),
            equal_rewards=sum(len(set(of_group)) == 1 for of_group in rewards),
        )
        return [
            tuple(
                Example(self.prompt_ids[row.index], answer, weight)
                for answer, weight in zip(group, advantages(of_group), strict=True)
            )
            for row, group, of_group in zip(rows, groups, rewards, strict=True)
        ]

    def number_of_samples(self) -> int:
        return self.settings.num_samples - self.settings.num_refusals

    def drawn_refusals(self, row: Row) -> list[list[int]]:
        """`num_refusals` refusals drawn for this optimizer step, as token ids; different ones if the file has enough."""
        number, refusals = self.settings.num_refusals, read_refusals(self.settings.refusals)
        drawn = self.rng(REFUSALS_KEY, row).choice(len(refusals), number, replace=number > len(refusals))
        return [self.example(replace(row, answer=refusals[index])).answer for index in drawn]

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        log_p = self.log_p(forget)
        loss = forget.mean_over_tokens(-forget.weights[forget.rows] * (log_p - log_p.detach()).exp())
        if not self.settings.kl_weight:
            return loss
        difference = self.log_p(forget.reference) - log_p
        kl = forget.mean_over_tokens(difference.exp() - difference - 1)
        self.add_to_epoch(forget_kl=kl.detach())
        return loss + self.settings.kl_weight * kl

    def log_p(self, answers: TokenLosses) -> torch.Tensor:
        """log p of each answer token at the temperature of sampling, shape (tokens,)."""
        if self.settings.temperature == 1:
            return -answers.losses
        log_probs = (answers.logits / self.settings.temperature).log_softmax(dim=-1)
        return log_probs.gather(1, answers.targets[:, None])[:, 0]

    def epoch_record(self, steps: int) -> dict[str, float]:
        record = super().epoch_record(steps)
        record |= self.epoch_means("questions", ["equal_rewards"])
        return record | self.epoch_means("samples", ["sample_reward", "sample_tokens"])


def advantages(rewards: list[float]) -> list[float]:
    """(reward - mean) / (standard deviation + 1e-4) of each reward of a group.

    >>> [round(value, 3) for value in advantages([0.0, 1.0, 1.0, 1.0])]
    [-1.732, 0.577, 0.577, 0.577]
    """
    mean, std = fmean(rewards), pstdev(rewards)
    return [(reward - mean) / (std + MIN_STD) for reward in rewards]
