"""Checkpoints: find the one to resume from, write one on SIGTERM or Ctrl-C, and save the trained model."""

import contextlib
import logging
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from common.config import ModelConfig
from common.errors import UserError
from common.files import read_json
from common.model import load_model

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


def save_trained(trainer: Trainer, folder: Path, config: ModelConfig, prompts: Sequence[list[int]]) -> None:
    """Save an ordinary Hugging Face folder: safetensors, tokenizer with its chat template, generation config.

    Args:
        config: the run's `model` section; with `lora.merge`, the adapter is merged into the weights first.
        prompts: token ids; the saved model must continue them as the trained one does.
    Raises:
        UserError: if it does not.
    """
    trained = next_token_probabilities(trainer.model, prompts) if trainer.is_world_process_zero() else []
    if not (config.lora and config.lora.merge):
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the configuration is in result.json
    elif trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    if trainer.is_world_process_zero():
        loaded = replace(config, path=str(folder), new=None, revision=None, gguf_file=None)
        saved = next_token_probabilities(load_model(loaded, trainer.processing_class, trainable=False), prompts)
        # Total variation distances, the largest of all positions. Merging an adapter rounds in 16 bits.
        distance = max(float((a - b).abs().sum(-1).max()) / 2 for a, b in zip(trained, saved, strict=True))
        if not distance <= (0.005 if config.dtype == "float32" else 0.05):
            raise UserError(
                f"{folder}: the saved model does not answer as the trained one does (probabilities of the next token differ by "
                f"up to {distance:.2g}), so no result is written. The last checkpoint is beside it; "
                + ("try other model.lora.target_modules or model.lora.merge" if config.lora else "use save_model=false")
            )


@torch.no_grad()
def next_token_probabilities(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The probabilities of every next token of each prompt, each of shape (tokens, vocabulary), on the CPU."""
    was_training = model.training
    model.eval()
    inputs = [torch.tensor([ids], device=model.device) for ids in prompts]
    found = [model(input_ids=ids, use_cache=False).logits[0].float().softmax(-1).cpu() for ids in inputs]
    model.train(was_training)
    return found
