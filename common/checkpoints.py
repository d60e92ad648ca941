"""Checkpoints: find the one to resume from, write one on SIGTERM or Ctrl-C, and save the trained model."""

import contextlib
import logging
import signal
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from common.files import read_json

log = logging.getLogger(__name__)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in the folder, or None."""
    found = folder.glob("checkpoint-*")
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            read_json(path / "trainer_state.json")
            read_json(path / "run_state.json")
            return path
    return None


class StopSignals:
    """A context that records the first SIGTERM or Ctrl-C in `received`. A second one ends the process as usual."""

    def __enter__(self) -> "StopSignals":
        self.received = 0
        self.previous = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: Any) -> None:
        log.warning(
            "signal %d: saving a checkpoint and stopping after this step (send it again to stop at once)", number
        )
        self.received = number
        self.__exit__()


class SaveAndStop(TrainerCallback):
    """After a signal, end training with a checkpoint when the current optimizer step is done."""

    def __init__(self, stop: StopSignals):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.received:
            control.should_save = control.should_training_stop = True


def save_trained(trainer: Trainer, folder: Path, merge: bool) -> None:
    """Save an ordinary Hugging Face folder: safetensors, tokenizer with its chat template, generation config.

    Args:
        merge: merge a LoRA adapter into the weights first.
    """
    if not (merge and hasattr(trainer.model, "merge_and_unload")):
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the configuration is in result.json
    elif trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
