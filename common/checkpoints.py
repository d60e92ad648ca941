"""Checkpoints: find the one to resume from, write one on SIGTERM or Ctrl-C, and save the trained model."""

import logging
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from common import interrupts
from common.config import ModelConfig
from common.errors import UserError
from common.files import is_first_process, read_json, sha256, write_json
from common.forward import evaluation_mode, own_forward
from common.model import load_model

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write the size in bytes and the SHA-256 of each file of a checkpoint. The manifest marks it as complete."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / MANIFEST, {path.relative_to(folder).as_posix(): _size_and_hash(path) for path in paths})


def _size_and_hash(path: Path) -> list:
    return [path.stat().st_size, sha256(path)]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if all files are as they were written."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: writing it broke off, or an older version wrote it"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is not readable ({error})"
    if not isinstance(manifest, dict) or "run_state.json" not in manifest:
        return f"{MANIFEST} does not list its files"
    for name, written in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if [path.stat().st_size] != written[:1] or _size_and_hash(path) != written:
            return f"{name} was changed or cut off"
    return None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in the folder whose files are as they were written, or None. Damaged ones are logged."""
    steps = {
        int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*") if _has_step(path)
    }
    damaged = []
    for _, path in sorted(steps.items(), reverse=True):
        wrong = damage(path)
        if wrong is None:
            break
        damaged.append(f"{path.name} ({wrong})")
    else:
        path = None
    if damaged:
        log.warning("%s: not usable: %s; using %s", folder, ", ".join(damaged), path.name if path else "none")
    return path


def _has_step(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()


class StopSignals:
    """A context that records the first SIGTERM or Ctrl-C in `received`. A second one ends the process as usual."""

    def __enter__(self) -> "StopSignals":
        self.received = 0
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) != interrupts.left_to_sweep:
            numbers.append(signal.SIGINT)
        if callable(signal.getsignal(signal.SIGUSR2)):  # submitit's handler: the job nears its time limit
            numbers.append(signal.SIGUSR2)
        self.previous = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: Any) -> None:
        log.warning(
            "signal %d: saving a checkpoint and stopping after this step (send it again to stop at once)", number
        )
        self.received = interrupts.received = number
        self.__exit__()

    def requeue(self) -> None:
        """After SIGUSR2, call the handler that was set before: submitit's requeues the Slurm job and exits."""
        if self.received == signal.SIGUSR2:
            self.previous[signal.SIGUSR2](self.received, None)


class SaveAndStop(TrainerCallback):
    """After a signal to any process, end training in all of them with a checkpoint when the current optimizer step is done."""

    def __init__(self, stop: StopSignals):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            received = torch.tensor([self.stop.received], device=args.device)
            self.stop.received = int(gather(received).max())
        if self.stop.received:
            control.should_save = control.should_training_stop = True


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: ModelConfig,
    prompts: Sequence[list[int]],
) -> None:
    """Save an ordinary Hugging Face folder: safetensors, tokenizer with its chat template, generation config.

    Only the first process saves.

    Args:
        model: the trained model, with whole weights.
        config: the run's `model` section; with `lora.merge`, the adapter is merged into the weights first.
        prompts: token ids; the saved model must continue them as the trained one does.
    Raises:
        UserError: if it does not.
    """
    if not is_first_process():
        return
    trained = next_token_probabilities(model, prompts)
    if config.lora and config.lora.merge:
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # On the CPU, where other implementations of attention than these cannot run.
    attention = model.config._attn_implementation if model.config._attn_implementation == "sdpa" else "eager"
    loaded = replace(config, path=str(folder), new=None, revision=None, gguf_file=None, attn_implementation=attention)
    reloaded = load_model(loaded, tokenizer, trainable=False)
    try:
        saved = next_token_probabilities(reloaded, prompts)
    except Exception as error:  # a kernel that runs on a GPU only
        log.warning(
            "%s: the saved model was not compared with the trained one: it does not run here (%s)", folder, error
        )
        return
    distance, allowed = distance_of(trained, saved, config.dtype)
    if not distance <= allowed:
        raise UserError(
            f"{folder}: the saved model does not answer as the trained one does (probabilities of the next token differ by "
            f"{distance:.2g}), so no result is written. The last checkpoint is beside it; "
            + ("try other model.lora.target_modules or model.lora.merge" if config.lora else "use save_model=false")
        )


def distance_of(trained: Sequence[torch.Tensor], saved: Sequence[torch.Tensor], dtype: str) -> tuple[float, float]:
    """How far two models' probabilities of the next tokens are apart, and how far those of equal models may be.

    The total variation distance of a position: the largest one in float32; in 16 bits, in which each kernel of a GPU or CPU
    rounds differently at single positions and merging an adapter rounds too, the mean (up to 0.03 with SmolLM2-135M).

    Args:
        trained, saved: of each prompt, shape (tokens, vocabulary).
    """
    distances = torch.cat([(a - b).abs().sum(-1) / 2 for a, b in zip(trained, saved, strict=True)])
    return (float(distances.max()), 0.005) if dtype == "float32" else (float(distances.mean()), 0.06)


@torch.no_grad()
def next_token_probabilities(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The probabilities of every next token of each prompt, each of shape (tokens, vocabulary), on the CPU.

    In the precision of the weights: accelerate's forward pass computes in that of training.
    """
    forward, inputs = own_forward(model), [torch.tensor([ids], device=model.device) for ids in prompts]
    with evaluation_mode(model):
        return [forward(input_ids=ids, use_cache=False).logits[0].float().softmax(-1).cpu() for ids in inputs]
