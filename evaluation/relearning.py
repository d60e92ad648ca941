"""How fast the forgotten comes back: a copy of the model is finetuned on the forget rows for a moment and measured again.

Anything learns what it is taught. What speaks against an unlearned model is that it learns the forget rows faster than one
that never saw them: so the same is done to the retain-only model where there is one.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from accelerate import PartialState
from transformers import set_seed

from common.config import above_zero, at_least, share
from common.data import Row
from common.runtime import UserError
from common.training import ExampleTrainer, training_arguments
from evaluation.case import Case, Model
from evaluation.passes import Subject
from evaluation.scores import Scores
from evaluation.tofu import probability, recalls


@dataclass
class Relearning:
    fraction: float = 1.0
    """Share of the forget rows that are relearned; less than 1: the others are also scored by themselves."""
    num_epochs: int = 1
    """Passes over them."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW, decaying linearly."""
    batch_size: int = 16
    """Rows of an optimizer step."""

    def problems(self) -> list[str]:
        found = at_least(self, 1, "num_epochs", "batch_size") + share(self, "fraction")
        return found + above_zero(self, "learning_rate")


def measure(case: Case, scores: Scores) -> None:
    """ROUGE-L recall of greedy answers to forget questions, and the true answers' probability, after relearning."""
    settings: Relearning = case.config.sections["relearning"]
    rows = case.rows("forget")
    taught = taught_rows(rows, settings.fraction, case.config.seed)
    before = fmean(recalls(case.subject, rows))
    after = relearned(case, case.model, rows, taught)
    scores.mean("relearning/rougeL_recall", "forget", after["recall"], False)
    scores.mean("relearning/probability", "forget", after["probability"], False)
    if settings.fraction < 1:
        others = [None if row in taught else recall for row, recall in zip(rows, after["recall"], strict=True)]
        scores.mean("relearning/rougeL_recall_not_taught", "forget", others, False)
    scores.add("relearning/rougeL_recall_gained", fmean(after["recall"]) - before, False, len(rows))
    beyond = "relearning/rougeL_recall_beyond_retain_model"
    with scores.null_if_missing({beyond: False}):
        never_knew = relearned(case, case.find_retain_model(), rows, taught)
        difference = fmean(after["recall"]) - fmean(never_knew["recall"])
        scores.add(beyond, difference, False, len(rows), ideal=0.0)


def taught_rows(rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """The rows that are relearned: all, or a share drawn by the seed, at least one."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[: max(1, round(fraction * len(rows)))]
    return [rows[i] for i in sorted(drawn)]


def relearned(case: Case, model: Model, rows: list[Row], taught: list[Row]) -> dict[str, list]:
    """Recall and probability of every row after a fresh copy of the model relearned some; done once for each model."""
    if "relearning" not in model.found:
        copy = relearn(case, model, taught)
        answers = copy.tokens_of_answers([(row.question, row.answer) for row in rows])
        probabilities = [probability(answer) for answer in answers]
        model.found["relearning"] = {"recall": recalls(copy, rows), "probability": probabilities}
    return model.found["relearning"]


def relearn(case: Case, model: Model, taught: list[Row]) -> Subject:
    """Finetune a fresh copy of the model; neither the checkpoint nor the model that others measure is touched.

    Raises:
        UserError: when the batch cannot be split evenly over the processes.
    """
    settings: Relearning = case.config.sections["relearning"]
    processes = PartialState().num_processes
    if settings.batch_size % processes:
        raise UserError(f"relearning.batch_size={settings.batch_size}: cannot be split over {processes} processes")
    training = {  # without mixed precision, which would make the result depend on how batches are split
        "num_train_epochs": settings.num_epochs,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size // processes,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
    }
    prompts = model.subject.prompts
    examples = [prompts.example(row, case.config.data.max_length) for row in taught]
    set_seed(case.config.seed)
    # float32 whatever the model's type: steps as small as these are rounded away in bfloat16, and nothing is relearned.
    copy = case.loader.fresh(replace(model.config, lora=None, dtype="float32"), model.tokenizer, trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(replace(case.config, training=training), Path(folder), len(examples))
        trainer = ExampleTrainer(copy, args, examples, model.tokenizer)
        trainer.train()
    return model.subject.with_weights(trainer.model)
