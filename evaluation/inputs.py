"""The inputs of an evaluation: the models, their configuration, and the models that they are compared to."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from common.config import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    fields_of,
    prompt_with_defaults,
    read_config,
    read_section,
    section,
)
from common.data import load_split
from common.errors import UserError
from common.files import resolve_path
from common.job import is_in_sweep, typed_overrides
from common.results import checkpoint_id, is_unlearned, recorded_config
from common.runs import with_portable_paths
from evaluation.context import trained_from
from evaluation.metrics.registry import SETTINGS

log = logging.getLogger(__name__)


@section
class OtherModel:
    """A model that the evaluated one is compared to."""

    path: str | None = None
    """Folder of a run or any checkpoint, or hub id."""


SECTIONS = {**SETTINGS, "retain_model": OtherModel, "base_model": OtherModel}


def read_evaluation(cfg: DictConfig) -> RunConfig:
    """Check the configuration of the evaluation stage."""
    return read_config(cfg, also=("models", "metrics"), sections=SECTIONS)


def named_models(cfg: DictConfig) -> dict[str, str]:
    """Name -> path of the models to evaluate, from `models` (a list or a dictionary) or from `model.path`.

    Raises:
        UserError: when neither key is set, or both are, or a section is missing.
    """
    if wrong := [name for name in ("model", "data", "evaluation") if not OmegaConf.is_dict(cfg.get(name))]:
        raise UserError(f"{wrong[0]}={cfg.get(wrong[0])}: expected a section")
    one = None if OmegaConf.is_missing(cfg.model, "path") else cfg.model.path
    if cfg.models is None:
        if one is None:
            raise UserError("model.path: missing; name a folder or a hub id, as in model.path=models/unlearned/...")
        return {str(one): str(one)}
    if is_in_sweep():
        raise UserError(f"models={cfg.models}: not in a sweep (-m); sweep over the models instead, model.path=A,B")
    if one is not None:
        raise UserError(f"model.path={one}: models is set as well; give only one of the two")
    plain = OmegaConf.to_container(cfg.models, resolve=True) if OmegaConf.is_config(cfg.models) else cfg.models
    named = {str(path): path for path in plain} if isinstance(plain, list) else plain
    if not named or not isinstance(named, dict) or not all(isinstance(path, str) for path in named.values()):
        raise UserError(f"models={plain}: expected a list of folders or hub ids, or a dictionary of them by name")
    return named


def overrides_for(path: str, config: RunConfig) -> list[str]:
    """The overrides of a command that evaluates only this model. The name of the model's folder is made from them."""
    kept = [word for word in typed_overrides() if word.partition("=")[0].lstrip("+~") not in ("models", "model.path")]
    return [*kept, f"model.path={with_portable_paths(path, config.models_dir)}"]


REQUIRED = {"model": ["prompt"], "data": ["path", "splits", "columns"]}  # keys that the run or the command has
DEFAULTS = {  # of null keys, where no run made the checkpoint, or one of an older version
    "data": {"words": "latin", "max_length": fields_of(DataConfig)["max_length"].default},
    "evaluation": {"max_length": fields_of(EvaluationConfig)["max_length"].default, "full_eval": False, "bf16": "auto"},
}


def fill_from_run(cfg: DictConfig, made_by: dict | None) -> None:
    """Set null keys of `model`, `data` and `evaluation`, in place, to the values of the run that made the checkpoint.

    If `data.path` is null, splits and columns of the command are added to those of that run. So are single keys of
    `model.prompt`, unless they name another style or belong to a model that the command chose (model=phi).

    Args:
        made_by: configuration of that run; None if the checkpoint has no result.json of a run.
    Raises:
        UserError: when a required key is null and there is no such run.
    """
    with open_dict(cfg):
        if made_by and cfg.data.path is None:
            _fill_data(cfg.data, made_by["data"])
        if made_by and OmegaConf.is_dict(cfg.model.get("prompt")):
            _fill_prompt(cfg.model, made_by["model"]["prompt"])
        for name, defaults in DEFAULTS.items():
            for key, default in defaults.items():
                if cfg[name].get(key) is None:
                    cfg[name][key] = made_by[name].get(key, default) if made_by else default
        for name, keys in REQUIRED.items():
            empty = [key for key in keys if cfg[name].get(key) is None]
            if empty and made_by is None:
                raise UserError(
                    f"{name}.{', '.join(empty)}: not given, and {cfg.model.path} has no result.json with the value; "
                    "give a model and a data set, for instance model=phi data=tofu"
                )
            for key in empty:
                cfg[name][key] = made_by[name][key]


def _fill_data(data: DictConfig, recorded: dict[str, Any]) -> None:
    """Add the splits and columns of the command to those of the run; its windows are those of the run."""
    for key in ("splits", "columns"):
        data[key] = {**recorded[key], **(data[key] or {})}
    for key in ("windows", "hub_configurations"):
        if data.get(key) is None and recorded.get(key) is not None:
            data[key] = recorded[key]


def _fill_prompt(model: DictConfig, recorded: dict[str, Any]) -> None:
    """Add single keys of the command to the prompt of the run, unless they are of another style or another model."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    is_of_the_run = choices.get("model", "from_run") == "from_run"
    if is_of_the_run and model.prompt.get("style", recorded["style"]) == recorded["style"]:
        model.prompt = {**recorded, **model.prompt}


def check_retain_model(config: RunConfig, path: str) -> None:
    """Warn of a retain-only model that was trained in another way than an evaluation of it assumes, if its run is known.

    Args:
        path: folder or hub id of that model.
    Raises:
        UserError: if it was finetuned on all forget rows.
    """
    made_by = recorded_config(path)
    if made_by is None or not made_by.keys() >= {"model", "data"}:
        return
    key = f"retain_model.path={path}"
    if "method" in made_by:
        log.warning("%s: is an unlearned model; expected one that was finetuned without the forget rows", key)
        return
    prompt = prompt_with_defaults(made_by["model"]["prompt"])
    if differing := [
        f"{name}={prompt[name]!r}" for name, ours in asdict(config.model.prompt).items() if prompt[name] != ours
    ]:
        log.warning(
            "%s: was finetuned with another model.prompt (%s), but is asked in this one's", key, ", ".join(differing)
        )
    made_from = made_by["data"]
    here = made_from["path"] == config.data.path or Path(resolve_path(made_from["path"])).is_dir()
    if made_from["splits"].get("train") is None or not here:  # not recorded, or to be downloaded
        return
    try:
        trained = load_split(read_section("data", DataConfig, made_from), "train")
    except UserError as error:
        log.warning("%s: the rows that it was finetuned on cannot be read: %s", key, error)
        return
    seen, forget = {row.pair for row in trained}, load_split(config.data, "forget")
    shared = sum(row.pair in seen for row in forget)
    message = f"{key}: was finetuned on {shared} of the {len(forget)} rows of data.splits.forget={config.data.splits['forget']}"
    if shared == len(forget):
        raise UserError(f"{message}; name a model that never saw them, or null")
    if shared:
        log.warning("%s", message)


def check_base_model(path: str, base: str) -> None:
    """Warn of a model before unlearning from which the evaluated model was not trained, if its run is known.

    Args:
        path: folder or hub id of the evaluated model.
        base: folder or hub id of the other one.
    """
    if not is_unlearned(path) or not (trainings := list(trained_from(path))):
        return
    _, start, start_id = trainings[-1]
    if base != start and (start_id is None or checkpoint_id(base) != start_id):
        log.warning("base_model.path=%s: %s was unlearned from another model, %s", base, path, start)
