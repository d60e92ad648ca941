"""Evaluate checkpoints: measure how much of the forget set they still reproduce, and how well they answer the rest.

    python evaluation/main.py -cd=configs -cn=evaluate model.path=models/unlearned/PMC-unlearn-tiny/seed-0
    python evaluation/main.py -cd=configs -cn=evaluate model=phi data=tofu model.path=microsoft/phi-1_5
    python evaluation/main.py -cd=configs -cn=evaluate metrics=full "models=[models/finetuned/tiny/seed-0,FOLDER]"

The folder models/evaluated/<recipe>/<seed and overrides>/ of each model gets result.json, generations.jsonl, samples.jsonl,
rows.jsonl and report.md. For several models, one report compares them all. The prompt format and the data are those of the
run that made the checkpoint, unless the command sets others.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from common.cli import check_recipe, job_errors, launch
from common.command import resolve_checkpoint, this_command
from common.config import problem_list
from common.errors import UserError, naming
from common.files import CONFIGS, is_first_process, resolve_path, write_text
from common.results import checkpoint_id, evaluation_inputs, headline_scores, result_of, write_result
from common.rouge import use_words
from common.runs import RunFolder, comparable_config, flattened, run_folder, with_portable_paths
from evaluation.context import EvaluationContext, Loader, model_before, revision_before
from evaluation.inputs import (
    check_base_model,
    check_retain_model,
    fill_from_run,
    named_models,
    overrides_for,
    read_evaluation,
)
from evaluation.metrics.registry import METRIC_GROUPS, check_inputs, chosen_groups, inputs_of_groups, measure_groups
from evaluation.plots import plot_relearning, relearning_curves
from evaluation.report import report_sweep
from evaluation.run_records import shown_value
from evaluation.scores import Missing
from evaluation.tables import as_text, headline_table, score_table
from generation.sampler import use_engine

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Path]:
    """Evaluate every model of the command; returns name -> folder of the result.

    Raises:
        UserError: when the configuration, the data or a model cannot be used.
    """
    loader = Loader()
    # All inputs are checked before the first model is measured.
    jobs = {name: Job(cfg, path, loader) for name, path in named_models(cfg).items()}
    check_same_inputs({name: job.identity for name, job in jobs.items()}, next(iter(jobs.values())).groups)
    folders = {}
    for number, (name, job) in enumerate(jobs.items(), 1):
        log.info("model %d of %d: %s", number, len(jobs), name)
        folders[name] = job.run()
    if is_first_process():
        job = next(iter(jobs.values()))
        table = headline_table if job.groups == ["headline"] else score_table
        show_report(run_folder("evaluated", job.config) if cfg.models else job.folder, folders, table)
    return folders


def check_same_inputs(identities: dict[str, dict[str, Any]], groups: Sequence[str]) -> None:
    """Check that one table would have scores of the same data, measured in the same way. Another prompt is warned of.

    Args:
        identities: name of the model -> configuration of its evaluation.
        groups: the metric groups; splits that none of them reads may differ.
    Raises:
        UserError: names each key with its values.
    """
    read = {role for name in groups for role in METRIC_GROUPS[name].roles}
    inputs = {name: dict(flattened(evaluation_inputs(identity))) for name, identity in identities.items()}
    for name, identity in identities.items():
        inputs[name] |= inputs_of_groups(identity, groups)
    problems, of_splits = [], re.compile(r"data\.(splits|files)\.")
    for key in sorted({key for of_model in inputs.values() for key in of_model}):
        values = {name: shown_value(of_model.get(key)) for name, of_model in inputs.items()}
        if len(set(values.values())) == 1 or (of_splits.match(key) and key.rpartition(".")[2] not in read):
            continue
        shown = ", ".join(f"{value} of {name}" for name, value in values.items())
        if key.startswith("model.prompt"):
            log.warning("%s: the models are asked in different ways (%s)", key, shown)
        elif key == "model.dtype":
            log.warning("%s: the models are measured in different types (%s)", key, shown)
        else:
            problems.append(f"{key}: the models were made with different values ({shown}); give one in the command")
    if problems:
        raise UserError(problem_list(problems))


def show_report(folder: Path, folders: dict[str, Path], table: Callable[[dict[str, dict]], str]) -> None:
    """Write a table of the models' scores to report.md, and print it. If there are relearning curves, they are drawn."""
    results = {name: result_of(of_model) for name, of_model in folders.items()}
    shown, picture = table(results) + different_bases(results), ""
    folder.mkdir(parents=True, exist_ok=True)
    if curves := relearning_curves(results):
        plot_relearning(curves, folder / "relearning.png")
        picture = "\n![Forget recall after relearning](relearning.png)\n"
    write_text(folder / "report.md", f"# Evaluation\n\n{shown}\n{picture}")
    print(f"{shown}\n")
    for name, of_model in folders.items():
        print(f"Result of {name}: {of_model / 'result.json'}")
    print(f"Report: {folder / 'report.md'}")


def different_bases(results: dict[str, dict]) -> str:
    """A line that names the model before unlearning of each model, if they are not the same and scores depend on it."""
    compared = {name: result["config"]["compared_to"] for name, result in results.items()}
    bases = {name: others.get("base_model", {}).get("path") for name, others in compared.items()}
    groups = {score.partition("/")[0] for result in results.values() for score in result["scores"]}
    if len(set(bases.values())) == 1 or not any(
        group.reads_base_model for name, group in METRIC_GROUPS.items() if name in groups
    ):
        return ""
    named = "; ".join(f"{as_text(name)}: {as_text(base or 'not known')}" for name, base in bases.items())
    return f"\n\nThe models are compared to different models before unlearning (base_model.path): {named}."


class Job:
    """The evaluation of one model.

    Args:
        cfg: configuration of the command.
        path: folder or hub id of the model.
        loader: opens the models, and is shared by all jobs of the command.
    Raises:
        UserError: when the configuration is invalid, or a model that it names does not exist.
    """

    def __init__(self, cfg: DictConfig, path: str, loader: Loader):
        several, cfg = cfg.models is not None, cfg.copy()
        cfg.models, cfg.model.path = None, path
        self.path = resolve_checkpoint(path, "model.path")
        made_by = result_of(self.path) or {}
        fill_from_run(cfg, made_by.get("config"))
        self.config = read_evaluation(cfg)
        use_engine(self.config.generation)
        self.groups = chosen_groups(cfg.metrics)
        check_inputs(self.config, self.groups)
        self.folder = run_folder("evaluated", self.config, overrides_for(path, self.config) if several else None)
        model = loader.open(self.config, dataclasses.replace(self.config.model, path=self.path))
        sections = {name: self.config.sections[name] for name in ("retain_model", "base_model")}
        others = {name: resolve_path(section.path) for name, section in sections.items() if section.path}
        self.context = EvaluationContext(self.config, loader, model, others)
        for name in others:
            with naming(name):
                self.context.open_other(name)
        if "base_model" in others:
            check_base_model(self.path, others["base_model"])
        else:
            try:
                if start := model_before(self.path):
                    others["base_model"] = start
                    self.context.revisions["base_model"] = revision_before(self.path)
            except Missing as missing:
                self.context.unknown["base_model"] = str(missing)
        if "retain_model" in others:
            check_retain_model(self.config, others["retain_model"])
        self.identity = comparable_config(cfg, checkpoint_id(self.path))
        self.identity["compared_to"] = {
            name: with_portable_paths({"path": other, "id": checkpoint_id(other)}, self.config.models_dir)
            | ({"revision": revision} if (revision := self.context.revisions.get(name)) else {})
            for name, other in others.items()
        }

    def run(self) -> Path:
        """Measure the model, unless its folder has an up-to-date result; returns the folder."""
        run = RunFolder(self.folder, self.identity, self.path, overwrite=self.config.overwrite)
        with run.locked(), use_words(self.config.data.words):
            if not run.is_done():
                scores = measure_groups(self.context, self.groups)
                command = this_command("evaluation", self.config.models_dir)
                write_result(run.open(), scores.as_result(), scores.row_files(), self.identity, command=command)
                run.publish()
        return run.folder


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> list[float] | None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        check_recipe(cfg, "evaluation/main.py")
        folders = list(evaluate(cfg).values())
        return headline_scores(folders[0]) if len(folders) == 1 else None


if __name__ == "__main__":
    launch(main, after_sweep=report_sweep)
