"""The trainer that every unlearning method is a subclass of: it pairs forget with retain rows and adds up the loss.

    loss = gamma * forget_loss + lambda_unlearning * retain_loss

Both are means over the whole optimizer step, so that neither micro-batches nor processes change the gradient. A method is
a subclass that says what its forget rows are trained on (`forget_examples`, by default the true answers) and what its two
losses are (`forget_loss`, `retain_loss`, by default the cross-entropy of the answers), with a dataclass of its knobs
(`Settings`) and a YAML file in configs/method/.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, TrainingArguments

from common.collate import answer_tokens, collate, sort_into_micro_batches
from common.config import section
from common.data import Row
from common.errors import UserError
from common.losses import answer_logits
from common.prompts import Example, PromptFormat
from common.trainer import ExampleTrainer
from unlearning.reference_model import Reference
from unlearning.token_losses import TokenLosses

RETAIN_STREAM = 1  # keeps the draw of retain rows apart from the sampler's, which (seed, step, index) keys


@section
class MethodSettings:
    """The knobs of nearly every method."""

    gamma: float = Field(1.0, ge=0, description="weight of the forget loss")
    lambda_unlearning: float = Field(1.0, ge=0, description="weight of the retain loss, 0: retain rows are not used")

    @field_validator("lambda_unlearning")
    @classmethod
    def trains_something(cls, weight: float, info: ValidationInfo) -> float:
        if weight == 0 == info.data.get("gamma"):
            raise ValueError("with gamma=0 nothing would be trained; give one of them a weight")
        return weight


@section
class NoSettings:
    """Of a method that the learning rate and the number of epochs settle."""


@dataclass(frozen=True)
class UnlearningData:
    """What a method may look at.

    Attributes:
        forget: rows to forget, `index` being their position.
        retain: rows to keep.
        prompts: how the model is asked.
        max_length: longest training example in tokens.
    """

    forget: list[Row]
    retain: list[Row]
    prompts: PromptFormat
    max_length: int


class UnlearningTrainer(ExampleTrainer):
    """Trains on forget rows, each paired with a retain row drawn at random.

    Args:
        model: the finetuned model.
        args: Hugging Face training arguments.
        data: the forget and retain rows.
        settings: the method's knobs, an instance of the class's `Settings`.
    Raises:
        UserError: when the method needs the model before unlearning and the weights are sharded.
    """

    Settings: type = MethodSettings  # the method's knobs, a `common.config.section`
    needs_reference = False  # whether `TokenLosses.reference` is asked for
    logged_terms: tuple[
        str, ...
    ] = ()  # the method's own figures in an epoch's line: sums of an optimizer step, by `add_to_epoch`

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: Any):
        if self.needs_reference and (args.deepspeed or args.fsdp):
            raise UserError(
                f"training.deepspeed, training.fsdp: {type(self).__name__} compares with the model before unlearning, which is "
                "not kept where weights are sharded over processes; leave them out, or use model.lora on each GPU"
            )
        super().__init__(model, args, examples=data.forget, tokenizer=data.prompts.tokenizer)
        self.data = data
        self.settings = settings
        self.retain_examples = [self.example(row) for row in data.retain]
        self.reference = Reference(self.model) if self.needs_reference else None

    # --- what a method states ---

    def loss_weights(self) -> tuple[float, float]:
        """gamma and lambda_unlearning of this optimizer step. A part of weight 0 is not computed."""
        return self.settings.gamma, self.settings.lambda_unlearning

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        """What each forget row of this optimizer step is trained on. The weights do not change within a step."""
        return [self.example(row) for row in rows]

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        """This micro-batch's share in the step's forget loss, a scalar."""
        return forget.cross_entropy

    def retain_loss(self, retain: TokenLosses) -> torch.Tensor:
        """This micro-batch's share in the step's retain loss, a scalar."""
        return retain.cross_entropy

    # --- one optimizer step ---

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All of a step's micro-batches: forget examples on top, as many retain examples below them.

        Hugging Face hands over the whole accumulation window here, so that a method can look at all its rows at once.
        """
        windows = [rows for _, rows in zip(range(num_batches), epoch_iterator, strict=False)]
        rows = [row for window in windows for row in window]
        sizes = [len(window) for window in windows]
        self.weights = dict(zip(("forget", "retain"), self.loss_weights(), strict=True))
        forget = self.forget_groups(rows) if self.weights["forget"] else [()] * len(rows)
        self.step_started = time.perf_counter()
        retain = [(self.paired_retain_example(row),) if self.weights["retain"] else () for row in rows]
        micro_batches = [
            forget_and_retain(forgotten, kept)
            for forgotten, kept in zip(
                sort_into_micro_batches(forget, sizes, longest),
                sort_into_micro_batches(retain, sizes, longest),
                strict=True,
            )
        ]
        self.step_rows = self.total(len(rows))
        self.step_tokens = {
            part: self.total(sum(answer_tokens(batch["labels"][batch["is_forget"] == flag]) for batch in micro_batches))
            for part, flag in (("forget", True), ("retain", False))
        }
        return micro_batches, None

    def forget_groups(self, rows: list[Row]) -> list[tuple[Example, ...]]:
        """For each forget row the examples that its loss looks at."""
        return [(example,) for example in self.forget_examples(rows)]

    def example(self, row: Row) -> Example:
        """A row with its answer, of at most `data.max_length` tokens."""
        return self.data.prompts.example(row, self.data.max_length)

    def paired_retain_example(self, row: Row) -> Example:
        """A retain example drawn at random, the same whatever the order of the data or the number of processes."""
        return self.retain_examples[self.drawn(RETAIN_STREAM, row, len(self.retain_examples))]

    def drawn(self, stream: int, row: Row, choices: int) -> int:
        """A number below `choices`, keyed by (seed, optimizer step, row): a stream for each thing that is drawn."""
        key = (self.args.seed, self.state.global_step, row.index, stream)
        return int(np.random.default_rng(key).integers(choices))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = 0.0
        losses = {"forget": self.forget_loss, "retain": self.retain_loss}
        for part, answers in self.answers(model, inputs).items():
            value = losses[part](answers)
            self.add_to_epoch(**{f"{part}_loss": value.detach()})
            loss = loss + self.weights[part] * value
        return loss * self.args.world_size  # gradients are averaged over processes

    def answers(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, TokenLosses]:
        """What the model says of the parts that the micro-batch has, from one forward pass for both."""
        logits, targets, rows = answer_logits(model, batch)
        losses = cross_entropy(logits, targets, reduction="none")
        found = {}
        for part, examples in parts(batch["is_forget"]):
            mine = examples[rows]
            place = examples.cumsum(0) - 1  # of an example among those of its part
            found[part] = TokenLosses(
                losses[mine],
                place[rows[mine]],
                int(examples.sum()),
                targets[mine],
                lambda mine=mine: logits[mine],
                self.step_tokens[part],
                self.step_rows,
                lambda part=part, examples=examples: self.reference_losses(part, batch, examples),
            )
        return found

    def reference_losses(self, part: str, batch: dict[str, torch.Tensor], examples: torch.Tensor) -> TokenLosses:
        """What the model before unlearning says of one part."""
        if self.reference is None:
            raise RuntimeError(
                f"{type(self).__name__} asks for the model before unlearning without needs_reference = True"
            )
        with self.reference.active() as model:
            return self.answers(model, {name: values[examples] for name, values in batch.items()})[part]

    def epoch_record(self, steps: int) -> dict[str, float]:
        names = [name for name in ("forget_loss", "retain_loss", *self.logged_terms) if name in self.epoch_sums]
        return {name: self.epoch_sum(name) / steps for name in names}


def forget_and_retain(forgotten: list[tuple[Example, ...]], kept: list[tuple[Example, ...]]) -> dict[str, torch.Tensor]:
    """A micro-batch: the forget rows' examples (all first ones, then all second ones, ...), then the retain rows'."""
    forget = [example for same_place in zip(*forgotten, strict=True) for example in same_place]
    retain = [example for group in kept for example in group]
    is_forget = torch.tensor([True] * len(forget) + [False] * len(retain))
    return {**collate([*forget, *retain]), "is_forget": is_forget}


def longest(examples: tuple[Example, ...]) -> int:
    return max(map(len, examples), default=0)


def parts(is_forget: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The parts that have examples, each with the mask of these, shape (examples,)."""
    found = [("forget", is_forget), ("retain", ~is_forget)]
    return [(name, mask) for name, mask in found if mask.any()]
