"""The base class of every unlearning method: it pairs forget rows with retain rows and adds their losses.

    loss = gamma * forget_loss + lambda_unlearning * retain_loss

Both are means over the whole optimizer step, so the gradient depends neither on micro-batches nor on processes. A method is
a subclass that defines what its forget rows are trained on (`forget_examples`, by default the true answers) and its two
losses (`forget_loss`, `retain_loss`, by default the cross-entropy of the answers), with its `Settings` and a YAML file in
configs/method/.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationInfo, field_validator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, TrainingArguments

from common.collate import collate, count_answer_tokens, sort_into_micro_batches
from common.config import section
from common.data import Row
from common.errors import UserError
from common.losses import answer_logits
from common.prompts import Example, PromptFormat
from common.trainer import ResumableTrainer
from unlearning.dual_variable import DualVariable
from unlearning.gradient_collapse import GradientCollapse
from unlearning.reference_model import ReferenceModel, ShardedReferenceModel
from unlearning.token_losses import TokenLosses

RETAIN_KEY = 1  # rng key of retain rows; PMC's sampling uses (seed, step, index) without a further key


@section
class LossWeights:
    """The settings of methods with a retain loss of their own."""

    gamma: NonNegativeFloat = 1.0
    """Weight of the forget loss."""
    lambda_unlearning: NonNegativeFloat = 1.0
    """Weight of the retain loss; 0: retain rows are not used."""
    collapsed_components: NonNegativeInt = 0
    """RepSelect: number of principal components of the forget gradient that are collapsed in each matrix; 0: off."""

    @field_validator("lambda_unlearning")
    @classmethod
    def trains_something(cls, weight: float | str, info: ValidationInfo) -> float | str:
        if weight == 0 == info.data.get("gamma"):
            raise ValueError("with gamma=0 nothing would be trained; give one of them a weight")
        return weight


@section
class MethodSettings(LossWeights):
    """The settings of methods whose retain loss is the cross-entropy: nearly every method."""

    lambda_unlearning: NonNegativeFloat | Literal["auto"] = 1.0
    """Weight of the retain loss; 0: retain rows are not used; auto: changed at each step to bound the retain loss."""
    retain_tolerance: NonNegativeFloat = 0.1
    """lambda_unlearning=auto: the retain loss may be this fraction above that of the model before unlearning."""
    dual_step_size: PositiveFloat = 1.0
    """lambda_unlearning=auto: the weight changes at each step by this times the retain loss above its bound."""


@section
class NoSettings:
    """No settings: only the learning rate and the number of epochs determine the outcome."""


@dataclass(frozen=True)
class UnlearningData:
    """The data of an unlearning method.

    Attributes:
        forget: rows to forget; `index` is their position.
        retain: rows to keep.
        prompts: turns questions and answers into token ids.
        max_length: longest training example in tokens.
    """

    forget: list[Row]
    retain: list[Row]
    prompts: PromptFormat
    max_length: int


class UnlearningTrainer(ResumableTrainer):
    """Trains on forget rows, each paired with a retain row drawn at random.

    Args:
        model: the finetuned model.
        args: Hugging Face training arguments.
        data: the forget and retain rows.
        settings: an instance of the class's `Settings`.
    Raises:
        UserError: when `lambda_unlearning` is auto and the retain loss is not the cross-entropy, or when
            `collapsed_components` cannot be used.
    """

    Settings: type = MethodSettings
    needs_reference = False  # whether the losses use `TokenLosses.reference`
    starts_unlearned = False  # whether the start is to be a model that was unlearned; another one is warned of
    logs_forget_nll = False  # whether the cross-entropy of the forget answers is logged, too
    logged_terms: tuple[str, ...] = ()  # other quantities that the method passes to `add_to_epoch` in each step

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: Any):
        super().__init__(model, args, data.forget, data.prompts.tokenizer)
        self.data = data
        self.settings = settings
        self.retain_examples = [self.example(row) for row in data.retain]
        self.reference = self.new_reference() if self.needs_reference else None
        self.dual = self.new_dual_variable()
        components = getattr(settings, "collapsed_components", 0)
        self.collapse = GradientCollapse(self, components) if components else None

    def new_reference(self) -> ReferenceModel | ShardedReferenceModel:
        return (
            ShardedReferenceModel(self.model, self.accelerator) if self.is_fsdp_enabled else ReferenceModel(self.model)
        )

    def new_dual_variable(self) -> DualVariable | None:
        """What sets the weight of the retain loss where `lambda_unlearning` is auto."""
        if getattr(self.settings, "lambda_unlearning", None) != "auto":
            return None
        if type(self).retain_loss is not UnlearningTrainer.retain_loss:
            raise UserError(
                f"method.lambda_unlearning=auto: {type(self).__name__} has a retain loss other than the cross-entropy, which "
                "alone can be bounded. Give it a number"
            )
        dual = DualVariable(self)
        self.add_callback(dual)
        return dual

    # --- what a method defines ---

    def loss_weights(self) -> tuple[float, float]:
        """gamma and lambda_unlearning. A loss of weight 0 is not computed, unless the weight may rise again."""
        return self.settings.gamma, self.dual.start_step() if self.dual else self.settings.lambda_unlearning

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        """The example that each forget row of this optimizer step is trained on; called once per step."""
        return [self.example(row) for row in rows]

    def forget_groups(self, rows: list[Row]) -> list[tuple[Example, ...]]:
        """For each forget row the examples that its loss needs; by default the one of `forget_examples`."""
        return [(example,) for example in self.forget_examples(rows)]

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        """This micro-batch's contribution to the step's forget loss, a scalar."""
        return forget.cross_entropy

    def retain_loss(self, retain: TokenLosses) -> torch.Tensor:
        """This micro-batch's contribution to the step's retain loss, a scalar."""
        return retain.cross_entropy

    # --- one optimizer step ---

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Make the micro-batches of one optimizer step: forget examples, and a retain example for each forget row.

        Hugging Face passes the whole accumulation window here, so a method can sample for all of its questions at once.
        """
        window = list(islice(epoch_iterator, num_batches))
        rows = list(chain.from_iterable(window))
        self.weights = dict(zip(("forget", "retain"), self.loss_weights(), strict=True))
        forget = self.forget_groups(rows) if self.weights["forget"] else [()] * len(rows)
        self.step_started = time.perf_counter()
        retain = [(self.paired_retain_example(row),) if self.weights["retain"] or self.dual else () for row in rows]
        micro_batches = collate_pairs(forget, retain, list(map(len, window)))
        self.step_rows = self.total(len(rows))
        if self.dual:
            self.add_to_epoch(lambda_unlearning=self.weights["retain"] / self.args.world_size)
        self.step_tokens = {
            part: self.total(sum(count_answer_tokens(b["labels"][b["is_forget"] == is_forget]) for b in micro_batches))
            for part, is_forget in (("forget", True), ("retain", False))
        }
        return micro_batches, None

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The passes of a micro-batch; after the last one of the optimizer step all gradients are in place."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.collapse and self.accelerator.sync_gradients:
            self.collapse.add_to_gradients()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """gamma * forget loss + lambda_unlearning * retain loss of a micro-batch."""
        loss = 0.0
        part_losses = {"forget": self.forget_loss, "retain": self.retain_loss}
        for part, token_losses in self.token_losses(model, inputs).items():
            value = part_losses[part](token_losses)
            self.add_to_epoch(**{f"{part}_loss": value.detach()})
            if part == "forget" and self.logs_forget_nll:
                self.add_to_epoch(forget_nll=token_losses.cross_entropy.detach())
            if part == "retain" and self.dual:
                self.dual.retain_loss = self.dual.retain_loss + value.detach()
            weighted = self.weights[part] * value
            loss = loss + (self.collapse.collect(weighted) if part == "forget" and self.collapse else weighted)
        return loss * self.args.world_size  # gradients are averaged over processes

    def token_losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, TokenLosses]:
        """Losses of the forget and the retain examples in a micro-batch, from one forward pass for both."""
        logits, targets, rows = answer_logits(model, batch)
        losses = cross_entropy(logits, targets, reduction="none")
        by_part = {}
        for part, examples in parts(batch["is_forget"]):
            own = examples[rows]
            index_in_part = examples.cumsum(0) - 1
            by_part[part] = TokenLosses(
                self.step_tokens[part],
                self.step_rows,
                partial(self.reference_losses, part, batch, examples),
                losses[own],
                index_in_part[rows[own]],
                int(examples.sum()),
                targets[own],
                batch["position"][examples],
                batch["weights"][examples],
                partial(logits.__getitem__, own),
            )
        return by_part

    def reference_losses(self, part: str, batch: dict[str, torch.Tensor], examples: torch.Tensor) -> TokenLosses:
        """The losses of one part of a micro-batch under the reference model."""
        if self.reference is None:
            raise RuntimeError(f"{type(self).__name__} uses the reference model without needs_reference = True")
        with self.reference.active() as model:
            return self.token_losses(model, {name: values[examples] for name, values in batch.items()})[part]

    # --- rows to examples ---

    def example(self, row: Row) -> Example:
        """A row with its answer, of at most `data.max_length` tokens."""
        return self.data.prompts.example(row, self.data.max_length)

    def paired_retain_example(self, row: Row) -> Example:
        """A retain example drawn at random for a forget row."""
        return self.retain_examples[self.draw_index(RETAIN_KEY, row, len(self.retain_examples))]

    def draw_index(self, rng_key: int, row: Row, size: int) -> int:
        """A random index below `size`, see `rng`."""
        return int(self.rng(rng_key, row).integers(size))

    def rng(self, rng_key: int, row: Row) -> np.random.Generator:
        """Random numbers keyed by (seed, optimizer step, row, rng_key).

        They depend neither on the order of the data nor on the number of processes, and are the same after a resume.
        """
        return np.random.default_rng((self.args.seed, self.state.global_step, row.index, rng_key))

    # --- the epoch's record ---

    def epoch_record(self, steps: int) -> dict[str, float]:
        names = ("forget_loss", "retain_loss", "lambda_unlearning", "forget_nll", *self.logged_terms)
        return {name: self.epoch_sum(name) / steps for name in names if name in self.epoch_sums}

    # --- checkpoints ---

    def state_to_save(self) -> dict[str, Any]:
        return super().state_to_save() | ({"dual": self.dual.state_to_save()} if self.dual else {})

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.dual:
            self.dual.load_state(state["dual"])


def collate_pairs(
    forget: list[tuple[Example, ...]], retain: list[tuple[Example, ...]], sizes: list[int]
) -> list[dict[str, torch.Tensor]]:
    """Micro-batches with the given numbers of forget rows and as many retain rows; rows of similar length go together.

    The examples of the forget rows come first (the first ones of all rows, then the second ones, ...). `is_forget`, shape
    (examples,), marks them; `position`, of the same shape, is 0 for the first ones and for retain examples, then 1, ...
    `weights` has the weight of each example.
    """
    micro_batches = []
    by_length = [sort_into_micro_batches(groups, sizes, max_length_of) for groups in (forget, retain)]
    for forget_groups, retain_groups in zip(*by_length, strict=True):
        forget_examples = list(chain.from_iterable(zip(*forget_groups, strict=True)))
        retain_examples = list(chain.from_iterable(retain_groups))
        is_forget = torch.tensor([True] * len(forget_examples) + [False] * len(retain_examples))
        position = (is_forget.cumsum(0) - 1) // max(1, len(forget_groups)) * is_forget
        examples = forget_examples + retain_examples
        weights = torch.tensor([example.weight for example in examples])
        micro_batches.append({**collate(examples), "is_forget": is_forget, "position": position, "weights": weights})
    return micro_batches


def max_length_of(examples: tuple[Example, ...]) -> int:
    return max(map(len, examples), default=0)


def parts(is_forget: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The parts that have examples, each with the mask of these, shape (examples,)."""
    masks = {"forget": is_forget, "retain": ~is_forget}
    return [(part, mask) for part, mask in masks.items() if mask.any()]
