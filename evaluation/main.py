"""Measure what checkpoints still know.

    python evaluation/main.py -cd=configs -cn=evaluate model.path=models/unlearned/PMC-unlearn-tiny/seed-0
    python evaluation/main.py -cd=configs -cn=evaluate metrics=full "models=[models/finetuned/tiny/seed-0,FOLDER]"

Writes models/evaluated/<recipe>/<seed and overrides>/ for each model: result.json, generations.jsonl, samples.jsonl,
rows.jsonl and report.md; several models side by side get a report of their own. The prompt format and the data are those of
the run that made the checkpoint unless the command names others.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from common.config import ModelConfig, RunConfig, read_config
from common.runs import RunFolder, identity, job_errors, portable, result_of, run_folder
from common.runtime import CONFIGS, UserError, is_first_process, launch, looks_local, resolve_path, write_text
from evaluation import harness
from evaluation.case import Case, Loader, Model, open_model
from evaluation.headline import HIGHER_IS_BETTER
from evaluation.report import full_table, table
from evaluation.result import started_from, write_result
from evaluation.scores import Missing
from evaluation.suite import SETTINGS, check_data, chosen, measure


@dataclass
class OtherModel:
    """A model that the evaluated one is compared to."""

    path: str | None = None
    """Folder of a run or any checkpoint, or hub id; null: none is named."""

    def problems(self) -> list[str]:
        return []


SECTIONS = {**SETTINGS, "retain_model": OtherModel, "base_model": OtherModel}


def evaluate(cfg: DictConfig) -> dict[str, Path]:
    """Run the stage; returns the folder of each model's result.

    Raises:
        UserError: for whatever is wrong with the configuration, the data or a model.
    """
    models = named_models(cfg)
    opened = OpenModels()
    jobs = {name: Job(cfg, path, opened) for name, path in models.items()}  # all are checked before one is measured
    folders = {name: job.run() for name, job in jobs.items()}
    if is_first_process():
        (job, *_) = jobs.values()
        show_report(run_folder("evaluated", job.config) if cfg.models else job.folder, folders)
    return folders


def show_report(folder: Path, folders: dict[str, Path]) -> None:
    """Write the models' scores side by side into report.md, and print them."""
    results = {name: result_of(of_model) for name, of_model in folders.items()}
    headline_alone = all(result["scores"].keys() <= HIGHER_IS_BETTER.keys() for result in results.values())
    shown = table(results) if headline_alone else full_table(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", f"# Evaluation\n\n{shown}\n")
    print(f"{shown}\n")
    for name, of_model in folders.items():
        print(f"Result of {name}: {of_model / 'result.json'}")
    print(f"Report: {folder / 'report.md'}")


def read_evaluation(cfg: DictConfig) -> RunConfig:
    """The checked configuration of the stage."""
    return read_config(cfg, also=("models", "metrics"), sections=SECTIONS)


def named_models(cfg: DictConfig) -> dict[str, str]:
    """Name -> path of the models to be measured: `models`, a list or a dictionary, or `model.path`.

    Raises:
        UserError: when none is named, or both.
    """
    one = None if OmegaConf.is_missing(cfg.model, "path") else cfg.model.path
    if cfg.models is None:
        if one is None:
            raise UserError("model.path: missing; name a folder or a hub id, as in model.path=models/unlearned/...")
        return {str(one): str(one)}
    if one is not None:
        raise UserError(f"model.path={one}: models names the models already; give one of the two")
    plain = OmegaConf.to_container(cfg.models, resolve=True) if OmegaConf.is_config(cfg.models) else cfg.models
    named = {str(path): path for path in plain} if isinstance(plain, list) else plain
    if not named or not isinstance(named, dict) or not all(isinstance(path, str) for path in named.values()):
        raise UserError(f"models={plain}: expected a list of folders or hub ids, or a dictionary of names and these")
    return named


class OpenModels:
    """The models of a command, each opened once: what was asked of one is not asked again when another is compared to it."""

    def __init__(self):
        self.loader = Loader()
        self.opened: dict[str, Model] = {}

    def get(self, config: RunConfig, model: ModelConfig) -> Model:
        key = repr((model, config.evaluation, config.data))
        if key not in self.opened:
            self.opened[key] = open_model(config, model, self.loader)
        return self.opened[key]


class Job:
    """The evaluation of one model of the command.

    Args:
        cfg: of the command.
        path: of the model.
        opened: the models of the command.
    Raises:
        UserError: for whatever is wrong with its configuration, or a model that is named and not there.
    """

    def __init__(self, cfg: DictConfig, path: str, opened: OpenModels):
        several, cfg = cfg.models is not None, cfg.copy()
        cfg.models, cfg.model.path = None, path
        self.path = resolve_path(path)
        if looks_local(path) and not Path(self.path).exists():
            raise UserError(f"model.path={path}: no such folder")
        made_by = result_of(self.path) or {}
        fill_from_run(cfg, made_by.get("config"))
        self.config = read_evaluation(cfg)
        self.families = chosen(cfg.metrics)
        if "lm_eval" in self.families:
            harness.check(self.config.sections["lm_eval"])
        check_data(self.config, self.families)
        self.folder = run_folder("evaluated", self.config, as_single(self.config, path) if several else None)
        self.opened = opened
        self.model = opened.get(self.config, dataclasses.replace(self.config.model, path=self.path))
        named = {name: self.config.sections[name].path for name in ("retain_model", "base_model")}
        self.others = {name: other and resolve_path(other) for name, other in named.items()}
        for name, other in self.others.items():
            try:
                _ = other and self.other(other)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        self.others["base_model"] = self.others["base_model"] or started_from(self.path)
        self.identity = identity(cfg, made_by.get("id"))
        self.identity["compared_to"] = {
            name: portable({"path": other, "id": (result_of(other) or {}).get("id")}, self.config.models_dir)
            for name, other in self.others.items()
            if other
        }

    def run(self) -> Path:
        """Measure the model, unless that was done in the same way before; returns the folder of its result."""
        run = RunFolder(self.folder, self.identity, self.path)
        if not self.config.overwrite and run.is_done():
            return run.folder
        case = Case(self.config, self.opened.loader, self.model, self.retain_model, self.base_model)
        evaluation = measure(case, self.families)
        write_result(run.open(fresh=True), evaluation.scores, self.identity, evaluation.seconds)
        return run.publish()

    def other(self, path: str) -> Model:
        """Another checkpoint, loaded and asked as the evaluated one is."""
        of_its_own = {"revision": None, "gguf_file": None, "lora": None, "made_by": None}
        return self.opened.get(self.config, dataclasses.replace(self.config.model, path=path, **of_its_own))

    def retain_model(self) -> Model:
        path = self.others["retain_model"]
        if path is None:
            raise Missing("no retain-only model is given (retain_model.path)")
        return self.other(path)

    def base_model(self) -> Model:
        path = self.others["base_model"]
        if path is None:
            raise Missing("the model before unlearning is not known (base_model.path)")
        try:
            return self.other(path)
        except UserError as error:  # it was not named but found in the result of the run that trained it further
            raise Missing(f"the model before unlearning is not there any more (base_model.path): {error}") from error


def as_single(config: RunConfig, path: str) -> list[str]:
    """The overrides of a command that would evaluate this one of several models by itself."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    kept = [
        override for override in overrides if override.partition("=")[0].lstrip("+~") not in ("models", "model.path")
    ]
    return [*kept, f"model.path={portable(path, config.models_dir)}"]


def fill_from_run(cfg: DictConfig, made_by: dict | None) -> None:
    """Give the keys that are null in `model`, `data` and `evaluation` the values of the run that made the checkpoint, in place.

    Single splits and columns of that run's data that the command names stand beside the others.

    Raises:
        UserError: when a value is needed and no run of ours made the checkpoint.
    """
    needed = {"model": ["prompt"], "data": ["path", "splits", "columns"]}
    if made_by and cfg.data.path is None:
        for key in ("splits", "columns"):
            cfg.data[key] = {**made_by["data"][key], **(cfg.data[key] or {})}
    if cfg.evaluation.bf16 is None:
        cfg.evaluation.bf16 = made_by["evaluation"].get("bf16", "auto") if made_by else "auto"
    for section, keys in needed.items():
        empty = [key for key in keys if cfg[section].get(key) is None]
        if empty and made_by is None:
            raise UserError(
                f"{section}.{', '.join(empty)}: not given, and {cfg.model.path} has no result.json of a run to take it from; "
                "name a model and a data set, for instance model=phi data=tofu"
            )
        with open_dict(cfg):
            for key in empty:
                cfg[section][key] = made_by[section][key]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        evaluate(cfg)


if __name__ == "__main__":
    launch(main)
