"""Measure what checkpoints still know.

    python evaluation/main.py -cd=configs -cn=evaluate model.path=models/unlearned/PMC-unlearn-tiny/seed-0
    python evaluation/main.py -cd=configs -cn=evaluate metrics=full "models=[models/finetuned/tiny/seed-0,FOLDER]"

Writes models/evaluated/<recipe>/<seed and overrides>/ for each model: result.json, generations.jsonl, samples.jsonl,
rows.jsonl and report.md; several models side by side get a report of their own. The prompt format and the data are those of
the run that made the checkpoint unless the command names others.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

import dataclasses

import hydra
from omegaconf import DictConfig

from common.cli import job_errors, launch
from common.errors import UserError
from common.files import CONFIGS, is_first_process, looks_local, resolve_path, write_text
from common.results import result_of, started_from, write_result
from common.runs import RunFolder, identity, portable, run_folder
from evaluation.context import EvaluationContext, Model
from evaluation.inputs import OpenModels, as_single, fill_from_run, named_models, read_evaluation
from evaluation.metrics import lm_eval_harness
from evaluation.metrics.headline import HIGHER_IS_BETTER
from evaluation.metrics.registry import check_data, chosen, measure
from evaluation.scores import Missing
from evaluation.tables import full_table, table
from generation.cuda_graphs import use_cuda_graphs


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
        use_cuda_graphs(self.config.generation.cuda_graphs)
        self.families = chosen(cfg.metrics)
        if "lm_eval" in self.families:
            lm_eval_harness.check(self.config.sections["lm_eval"])
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
        context = EvaluationContext(self.config, self.opened.loader, self.model, self.retain_model, self.base_model)
        evaluation = measure(context, self.families)
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


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        evaluate(cfg)


if __name__ == "__main__":
    launch(main)
