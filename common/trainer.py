"""What both training stages share: TrainingArguments from the configuration, checkpoints that survive a kill, progress.

Training rows are `Example`s (a prompt with its answer), padded to the longest of their batch. The loss is the mean over
the answer tokens of the whole optimizer step, so splitting a step into micro-batches does not change the gradient.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from common.checkpoints import SaveAndStop, StopSignals, last_complete_checkpoint
from common.collate import PASS_OVERHEAD_TOKENS, bucket_by_length, collate, count_answer_tokens, sort_into_micro_batches
from common.config import RunConfig
from common.errors import Interrupted, UserError
from common.files import read_json
from common.hardware import has_fast_bf16, suitable_threads
from common.losses import answer_losses

log = logging.getLogger(__name__)


def training_arguments(config: RunConfig, output_dir: Path, num_rows: int) -> TrainingArguments:
    """The `training` section as TrainingArguments, every value by its own name.

    Args:
        config: the run's configuration.
        output_dir: where checkpoints go.
        num_rows: training rows, from which an epoch's optimizer steps are counted for `warmup_epochs`.
    Raises:
        UserError: when TrainingArguments refuses a combination.
    """
    values = {key: value for key, value in config.training.items() if key not in ("num_epochs", "warmup_epochs")}
    if values.get("bf16") == "auto":
        values["bf16"] = has_fast_bf16() and not values.get("fp16", False)
    if values.get("bf16") and not torch.cuda.is_available():
        values.setdefault("use_cpu", True)  # TrainingArguments asks for it before it allows bfloat16 on a CPU
    if config.training.get("warmup_epochs") and "warmup_steps" not in values:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * processes
        values["warmup_steps"] = math.ceil(config.training["warmup_epochs"] * math.ceil(num_rows / per_step))
    try:
        args = TrainingArguments(
            output_dir=str(output_dir),
            seed=config.seed,
            data_seed=values.pop("data_seed", None) or config.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=values.pop("dataloader_pin_memory", torch.cuda.is_available()),
            disable_tqdm=values.pop("disable_tqdm", None) or not sys.stderr.isatty(),
            **values,
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"training: {str(error).strip().splitlines()[0]}") from error
    if args.n_gpu > 1:
        log.info("using one of %d GPUs; torchrun --nproc-per-node N uses more", args.n_gpu)
        args._n_gpu = 1  # threads of one process would split our batches by tensors alone
    return args


class ResumableTrainer(Trainer):
    """A Trainer over lists of rows whose checkpoints are complete or not used, and which keeps a history.

    A subclass says what an optimizer step trains on (`get_batch_samples`) and its loss (`compute_loss`), which is the
    contribution of a micro-batch to a mean over the whole step; and writes its own state with `state_to_save` and reads
    it with `load_state`.

    Attributes:
        history: one dictionary per epoch, written to history.jsonl.
        seconds: time by part of the work; carried across interruptions.
    """

    # compute_loss divides by the counts of the whole optimizer step itself.
    loss_is_scaled_for_ga = True

    # Set both to evaluate while training: a function from the model to scores, and the epochs between two evaluations.
    evaluate_model: Callable[[Any], dict[str, float]] | None = None
    evaluate_every: int = 1

    def __init__(self, model: Any, args: TrainingArguments, rows: list, tokenizer: Any):
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=list, processing_class=tokenizer)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(QuietProgress())
        self.history: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {"training": 0.0}
        self.epoch_sums: dict[str, torch.Tensor] = {}
        self.add_callback(EpochLines(self))

    def train(self, *args, **kwargs):
        with suitable_threads(self.model):
            return super().train(*args, **kwargs)

    # --- one optimizer step ---

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward passes of a micro-batch; on a CPU in buckets of similar length, which have less padding."""
        step = super().training_step
        return sum(step(model, bucket, num_items_in_batch) for bucket in self.buckets(inputs))

    def buckets(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The parts of a micro-batch that go through the model one after the other."""
        if self.args.device.type == "cpu" and self.args.world_size == 1:  # processes must agree on the number of passes
            return bucket_by_length(batch, PASS_OVERHEAD_TOKENS)
        return [batch]

    def total(self, count: float) -> float:
        """A count summed over all processes."""
        if self.args.world_size == 1:
            return count
        return self.accelerator.reduce(torch.tensor(float(count), device=self.args.device), "sum").item()

    # --- the epoch's line ---

    def add_to_epoch(self, **values: torch.Tensor | float) -> None:
        """Add to the sums of this epoch; tensors stay on their device until the epoch ends."""
        for name, value in values.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value

    def epoch_record(self, steps: int) -> dict[str, float]:
        """The figures of an epoch of `steps` optimizer steps. Subclasses add their own."""
        return {}

    def epoch_means(self, count: str, names: list[str]) -> dict[str, float]:
        """The epoch's sums divided by the sum called `count`; empty where that is 0."""
        number = self.epoch_sum(count)
        return {name: self.epoch_sum(name) / number for name in names} if number else {}

    def epoch_sum(self, name: str) -> float:
        return self.total(float(self.epoch_sums.get(name, 0.0)))

    # --- checkpoints ---

    def state_to_save(self) -> dict[str, Any]:
        """What a checkpoint needs beyond the Trainer's own state, as plain data."""
        sums = {name: float(value) for name, value in self.epoch_sums.items()}
        return {"history": self.history, "seconds": self.seconds, "epoch_sums": sums}

    def load_state(self, state: dict[str, Any]) -> None:
        self.history, self.seconds, self.epoch_sums = state["history"], state["seconds"], state["epoch_sums"]

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if last_complete_checkpoint(folder.parent) == folder:
            return  # asked for twice, by a signal on an epoch's last step; rewriting it could only spoil it
        # Our state goes first: trainer_state.json, which the Trainer writes last, then stands for a complete checkpoint.
        state = self.state_to_save()
        if self.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run_state.json").write_text(json.dumps(state), encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def train_or_resume(self) -> None:
        """Train from the last complete checkpoint in the output folder, or from the start.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, a checkpoint written.
        """
        checkpoint = last_complete_checkpoint(Path(self.args.output_dir))
        if checkpoint:
            self.load_state(read_json(checkpoint / "run_state.json"))
            log.info("continuing from %s", checkpoint)
        else:
            self.before_training()
        with StopSignals() as stop:
            self.add_callback(SaveAndStop(stop))
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.received:
            log.warning(
                "stopped by signal %d after step %d of %d; the same command continues from there",
                stop.received,
                self.state.global_step,
                self.state.max_steps,
            )
            raise Interrupted(stop.received)

    def before_training(self) -> None:
        """What a subclass computes once, before the first step of a run."""


class ExampleTrainer(ResumableTrainer):
    """Trains on `Example`s: cross-entropy, the mean over the answer tokens of the optimizer step."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collate the micro-batches of one optimizer step; the loss is divided by their number of answer tokens."""
        self.step_started = time.perf_counter()
        window = [examples for _, examples in zip(range(num_batches), epoch_iterator, strict=False)]
        examples = [example for micro_batch in window for example in micro_batch]
        micro_batches = [collate(some) for some in sort_into_micro_batches(examples, list(map(len, window)))]
        return micro_batches, self.total(sum(count_answer_tokens(batch["labels"]) for batch in micro_batches))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, _ = answer_losses(model, inputs)
        loss = losses.sum() / num_items_in_batch
        self.add_to_epoch(loss=loss.detach())
        return loss * self.args.world_size  # gradients are averaged over processes

    def epoch_record(self, steps: int) -> dict[str, float]:
        return {"loss": self.epoch_sum("loss") / steps}


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without its printed dictionaries."""

    def on_log(self, args, state, control, **kwargs):
        return


class EpochLines(TrainerCallback):
    """At the end of every epoch logs the epoch's record, with its scores where it is time to evaluate.

    All of it happens before the epoch's checkpoint is written, so a resumed run has it too.

    Args:
        trainer: whose sums and history these are.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        elapsed = time.perf_counter() - trainer.step_started
        trainer.seconds["training"] += elapsed
        trainer.add_to_epoch(steps=1, seconds_training=elapsed)
        if state.epoch != int(state.epoch):
            return
        steps = int(trainer.epoch_sums["steps"])
        record = {"epoch": int(state.epoch), **trainer.epoch_record(steps)}
        record["seconds_training"] = trainer.epoch_sum("seconds_training") / args.world_size
        trainer.epoch_sums = {}
        log.info("%s", _line(record))
        if trainer.evaluate_model and record["epoch"] % trainer.evaluate_every == 0:
            started = time.perf_counter()
            scores = trainer.evaluate_model(trainer.model)
            trainer.seconds["evaluation"] = trainer.seconds.get("evaluation", 0.0) + time.perf_counter() - started
            log.info("%s", _line({"epoch": record["epoch"], **scores}))
            record |= scores
        trainer.history.append(record)
        trainer.log({key: value for key, value in record.items() if key != "epoch"})


def _line(record: dict[str, float]) -> str:
    return "  ".join(
        f"{key.replace('_', ' ')} {value}" if isinstance(value, int) else f"{key.replace('_', ' ')} {value:.4g}"
        for key, value in record.items()
    )
