"""Attack: relearn the forgotten answers. A copy of the model is finetuned briefly on some rows and measured again.

Finetuning teaches any model the forget rows. Unlearning was incomplete if the unlearned model learns them faster than a
model that was never trained on them. Therefore the retain-only model, if given, is finetuned in the same way. With
`relearning.rows=[forget,retain]` another copy is finetuned on as many retain rows, which do not have the forget answers
(benign relearning, Hu et al. 2024, arXiv 2406.13356): what comes back was hidden, not removed.

    python evaluation/main.py -cd=configs -cn=evaluate metrics=relearning model.path=FOLDER "relearning.num_epochs=[1,2,5]"

With several numbers of epochs, one run is measured after each of them, and the names of its scores end in the number, as in
relearning/rougeL_recall@5. Its learning rate is constant, so that a measurement does not depend on how many epochs follow.
With a single number it decays linearly to 0, so the score without a number is not that of the same number of epochs with one.

Scores:
    relearning/rougeL_recall (lower): forget recall after relearning (by default one epoch on the forget rows). Not
        shown: longer training, larger steps.
    relearning/probability (lower): probability of the true forget answers after relearning. Not shown: longer training,
        larger steps.
    relearning/rougeL_recall_not_relearned (lower): recall after relearning on the forget rows that were left out of it
        (fraction below 1). Not shown: longer training, larger steps.
    relearning/rougeL_recall_gained (lower): forget recall after relearning minus before. Not shown: whether a
        retain-only model would gain less.
    relearning/rougeL_recall_beyond_retain_model (0): forget recall after relearning minus that of the retain-only
        model after the same finetuning. Not shown: longer training, larger steps.
    relearning/*@* (as the score without a number): the same after each of several numbers of epochs, with a constant
        learning rate. Not shown: larger steps.
    relearning/on_retain/* (as the score without on_retain): the same after relearning on retain rows. Not shown: other
        texts, some of which may bring back more.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from accelerate import PartialState
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from transformers import TrainerCallback, set_seed

from common.config import Fraction, RunConfig, section
from common.data import Row
from common.errors import UserError
from common.trainer import ExampleTrainer
from common.training_arguments import training_arguments
from evaluation.context import EvaluatedModel, EvaluationContext
from evaluation.metrics.tofu import probabilities, recalls
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Scores


@section
class Relearning:
    fraction: Fraction = 1.0
    """Fraction of the forget rows to finetune on, at least: windows of one text, and equal rows, are drawn together; below 1,
    the other rows are also scored separately."""
    rows: Annotated[list[Literal["forget", "retain"]], Field(min_length=1)] = Field(default_factory=lambda: ["forget"])
    """Rows to finetune a copy on: forget, retain (as many of them) or both, each with a copy of its own."""
    num_epochs: Annotated[list[PositiveInt], Field(min_length=1)] = Field(default_factory=lambda: [1])
    """Passes over these rows; [1, 2, 5] measures one run after each of them."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of AdamW, decaying linearly; with several numbers of epochs it is constant."""
    batch_size: PositiveInt = 16
    """Rows in an optimizer step."""

    @field_validator("rows", "num_epochs")
    @classmethod
    def differ(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("expected each of them once")
        return values


def measure(context: EvaluationContext, scores: Scores) -> None:
    """After relearning: ROUGE-L recall of the greedy forget answers, and the probability of the true answers."""
    settings: Relearning = context.config.sections["relearning"]
    for role in settings.rows:
        prefix = "relearning/" if role == "forget" else f"relearning/on_{role}/"
        suffixes = [suffix(settings, epochs) for epochs in settings.num_epochs]
        names = [f"{prefix}{name}{end}" for end in suffixes for name in ("rougeL_recall", "probability")]
        with scores.null_if_missing(dict.fromkeys(names, False)):
            measure_role(context, scores, role, prefix)


def suffix(settings: Relearning, epochs: int) -> str:
    """What the names of the scores after this number of epochs end in."""
    return f"@{epochs}" if len(settings.num_epochs) > 1 else ""


def measure_role(context: EvaluationContext, scores: Scores, role: str, prefix: str) -> None:
    """The scores after relearning on the rows of one role. They have names with this prefix."""
    settings: Relearning = context.config.sections["relearning"]
    rows = context.rows("forget")
    relearn_rows = select_relearn_rows(rows, settings.fraction, context.config.seed)
    if role == "retain":
        others = context.rows("retain")
        relearn_rows = select_relearn_rows(others, min(1, len(relearn_rows) / len(others)), context.config.seed)
    before = fmean(recalls(context.outputs, rows))
    found = relearned(context, context.model, role, relearn_rows)
    for epochs, after in found.items():
        end = suffix(settings, epochs)
        scores.mean(f"{prefix}rougeL_recall{end}", "forget", after["recall"], False)
        scores.mean(f"{prefix}probability{end}", "forget", after["probability"], False)
        if role == "forget" and settings.fraction < 1:
            pairs = zip(rows, after["recall"], strict=True)
            others = [None if row in relearn_rows else recall for row, recall in pairs]
            scores.mean(f"{prefix}rougeL_recall_not_relearned{end}", "forget", others, False)
        scores.add(f"{prefix}rougeL_recall_gained{end}", fmean(after["recall"]) - before, False, count=len(rows))
        beyond = f"{prefix}rougeL_recall_beyond_retain_model{end}"
        with scores.null_if_missing({beyond: False}):
            of_retain_model = relearned(context, context.find_retain_model(), role, relearn_rows)[epochs]
            difference = fmean(after["recall"]) - fmean(of_retain_model["recall"])
            scores.add(beyond, difference, False, count=len(rows), ideal=0.0)


def select_relearn_rows(rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """The rows to finetune on: a fraction, drawn with the seed, and at least one row.

    The windows of one text, which may share words, are drawn together, as are rows with the same question and answer, so that
    the fraction may be exceeded.
    """
    together: dict[Any, list[Row]] = {}
    for row in rows:
        together.setdefault(row.text or row.pair, []).append(row)
    groups, drawn = list(together.values()), []
    for index in np.random.default_rng(seed).permutation(len(groups)):
        if len(drawn) < wanted_rows(rows, fraction):
            drawn += groups[index]
    return sorted(drawn, key=lambda row: row.index)


def wanted_rows(rows: list[Row], fraction: float) -> int:
    """The number of rows that this fraction is, at least one."""
    return max(1, round(fraction * len(rows)))


def check_inputs(config: RunConfig, rows: dict[str, list[Row]]) -> None:
    """Check that the batches can be split over the processes (`check_batches`)."""
    settings, forget = config.sections["relearning"], rows["forget"]
    drawn = select_relearn_rows(forget, settings.fraction, config.seed)
    if len(drawn) == len(forget) > wanted_rows(forget, settings.fraction):
        raise UserError(
            f"relearning.fraction={settings.fraction:g}: the {len(forget)} forget rows are windows of one text or equal, so "
            "that they are drawn together and none is left out; use relearning.fraction=1"
        )
    check_batches(settings, len(drawn))


def check_batches(settings: Relearning, rows: int) -> None:
    """Check that the processes get equal shares of every batch of the rows to finetune on.

    Raises:
        UserError: names the batch size.
    """
    processes = PartialState().num_processes
    if processes > 1 and (settings.batch_size % processes or rows % settings.batch_size):
        raise UserError(
            f"relearning.batch_size={settings.batch_size}: {rows} rows cannot be split evenly into such batches "
            f"over {processes} processes; choose another size, or evaluate in one process"
        )


def relearned(
    context: EvaluationContext, model: EvaluatedModel, role: str, relearn_rows: list[Row]
) -> dict[int, dict[str, list]]:
    """Recall and probability of every forget row after each number of epochs; computed once per model and role."""
    key, rows = f"relearning on {role}", context.rows("forget")
    if key not in model.cache:
        found: dict[int, dict[str, list]] = {}

        def measure_epoch(epoch: int, copy: ModelOutputs) -> None:
            of_rows = probabilities(copy, rows, "forget", with_options=False)
            found[epoch] = {"recall": recalls(copy, rows), "probability": of_rows}

        relearn(context, model, relearn_rows, measure_epoch)
        model.cache[key] = found
    return model.cache[key]


class AfterEpochs(TrainerCallback):
    """Calls a function with the number of the epoch at the end of each of these epochs."""

    def __init__(self, epochs: list[int], function: Callable[[int], None]):
        self.epochs, self.function = epochs, function

    def on_epoch_end(self, args, state, control, **kwargs):
        if (epoch := round(state.epoch)) in self.epochs:
            self.function(epoch)


def relearn(
    context: EvaluationContext,
    model: EvaluatedModel,
    relearn_rows: list[Row],
    measure_epoch: Callable[[int, ModelOutputs], None],
) -> None:
    """Finetune a fresh copy of the model; the checkpoint and the model of the other metrics are not changed.

    Args:
        measure_epoch: called after each of `num_epochs` with the number of epochs and the outputs of the copy.
    Raises:
        UserError: when the batch cannot be split evenly over the processes.
    """
    settings: Relearning = context.config.sections["relearning"]
    check_batches(settings, len(relearn_rows))
    processes = PartialState().num_processes
    training = {  # no mixed precision: with it, the result would depend on how batches are split
        "num_train_epochs": max(settings.num_epochs),
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size // processes,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear" if len(settings.num_epochs) == 1 else "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
    }
    prompts = model.outputs.prompts
    examples = [prompts.example(row, context.config.data.max_length) for row in relearn_rows]
    set_seed(context.config.seed)
    # Always float32: in bfloat16, such small optimizer steps are rounded away and change nothing.
    copy = context.loader.fresh(replace(model.config, lora=None, dtype="float32"), model.tokenizer, trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(replace(context.config, training=training), Path(folder), len(examples))
        trainer = ExampleTrainer(copy, args, examples, model.tokenizer)

        def after_epoch(epoch: int) -> None:
            with trainer.whole_model() as whole:
                measure_epoch(epoch, model.outputs.with_weights(whole))

        trainer.add_callback(AfterEpochs(settings.num_epochs, after_epoch))
        trainer.train()
