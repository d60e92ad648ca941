"""Checkpoints that survive a kill, and the signals that ask for one."""

import logging
import signal
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from common.files import read_json

log = logging.getLogger(__name__)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; unfinished ones are passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            read_json(path / "trainer_state.json")
            read_json(path / "run_state.json")
        except (OSError, ValueError):
            continue
        return path
    return None


class StopSignals:
    """While active, notes the first SIGTERM or Ctrl-C instead of dying; a second one kills as usual."""

    def __enter__(self) -> "StopSignals":
        self.received = 0
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        log.warning("signal %d: finishing this step and writing a checkpoint (once more: stop at once)", number)
        self.received = number
        self.__exit__()


class SaveAndStop(TrainerCallback):
    """Turns a noted signal into a checkpoint and the end of training, after the optimizer step."""

    def __init__(self, stop: StopSignals):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.received:
            control.should_save = control.should_training_stop = True
        return control


def save_trained(trainer: Trainer, folder: Path, merge: bool) -> None:
    """Save an ordinary Hugging Face folder: safetensors, tokenizer with its chat template, generation config.

    Args:
        merge: fold a LoRA adapter into the weights first.
    """
    if merge and hasattr(trainer.model, "merge_and_unload"):
        if not trainer.is_world_process_zero():
            return
        trainer.model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        return
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the configuration is in result.json
