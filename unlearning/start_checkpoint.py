"""Find the finetuned checkpoint that unlearning starts from, and check that it fits the run."""

import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.command import command_that_makes
from common.config import DataConfig, LoraSettings, ModelConfig, RunConfig, fields_of, prompt_with_defaults
from common.errors import UserError
from common.files import CONFIGS, looks_local, resolve_path
from common.job import typed_overrides
from common.model import ADAPTER
from common.results import RESULT, is_unlearned, recorded_config, result_of
from common.run_names import run_name
from common.runs import with_portable_paths

log = logging.getLogger(__name__)
# Settings that unlearning may have otherwise than finetuning had them, with a warning.
MAY_DIFFER = ("model.lora", "data.max_length", "data.columns", "data.windows")


def start_checkpoint(config: RunConfig, finetuned: str) -> ModelConfig:
    """The model section with the finetuned checkpoint as its path.

    Raises:
        UserError: if the folder does not exist, or was finetuned with another data set, base model or prompt than this run.
    """
    path, siblings = Path(resolve_path(finetuned)), Path(resolve_path(str(Path(finetuned).parent))).glob("seed-*")
    names = ", ".join(sorted(folder.name for folder in siblings if folder != path))
    existing = f" (there: {names}; name one with finetuned=FOLDER)" if names else ""
    overrides = shared_overrides()
    if any(override.startswith("data.splits.train=") for override in overrides):
        raise UserError(
            "data.splits.train: unlearning does not read it; name a checkpoint that was finetuned on that split with "
            f"finetuned=FOLDER{existing}"
        )
    if looks_local(finetuned) and not path.exists():
        raise UserError(f"finetuned={finetuned}: no such folder; {remedy(config, finetuned, overrides)}{existing}")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", ADAPTER, RESULT)):
        inside = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir())) or "nothing"
        raise UserError(
            f"finetuned={finetuned}: no checkpoint is in this folder; name a run's folder (there: {inside})"
        )
    if any(override.startswith("model.path=") for override in overrides) and result_of(path) is None:
        raise UserError(
            f"model.path: unlearning starts from finetuned={finetuned}, which has no record of the model it was finetuned "
            "from; leave model.path out"
        )
    refused, warned = differences_from_finetuning(config, str(path))
    if refused:
        raise UserError(
            f"finetuned={finetuned}: was finetuned with other settings than this run has: {'; '.join(refused)}. Use its "
            f"settings, or finetune with this run's{existing or ' and name that folder with finetuned=FOLDER'}"
        )
    if warned:
        log.warning("finetuned=%s: finetuning had other settings: %s%s", finetuned, "; ".join(warned), existing)
    command = command_that_makes(finetuned)
    revision = None if path.exists() else config.model.revision  # in a folder it is that of the base model
    return replace(config.model, path=str(path), made_by=command, gguf_file=None, revision=revision, new=None)


def warn_unless_unlearned(path: str) -> None:
    """Warn if the run that made the checkpoint is known and was not one of unlearning."""
    if recorded_config(path) is not None and not is_unlearned(path):
        log.warning(
            "finetuned=%s: has not been unlearned, and this method removes nothing by itself; name the folder of an unlearned "
            "model, such as finetuned=models/unlearned/PMC-unlearn-tiny/seed-0",
            path,
        )


def shared_overrides() -> list[str]:
    """The command line's overrides of model and data, which finetuning needs as well."""
    words = [word.lstrip("+~") for word in typed_overrides()]
    return [word for word in words if re.match(r"(model|data)[.=](?!splits\.(?!train=))", word)]


def remedy(config: RunConfig, finetuned: str, overrides: list[str]) -> str:
    """How to get the checkpoint that does not exist."""
    if re.fullmatch(r"[\w-]+", finetuned) and (CONFIGS / f"{finetuned}.yaml").exists():
        return (
            f"name the folder that the recipe writes, such as finetuned=models/finetuned/{finetuned}/seed-{config.seed}"
        )
    command = command_that_makes(finetuned, overrides)
    if command is None:
        return "name the folder of a finetuned model, or a hub id"
    folder = Path(finetuned).with_name(run_name(config.seed, overrides))
    return f"make it with: {command}" + (f" and name its folder with finetuned={folder}" if overrides else "")


def differences_from_finetuning(config: RunConfig, path: str) -> tuple[list[str], list[str]]:
    """The settings that are not the same as in finetuning, each with both values: those to refuse, and those to warn of.

    An adapter or another length may be wanted. A local data set cannot be told from a copy of the one on the hub. Empty for
    a checkpoint without a result of this program. The seeds in paths may differ.
    """
    recorded = recorded_config(path)
    if recorded is None:
        return [], []
    there = shared_settings(recorded["data"], recorded["model"])
    here = shared_settings(asdict(config.data), asdict(config.model))
    if config.model.tokenizer is not None:  # null: the one that is saved with the checkpoint
        here["model.tokenizer"] = config.model.tokenizer
        there["model.tokenizer"] = recorded["model"].get("tokenizer")

    def comparable(key: str, value: Any) -> Any:
        if not key.endswith(".path"):
            return value
        return resolve_path(re.sub(r"/seed-\d+", "", with_portable_paths(str(value), config.models_dir)))

    refused, warned = [], []
    for key in sorted(here):
        if comparable(key, there[key]) != comparable(key, here[key]):
            copy = key == "data.path" and looks_local(there[key]) != looks_local(here[key])
            found = warned if copy or key in MAY_DIFFER else refused
            found.append(f"{key}={there[key]} there, {here[key]} here")
    return refused, warned


def shared_settings(data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The settings that finetuning and unlearning share, by dotted key. Missing prompt and adapter settings get defaults."""
    prompt = prompt_with_defaults(model["prompt"])
    if model.get("lora"):
        model = model | {"lora": asdict(LoraSettings()) | model["lora"]}
    defaults = fields_of(DataConfig)
    found = {f"data.{key}": data.get(key, defaults[key].default) for key in ("path", "max_length", "windows")}
    found["data.columns"] = {field: data["columns"].get(field) for field in ("question", "answer", "text")}
    found |= {f"model.{key}": model.get(key) for key in ("path", "revision", "gguf_file", "lora")}
    return found | {f"model.prompt.{key}": value for key, value in prompt.items()}
