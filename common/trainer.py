"""The trainers that both training stages use, with resumable checkpoints and a history of the epochs.

An `Example` (a prompt with its answer) is padded to the longest of its batch. The loss is the mean over the answer tokens
of the whole optimizer step, so splitting a step into micro-batches does not change the gradient.
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from common.checkpoints import SaveAndStop, StopSignals, damage, last_complete_checkpoint, write_manifest
from common.collate import PASS_OVERHEAD_TOKENS, bucket_by_length, collate, count_answer_tokens, sort_into_micro_batches
from common.errors import Interrupted, Pruned, UserError, library_errors_as_user_error
from common.files import read_json, write_json
from common.hardware import suitable_threads
from common.losses import answer_losses
from common.results import HISTORY
from common.whole_model import WholeModel

log = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """A Trainer for a list of rows that resumes from the last complete checkpoint and keeps a history of the epochs.

    A subclass defines the micro-batches of an optimizer step (`get_batch_samples`) and their loss (`compute_loss`: the
    contribution of a micro-batch to a mean over the whole step). It extends `state_to_save` and `load_state` for its own
    state.

    Attributes:
        history: one dictionary per epoch, written to history.jsonl.
        seconds: seconds by part of the work ("training", "evaluation"), kept across interruptions.
        epoch_sums: the sums of `add_to_epoch` in the current epoch.
        evaluate_model: a function that returns the scores of the model; if set, it is called during training.
        evaluate_every: number of epochs between two of these calls.
        min_utility: utility in percent below which these scores end the run; None: they do not.
    """

    # compute_loss already divides by the counts of the whole optimizer step.
    loss_is_scaled_for_ga = True

    evaluate_model: Callable[[Any], dict[str, float]] | None = None
    evaluate_every: int = 1
    min_utility: float | None = None

    def __init__(self, model: Any, args: TrainingArguments, rows: list, tokenizer: Any):
        check_even_split(len(rows), args.per_device_train_batch_size, args.world_size)
        with library_errors_as_user_error("training"):
            super().__init__(model=model, args=args, train_dataset=rows, data_collator=list, processing_class=tokenizer)
        self.check_sharding()
        self.whole = WholeModel(model) if self.is_fsdp_enabled else None
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressBar())
        self.history: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {"training": 0.0}
        self.epoch_sums: dict[str, torch.Tensor] = {}
        self.add_callback(EpochRecords(self))

    def train(self, *args, **kwargs):
        # On a terminal, lines of the log go above the progress bar.
        redirect = contextlib.nullcontext() if self.args.disable_tqdm else logging_redirect_tqdm()
        with suitable_threads(self.model), redirect:
            return super().train(*args, **kwargs)

    # --- sharded weights ---

    def check_sharding(self) -> None:
        """Check that weights that are sharded over processes can be gathered. Only those of FSDP2 on GPUs can.

        Accelerate's settings are read, since training.fsdp is not the only way to turn it on.

        Raises:
            UserError: names the setting.
        """
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError("training.fsdp: there is no GPU here, and the weights would not be sharded; leave it out")
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        unusable = {
            "version=1": plugin.fsdp_version != 2,
            "cpu_offload=true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "cpu_ram_efficient_loading=true": plugin.cpu_ram_efficient_loading,
            "state_dict_type=SHARDED_STATE_DICT": "FULL_STATE_DICT" not in str(plugin.state_dict_type),
        }
        if found := [name for name, is_set in unusable.items() if is_set]:
            raise UserError(
                f"FSDP with {', '.join(found)}: the weights cannot be gathered for generating answers; leave it out of "
                "training.fsdp_config and of accelerate's settings"
            )

    @contextlib.contextmanager
    def whole_model(self, dtype: torch.dtype | None = None) -> Iterator[Any]:
        """A context with the model to generate from, to evaluate and to save: it has all weights in every process.

        All processes must enter it. Without FSDP it is the trained model itself.

        Args:
            dtype: of the weights that FSDP2 gathers; None: that of training.
        """
        if self.whole is None:
            yield self.model
        else:
            with self.whole.gathered(self.args.device, dtype) as model:
                yield model

    # --- one optimizer step ---

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run one forward and backward pass per sub-batch of a micro-batch; return the sum of the losses."""
        step = super().training_step
        return sum(step(model, bucket, num_items_in_batch) for bucket in self.buckets(inputs))

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of the gradients, as Hugging Face computes it before each optimizer step.

        Raises:
            UserError: if it is not finite. The weights are still as they were; a float16 scaler skips such steps itself.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):
            checkpoint = last_complete_checkpoint(Path(self.args.output_dir))
            raise UserError(
                f"training diverged: in optimizer step {self.state.global_step + 1} of {self.state.max_steps} the loss or a "
                f"gradient is not finite. Lower training.learning_rate (now {self.args.learning_rate:g}) or raise "
                f"training.warmup_epochs; the last checkpoint is {checkpoint or 'none'}"
            )
        return norm

    def buckets(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The sub-batches of a micro-batch, one per pass: rows of similar length on a CPU, elsewhere all rows in one."""
        if self.args.device.type == "cpu" and self.args.world_size == 1:  # all processes need the same number of passes
            return bucket_by_length(batch, PASS_OVERHEAD_TOKENS)
        return [batch]

    def total(self, count: float) -> float:
        """A count summed over all processes."""
        if self.args.world_size == 1:
            return count
        return self.accelerator.reduce(torch.tensor(float(count), device=self.args.device), "sum").item()

    # --- the epoch's record ---

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the duration of the block to `seconds[part]`."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def add_to_epoch(self, **values: torch.Tensor | float) -> None:
        """Add to the epoch's sums. Tensors stay on their device until the end of the epoch."""
        for name, value in values.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value

    def epoch_record(self, steps: int) -> dict[str, float]:
        """The values to log for an epoch of `steps` optimizer steps. Subclasses override this."""
        return {}

    def epoch_means(self, count: str, names: list[str]) -> dict[str, float]:
        """The epoch's sums divided by the sum with the name `count`; empty if that sum is 0."""
        number = self.epoch_sum(count)
        return {name: self.epoch_sum(name) / number for name in names} if number else {}

    def epoch_sum(self, name: str) -> float:
        """A sum of the epoch over all processes; 0 if nothing was added."""
        return self.total(float(self.epoch_sums.get(name, 0.0)))

    # --- checkpoints ---

    def state_to_save(self) -> dict[str, Any]:
        """The state to save in addition to the Trainer's, as JSON values."""
        # The mean over processes: each of them continues with it, and their sum is as before.
        sums = {name: self.epoch_sum(name) / self.args.world_size for name in self.epoch_sums}
        return {"history": self.history, "seconds": self.seconds, "epoch_sums": sums, "bf16": self.args.bf16}

    def row_files(self) -> dict[str, list[dict]]:
        """Name -> rows of the files that are written next to result.json."""
        return {HISTORY: self.history}

    def load_state(self, state: dict[str, Any]) -> None:
        self.history, self.seconds, self.epoch_sums = state["history"], state["seconds"], state["epoch_sums"]
        if state.get("bf16", self.args.bf16) != self.args.bf16:  # training.bf16=auto on another machine
            log.warning("training.bf16: the run began with %s and continues with %s", state["bf16"], self.args.bf16)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if folder.is_dir() and damage(folder) is None:
            return  # already saved at the end of the epoch; a kill while rewriting it would break it
        state = self.state_to_save()
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
            folder.mkdir(parents=True)
            write_json(folder / "run_state.json", state)
        self.accelerator.wait_for_everyone()
        # Older checkpoints stay until this one is complete: the Trainer would delete them before the manifest is written.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_manifest(folder)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def train_or_resume(self) -> None:
        """Train from the last complete checkpoint in the output folder, or from the beginning.

        Raises:
            Interrupted: after SIGTERM, Ctrl-C or submitit's SIGUSR2, once the checkpoint is saved.
            Pruned: if the scores during training are below `min_utility`; the checkpoints are deleted.
        """
        checkpoint = last_complete_checkpoint(Path(self.args.output_dir))
        if checkpoint:
            self.load_state(read_json(checkpoint / "run_state.json"))
            log.info("continuing from %s", checkpoint)
        else:
            self.before_training()
        with StopSignals() as stop:
            self.add_callback(SaveAndStop(stop))
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except Pruned:
                self.delete_checkpoints()
                raise
        if stop.received:
            done = f"step {self.state.global_step} of {self.state.max_steps}"
            log.warning("stopped by signal %d after %s; the same command continues from there", stop.received, done)
            stop.requeue()
            raise Interrupted(stop.received)

    def delete_checkpoints(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for folder in Path(self.args.output_dir).glob("checkpoint-*"):
                shutil.rmtree(folder)

    def before_training(self) -> None:
        """Called once before the first step, but not when a run is resumed. Subclasses may override it."""


def check_even_split(rows: int, batch_size: int, processes: int) -> None:
    """Check that the processes get equal shares of the rows. Accelerate would repeat rows to fill the last batches.

    Args:
        batch_size: rows of a process in a forward pass.
    Raises:
        UserError: names the batch sizes that fit.
    """
    if processes > 1 and rows % (batch_size * processes):
        share = rows // processes
        fitting = [str(size) for size in range(1, share + 1) if share % size == 0 and rows % processes == 0]
        fits = ", ".join(fitting) or "none; use a number of processes that divides the rows, or another number of rows"
        raise UserError(
            f"training.per_device_train_batch_size={batch_size}: {rows} rows cannot be split over {processes} processes in "
            f"batches of this size, and some would be trained on twice; sizes that fit: {fits}"
        )


class ExampleTrainer(ResumableTrainer):
    """Trains on `Example`s with cross-entropy, the mean over the answer tokens of the optimizer step."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collate the micro-batches of one optimizer step; also return their number of answer tokens."""
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


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without the dictionaries that it would print."""

    def on_log(self, args, state, control, **kwargs):
        return


class EpochRecords(TrainerCallback):
    """Measures the time of every step; at the end of an epoch, logs its record and evaluates the model if configured.

    The record is added to the history before the epoch's checkpoint is written, so that a resumed run has it.

    Args:
        trainer: the trainer whose epochs are recorded.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        elapsed = time.perf_counter() - self.trainer.step_started
        self.trainer.seconds["training"] += elapsed
        self.trainer.add_to_epoch(steps=1, seconds_training=elapsed)
        if state.epoch == int(state.epoch) or state.global_step == state.max_steps:  # max_steps may end within an epoch
            self.end_epoch(math.ceil(state.epoch))

    def end_epoch(self, epoch: int) -> None:
        trainer = self.trainer
        record = trainer.epoch_record(int(trainer.epoch_sums["steps"]))
        for name in ("seconds_sampling", "seconds_training"):
            if name in trainer.epoch_sums:
                record[name] = trainer.epoch_sum(name) / trainer.args.world_size
        trainer.epoch_sums = {}
        if trainer.evaluate_model and epoch % trainer.evaluate_every == 0:
            with trainer.timing("evaluation"), trainer.whole_model() as model:
                record |= trainer.evaluate_model(model)
        log.info(
            "epoch %d of %d  %s  time left %s", epoch, trainer.state.num_train_epochs, text_of(record), self.time_left()
        )
        trainer.history.append({"epoch": epoch, **record})
        trainer.log(record)
        if trainer.min_utility is not None and record.get("utility", math.inf) < trainer.min_utility:
            raise Pruned(epoch, record["utility"], trainer.min_utility)

    def time_left(self) -> str:
        """[hours:]minutes:seconds until the last step, if the steps take as long as those since the start or resumption."""
        state = self.trainer.state
        seconds = (time.perf_counter() - self.started) / (state.global_step - self.first_step)
        return tqdm.format_interval(seconds * (state.max_steps - state.global_step))


def text_of(record: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in record.items())
