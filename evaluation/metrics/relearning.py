"""Attack: relearn the forgotten answers. A copy of the model is finetuned briefly on the forget rows and measured again.

Finetuning teaches any model the forget rows. Unlearning was incomplete if the unlearned model learns them faster than a
model that was never trained on them. Therefore the retain-only model, if given, is finetuned in the same way.

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
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
from accelerate import PartialState
from pydantic import PositiveFloat, PositiveInt
from transformers import set_seed

from common.config import Fraction, section
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
    """Fraction of the forget rows to finetune on; below 1, the other rows are also scored separately."""
    num_epochs: PositiveInt = 1
    """Passes over these rows."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of AdamW, decaying linearly."""
    batch_size: PositiveInt = 16
    """Rows in an optimizer step."""


def measure(context: EvaluationContext, scores: Scores) -> None:
    """After relearning: ROUGE-L recall of the greedy forget answers, and the probability of the true answers."""
    settings: Relearning = context.config.sections["relearning"]
    rows = context.rows("forget")
    relearn_rows = select_relearn_rows(rows, settings.fraction, context.config.seed)
    before = fmean(recalls(context.outputs, rows))
    after = relearned(context, context.model, rows, relearn_rows)
    scores.mean("relearning/rougeL_recall", "forget", after["recall"], False)
    scores.mean("relearning/probability", "forget", after["probability"], False)
    if settings.fraction < 1:
        others = [None if row in relearn_rows else recall for row, recall in zip(rows, after["recall"], strict=True)]
        scores.mean("relearning/rougeL_recall_not_relearned", "forget", others, False)
    scores.add("relearning/rougeL_recall_gained", fmean(after["recall"]) - before, False, count=len(rows))
    beyond = "relearning/rougeL_recall_beyond_retain_model"
    with scores.null_if_missing({beyond: False}):
        of_retain_model = relearned(context, context.find_retain_model(), rows, relearn_rows)
        difference = fmean(after["recall"]) - fmean(of_retain_model["recall"])
        scores.add(beyond, difference, False, count=len(rows), ideal=0.0)


def select_relearn_rows(rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """The rows to finetune on: a fraction, drawn with the seed, and at least one row."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[: max(1, round(fraction * len(rows)))]
    return [rows[i] for i in sorted(drawn)]


def relearned(
    context: EvaluationContext, model: EvaluatedModel, rows: list[Row], relearn_rows: list[Row]
) -> dict[str, list]:
    """Recall and probability of every row after relearning; computed once per model."""
    if "relearning" not in model.cache:
        copy = relearn(context, model, relearn_rows)
        of_rows = probabilities(copy, rows, "forget", with_options=False)
        model.cache["relearning"] = {"recall": recalls(copy, rows), "probability": of_rows}
    return model.cache["relearning"]


def relearn(context: EvaluationContext, model: EvaluatedModel, relearn_rows: list[Row]) -> ModelOutputs:
    """Finetune a fresh copy of the model; the checkpoint and the model of the other metrics are not changed.

    Raises:
        UserError: when the batch cannot be split evenly over the processes.
    """
    settings: Relearning = context.config.sections["relearning"]
    processes = PartialState().num_processes
    uneven = settings.batch_size % processes or len(relearn_rows) % settings.batch_size
    if processes > 1 and uneven:
        raise UserError(
            f"relearning.batch_size={settings.batch_size}: {len(relearn_rows)} rows cannot be split evenly into such batches "
            f"over {processes} processes; choose another size, or evaluate in one process"
        )
    training = {  # no mixed precision: with it, the result would depend on how batches are split
        "num_train_epochs": settings.num_epochs,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size // processes,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
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
        trainer.train()
    return model.outputs.with_weights(trainer.model)
