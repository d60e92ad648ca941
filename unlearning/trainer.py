"""The trainer that every unlearning method is a subclass of: it pairs forget with retain rows and adds up the loss.

    loss = collapse (or forget) part + lambda_unlearning * retain part

Each part is the mean over its answer tokens of the whole optimizer step, so that neither micro-batches nor processes
change the gradient. A method states what its forget rows are trained on (`forget_examples`).
"""

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments

from common.data import Row
from common.prompts import Example, PromptFormat, collate
from common.training import ExampleTrainer, answer_losses, answer_tokens, in_slices

RETAIN_STREAM = 1  # keeps the draw of retain rows apart from the sampler's, which (seed, step, index) keys


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
    """

    Settings: type  # dataclass of the method's knobs; every subclass has one

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: Any):
        super().__init__(model, args, examples=data.forget, tokenizer=data.prompts.tokenizer)
        self.data = data
        self.settings = settings
        self.retain_examples = [data.prompts.example(row, data.max_length) for row in data.retain]

    @abstractmethod
    def forget_examples(self, rows: list[Row]) -> list[Example]:
        """What each forget row of this optimizer step is trained on. The weights do not change within a step."""

    # --- one optimizer step ---

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All of a step's micro-batches: forget examples on top, as many retain examples below them.

        Hugging Face hands over the whole accumulation window here, so that a method can look at all its rows at once.
        """
        windows = [rows for _, rows in zip(range(num_batches), epoch_iterator, strict=False)]
        rows = [row for window in windows for row in window]
        forget = self.forget_examples(rows)
        self.step_started = time.perf_counter()
        retain = [self.paired_retain_example(row) for row in rows]
        sizes = [len(window) for window in windows]
        micro_batches = []
        for forgotten, kept in zip(in_slices(forget, sizes), in_slices(retain, sizes), strict=True):
            is_forget = torch.tensor([True] * len(forgotten) + [False] * len(kept))
            micro_batches.append({**collate([*forgotten, *kept]), "is_forget": is_forget})
        forgets, keeps = (
            self.total(sum(answer_tokens(batch["labels"][batch["is_forget"] == part]) for batch in micro_batches))
            for part in (True, False)
        )
        self.tokens = {"forget": forgets, "retain": keeps}
        return micro_batches, None

    def paired_retain_example(self, row: Row) -> Example:
        """A retain example drawn at random, the same whatever the order of the data or the number of processes."""
        key = (self.args.seed, self.state.global_step, row.index, RETAIN_STREAM)
        return self.retain_examples[np.random.default_rng(key).integers(len(self.retain_examples))]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, rows = answer_losses(model, inputs)
        is_forget = inputs["is_forget"][rows]
        forget = losses[is_forget].sum() / self.tokens["forget"]
        retain = losses[~is_forget].sum() / self.tokens["retain"]
        self.add_to_epoch(forget_loss=forget.detach(), retain_loss=retain.detach())
        loss = forget + self.settings.lambda_unlearning * retain
        return loss * self.args.world_size  # gradients are averaged over processes

    def epoch_record(self, steps: int) -> dict[str, float]:
        return {name: self.epoch_sum(name) / steps for name in ("forget_loss", "retain_loss")}
