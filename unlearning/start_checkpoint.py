"""Find the finetuned checkpoint that unlearning starts from, and check that it fits the run."""

import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.config import ModelConfig, PromptConfig, RunConfig
from common.errors import UserError
from common.files import CONFIGS, ROOT, looks_local, resolve_path
from common.results import result_of
from common.runs import with_portable_paths

log = logging.getLogger(__name__)


def start_checkpoint(config: RunConfig, finetuned: str) -> ModelConfig:
    """The model section with the finetuned checkpoint as its path.

    Raises:
        UserError: if the folder does not exist, or was finetuned with another data set, base model or prompt than this run.
    """
    path, command = resolve_path(finetuned), finetuning_command(finetuned)
    siblings = sorted(folder.name for folder in Path(resolve_path(str(Path(finetuned).parent))).glob("seed-*"))
    existing = f" (there: {', '.join(siblings)}; name one with finetuned=FOLDER)" if siblings else ""
    if looks_local(finetuned) and not Path(path).exists():
        remedy = f"make it with: {command}" if command else "name the folder of a finetuned model, or a hub id"
        raise UserError(f"finetuned={finetuned}: no such folder; {remedy}{existing}")
    if differences := differences_from_finetuning(config, path):
        raise UserError(
            f"finetuned={finetuned}: was finetuned with other settings than this run has: {'; '.join(differences)}. Use "
            f"its settings, or finetune with this run's{existing or ' and name that folder with finetuned=FOLDER'}"
        )
    return replace(config.model, path=path, made_by=command, gguf_file=None, revision=None, new=None)


def finetuning_command(path: str) -> str | None:
    """The command that creates the folder <models_dir>/finetuned/<recipe>/seed-<seed>.

    None for a path of another form, or if configs/ has no such recipe.
    """
    match = re.fullmatch(r"(?:(.*)/)?finetuned/([^/]+)/seed-(\d+)/?", path)
    if not match or not (CONFIGS / f"{match[2]}.yaml").exists():
        return None
    models_dir = "" if match[1] in ("models", f"{ROOT}/models") else f" models_dir={match[1] or '.'}"
    return f"python finetuning/main.py -cd=configs -cn={match[2]} seed={match[3]}{models_dir}"


def differences_from_finetuning(config: RunConfig, path: str) -> list[str]:
    """The settings that must be the same as in finetuning but are not, each with both values.

    Empty for a checkpoint without a result of this program. The seeds in paths may differ. A local data set against one from
    the hub is only warned about.
    """
    recorded = (result_of(path) or {}).get("config")
    if recorded is None:
        return []
    there = shared_settings(recorded["data"], recorded["model"])
    here = shared_settings(asdict(config.data), asdict(config.model))

    def comparable(key: str, value: Any) -> Any:
        if not key.endswith(".path"):
            return value
        return resolve_path(re.sub(r"/seed-\d+", "", with_portable_paths(str(value), config.models_dir)))

    differing = [key for key in sorted(here) if comparable(key, there[key]) != comparable(key, here[key])]
    if "data.path" in differing and looks_local(there["data.path"]) != looks_local(here["data.path"]):
        differing.remove(
            "data.path"
        )  # a local copy of a data set from the hub, which cannot be told from another data set
        log.warning(
            "data.path=%s: the checkpoint was finetuned on %s; its scores mean something only if this is a copy of that data",
            here["data.path"],
            there["data.path"],
        )
    return [f"{key}={there[key]} there, {here[key]} here" for key in differing]


def shared_settings(data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The settings that must be equal in finetuning and unlearning, by dotted key. Missing prompt settings get defaults."""
    prompt = asdict(PromptConfig(style="plain")) | model["prompt"]
    paths = {"data.path": data["path"], "model.path": model["path"]}
    return paths | {f"model.prompt.{key}": value for key, value in prompt.items()}
