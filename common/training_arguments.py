"""Turn the `training` section of the configuration into TrainingArguments of Hugging Face."""

import logging
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler

from common.config import RunConfig
from common.errors import UserError, library_errors_as_user_error
from common.hardware import has_fast_bf16
from common.job import typed_overrides
from common.run_names import PUSH_KEYS

log = logging.getLogger(__name__)


def training_arguments(config: RunConfig, output_dir: Path, num_rows: int) -> TrainingArguments:
    """The `training` section as TrainingArguments, with every value under the same name.

    Args:
        config: the run's configuration.
        output_dir: folder of the checkpoints.
        num_rows: number of training rows, for converting `warmup_epochs` to optimizer steps.
    Raises:
        UserError: if TrainingArguments rejects a combination of values, or DeepSpeed cannot be used with them.
    """
    values = dict(config.training)
    check_lengths_are_used(values)
    values.pop("num_epochs", None)  # the recipes set num_train_epochs to it
    for key in PUSH_KEYS:  # the Trainer would push checkpoints; common/hub.py pushes the finished folder
        values.pop(key, None)
    convert_warmup(values, num_rows)
    if str(values.get("optim")).startswith("schedule_free"):
        raise UserError(
            f"training.optim={values['optim']}: its averaged weights need an evaluation mode that is not entered here, so that "
            "others would be sampled from and saved; use another optimizer"
        )
    if values.get("fp16") and not torch.cuda.is_available():
        raise UserError("training.fp16=true: needs an NVIDIA GPU; use training.bf16=auto")
    if values.get("bf16") == "auto":
        values["bf16"] = has_fast_bf16() and not values.get("fp16", False)
    # Otherwise the processes of a launcher would be independent runs, and bfloat16 would be refused.
    values.setdefault("use_cpu", not torch.accelerator.is_available())
    if values.get("data_seed") is None:
        values["data_seed"] = config.seed
    values["disable_tqdm"] = values.get("disable_tqdm") or not sys.stderr.isatty()
    values.setdefault("project", "partial-model-collapse")  # of trackio; as WANDB_PROJECT in environment.env
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError("training.deepspeed: DeepSpeed is not installed; pip install -r requirements-deepspeed.txt")
    with library_errors_as_user_error("training"):
        args = TrainingArguments(output_dir=str(output_dir), seed=config.seed, remove_unused_columns=False, **values)
        check_precision(args)
        check_accelerator(args, values.get("accelerator_config"))
        check_deepspeed(args)
        _check_parts(args, num_rows)
    if args.n_gpu > 1:
        log.info("using one of %d GPUs; torchrun --nproc-per-node N uses more", args.n_gpu)
        args._n_gpu = 1  # prevents DataParallel, which splits every tensor along its first dimension
    return args


def check_lengths_are_used(values: dict[str, Any]) -> None:
    """Check that a length given in epochs on the command line is not replaced by the recipe's length in steps.

    Raises:
        UserError: names both keys.
    """
    typed = {word.lstrip("+").partition("=")[0] for word in typed_overrides()}
    is_set = {"max_steps": values.get("max_steps", -1) > 0, "warmup_steps": bool(values.get("warmup_steps"))}
    for key, steps in (
        ("num_epochs", "max_steps"),
        ("num_train_epochs", "max_steps"),
        ("warmup_epochs", "warmup_steps"),
    ):
        if f"training.{key}" in typed and f"training.{steps}" in typed and is_set[steps]:
            log.warning("training.%s: has no effect beside training.%s=%s", key, steps, values[steps])
        elif f"training.{key}" in typed and is_set[steps]:
            none = -1 if steps == "max_steps" else 0
            raise UserError(
                f"training.{key}={values.get(key)}: has no effect beside the recipe's training.{steps}={values[steps]}; change "
                f"that one, or add training.{steps}={none}"
            )


def convert_warmup(values: dict[str, Any], num_rows: int) -> None:
    """Replace `warmup_epochs` by `warmup_steps`.

    Raises:
        UserError: if the warmup is longer than the run, or the schedule has none.
    """
    warmup_epochs = values.pop("warmup_epochs", None)
    if warmup_epochs:
        values.setdefault("warmup_steps", math.ceil(warmup_epochs * _steps_per_epoch(values, num_rows)))
    warmup_steps, total = values.get("warmup_steps") or 0, values.get("max_steps", -1)
    if total < 1:
        total = math.ceil(values["num_train_epochs"] * _steps_per_epoch(values, num_rows))
    if warmup_steps > total:
        raise UserError(
            f"training.warmup_steps={warmup_steps}: the run has {total} optimizer steps, so the learning rate would not reach "
            "its peak; use fewer"
        )
    if warmup_steps and values.get("lr_scheduler_type") == "constant":
        key = "warmup_epochs" if warmup_epochs else "warmup_steps"
        raise UserError(
            f"training.lr_scheduler_type=constant: has no warmup, but training.{key} is set; use constant_with_warmup, or "
            f"training.{key}=0"
        )


def check_accelerator(args: TrainingArguments, named: dict | str | None) -> None:
    """Refuse settings of `accelerator_config` with which a continued run or the number of steps would be another one.

    Args:
        named: the setting as it is given: a mapping or a file.
    Raises:
        UserError: names the setting.
    """
    given = args.accelerator_config
    wrong = {
        "use_seedable_sampler=false": not given.use_seedable_sampler
        and "a continued run would repeat some rows and skip others",
        "split_batches=true": given.split_batches
        and "training.per_device_train_batch_size counts the rows of each process",
        "gradient_accumulation_kwargs.num_steps": "num_steps" in (given.gradient_accumulation_kwargs or {})
        and "use training.gradient_accumulation_steps",
    }
    file = f" (in {named})" if isinstance(named, str) else ""
    for key, why in wrong.items():
        if why:
            raise UserError(f"training.accelerator_config.{key}{file}: {why}; remove it")


def check_precision(args: TrainingArguments) -> None:
    """Check that a launcher's settings have not changed the precision of training.

    Raises:
        UserError: if ACCELERATE_MIXED_PRECISION, which `accelerate launch` sets, says otherwise than the configuration.
    """
    chosen = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    found = os.environ.get("ACCELERATE_MIXED_PRECISION", chosen).lower()
    if found not in (chosen, "no"):  # accelerate launch sets "no" unless it is told otherwise
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION={found}: set by accelerate launch or its configuration file, but the run has "
            f"training.bf16={args.bf16} and training.fp16={args.fp16}; use accelerate launch --mixed_precision={chosen}, or "
            "the settings of training"
        )


def check_deepspeed(args: TrainingArguments) -> None:
    """Check DeepSpeed's settings, of training.deepspeed or accelerate's environment, before the model is loaded.

    Raises:
        UserError: names the setting.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    if plugin.zero_stage == 3:
        raise UserError(
            "DeepSpeed ZeRO-3 (zero_optimization.stage=3): answers are generated from whole weights, and here each process "
            "has a part of them; +sharding=fsdp does that job, and +sharding=zero2 keeps whole weights"
        )
    if args.bf16 or args.fp16:
        raise UserError(
            f"training.{'bf16' if args.bf16 else 'fp16'}=true: DeepSpeed would store the weights in 16 bits, and here they "
            "stay in float32; set it to false, and training.deepspeed.torch_autocast computes in bfloat16 (see +sharding=zero2)"
        )


def _check_parts(args: TrainingArguments, num_rows: int) -> None:
    """Make the optimizer, the schedule and the loader of the training rows, which reject values only when they are made.

    Raises:
        UserError: if FSDP has one process only.
        ValueError, TypeError, ImportError, ...: of the libraries.
    """
    if args.fsdp and args.world_size == 1:
        raise UserError("training.fsdp: needs several processes; start the stage with torchrun --nproc-per-node N")
    DataLoader(
        range(num_rows),
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )

    if args.deepspeed or args.optim_target_modules:  # their optimizers need the model
        return
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = optimizer_class(weights, **options)
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )


def _steps_per_epoch(values: dict[str, Any], num_rows: int) -> int:
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    rows_per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * processes
    return math.ceil(num_rows / rows_per_step)
