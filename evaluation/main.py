"""Evaluate checkpoints: what they still know.

    python evaluation/main.py -cd=configs -cn=evaluate model.path=models/unlearned/PMC-unlearn-tiny/seed-0
    python evaluation/main.py -cd=configs -cn=evaluate metrics=full "models=[models/finetuned/tiny/seed-0,FOLDER]"

Writes models/evaluated/<recipe>/<seed and overrides>/ for each model: result.json, generations.jsonl, samples.jsonl,
rows.jsonl and report.md; several models also get a report that compares them. The prompt format and the data are those of
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
from common.runs import RunFolder, comparable_config, run_folder, with_portable_paths
from evaluation.context import EvaluatedModel, EvaluationContext, Loader
from evaluation.inputs import fill_from_run, named_models, overrides_for, read_evaluation
from evaluation.metrics.headline import HIGHER_IS_BETTER
from evaluation.metrics.registry import check_inputs, chosen_groups, measure_groups
from evaluation.scores import Missing
from evaluation.tables import headline_table, score_table
from generation.cuda_graphs import use_cuda_graphs


def evaluate(cfg: DictConfig) -> dict[str, Path]:
    """Run the stage; returns the folder of each model's result.

    Raises:
        UserError: for whatever is wrong with the configuration, the data or a model.
    """
    loader = Loader()
    jobs = {
        name: Job(cfg, path, loader) for name, path in named_models(cfg).items()
    }  # all are checked before the first runs
    folders = {name: job.run() for name, job in jobs.items()}
    if is_first_process():
        (job, *_) = jobs.values()
        show_report(run_folder("evaluated", job.config) if cfg.models else job.folder, folders)
    return folders


def show_report(folder: Path, folders: dict[str, Path]) -> None:
    """Write the models' scores side by side into report.md, and print them."""
    results = {name: result_of(of_model) for name, of_model in folders.items()}
    only_headline = all(result["scores"].keys() <= HIGHER_IS_BETTER.keys() for result in results.values())
    shown = headline_table(results) if only_headline else score_table(results)
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
        loader: of the command's models.
    Raises:
        UserError: for whatever is wrong with its configuration, or for a named model that does not exist.
    """

    def __init__(self, cfg: DictConfig, path: str, loader: Loader):
        several, cfg = cfg.models is not None, cfg.copy()
        cfg.models, cfg.model.path = None, path
        self.path = resolve_path(path)
        if looks_local(path) and not Path(self.path).exists():
            raise UserError(f"model.path={path}: no such folder")
        made_by = result_of(self.path) or {}
        fill_from_run(cfg, made_by.get("config"))
        self.config = read_evaluation(cfg)
        use_cuda_graphs(self.config.generation.cuda_graphs)
        self.groups = chosen_groups(cfg.metrics)
        check_inputs(self.config, self.groups)
        self.folder = run_folder("evaluated", self.config, overrides_for(path, self.config) if several else None)
        self.loader = loader
        self.model = loader.open(self.config, dataclasses.replace(self.config.model, path=self.path))
        self.others: dict[str, str | None] = {}
        for name in ("retain_model", "base_model"):
            other = self.config.sections[name].path
            self.others[name] = other and resolve_path(other)
            try:
                _ = other and self.open_other(name)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        self.others["base_model"] = self.others["base_model"] or started_from(self.path)
        self.identity = comparable_config(cfg, made_by.get("id"))
        self.identity["compared_to"] = {
            name: with_portable_paths({"path": other, "id": (result_of(other) or {}).get("id")}, self.config.models_dir)
            for name, other in self.others.items()
            if other
        }

    def run(self) -> Path:
        """Measure the model, unless that was done in the same way before; returns the folder of its result."""
        run = RunFolder(self.folder, self.identity, self.path)
        if not self.config.overwrite and run.is_done():
            return run.folder
        context = EvaluationContext(self.config, self.loader, self.model, self.retain_model, self.base_model)
        scores = measure_groups(context, self.groups)
        write_result(run.open(fresh=True), scores.as_result(), scores.row_files(), self.identity)
        return run.publish()

    def open_other(self, name: str) -> EvaluatedModel:
        """A model to compare to, opened with the settings of the evaluated one."""
        of_its_own = {"revision": None, "gguf_file": None, "lora": None, "made_by": None}
        return self.loader.open(
            self.config, dataclasses.replace(self.config.model, path=self.others[name], **of_its_own)
        )

    def retain_model(self) -> EvaluatedModel:
        if self.others["retain_model"] is None:
            raise Missing("no retain-only model is given (retain_model.path)")
        return self.open_other("retain_model")

    def base_model(self) -> EvaluatedModel:
        if self.others["base_model"] is None:
            raise Missing("the model before unlearning is not known (base_model.path)")
        try:
            return self.open_other("base_model")
        except UserError as error:  # the path is not the user's but from the result of the run that trained it further
            raise Missing(f"the model before unlearning is not there any more (base_model.path): {error}") from error


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        evaluate(cfg)


if __name__ == "__main__":
    launch(main)
