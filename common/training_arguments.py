"""Turn the `training` section of the configuration into TrainingArguments of Hugging Face."""

import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from common.config import RunConfig
from common.errors import UserError
from common.hardware import has_fast_bf16

log = logging.getLogger(__name__)


def training_arguments(config: RunConfig, output_dir: Path, num_rows: int) -> TrainingArguments:
    """The `training` section as TrainingArguments, with every value under the same name.

    Args:
        config: the run's configuration.
        output_dir: folder of the checkpoints.
        num_rows: number of training rows, for converting `warmup_epochs` to optimizer steps.
    Raises:
        UserError: if TrainingArguments rejects a combination of values.
    """
    values = dict(config.training)
    values.pop("num_epochs", None)  # the recipes set num_train_epochs to it
    warmup_epochs = values.pop("warmup_epochs", None)
    if warmup_epochs:
        values.setdefault("warmup_steps", math.ceil(warmup_epochs * _steps_per_epoch(values, num_rows)))
    if values.get("fp16") and not torch.cuda.is_available():
        raise UserError("training.fp16=true: needs an NVIDIA GPU; use training.bf16=auto")
    if values.get("bf16") == "auto":
        values["bf16"] = has_fast_bf16() and not values.get("fp16", False)
    if values.get("bf16") and not torch.cuda.is_available():
        values.setdefault("use_cpu", True)  # TrainingArguments requires it for bfloat16 on a CPU
    values["data_seed"] = values.get("data_seed") or config.seed
    values["disable_tqdm"] = values.get("disable_tqdm") or not sys.stderr.isatty()
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    try:
        args = TrainingArguments(output_dir=str(output_dir), seed=config.seed, remove_unused_columns=False, **values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"training: {str(error).strip().splitlines()[0]}") from error
    if args.n_gpu > 1:
        log.info("using one of %d GPUs; torchrun --nproc-per-node N uses more", args.n_gpu)
        args._n_gpu = 1  # prevents DataParallel, which splits every tensor along its first dimension
    return args


def _steps_per_epoch(values: dict[str, Any], num_rows: int) -> int:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows_per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * processes
    return math.ceil(num_rows / rows_per_step)
