"""Unlearn the forget rows from a finetuned model, with PMC or another method of configs/method/.

    python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny
    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=npo
    python unlearning/main.py -m -cd=configs -cn=PMC-unlearn-tiny method.lambda_unlearning=0.5,1.5 method.num_samples=2,5

Writes to models/unlearned/<recipe>/<seed and overrides>/: the checkpoint, result.json, generations.jsonl, history.jsonl
and the report, and in vanilla/ and finetuned/ the results of the models before finetuning and before unlearning.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

from dataclasses import replace

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from common.cli import check_recipe, job_errors, launch
from common.config import RunConfig, fields_of, read_config
from common.data import load_splits
from common.errors import UserError, reason
from common.files import CONFIGS, is_first_process
from common.hub import check_push, push_if_wanted
from common.job import is_in_sweep, typed_overrides
from common.model import load_model, load_tokenizer
from common.model_checks import check_positions
from common.prompts import PromptFormat, check_rows_fit, warn_if_cut
from common.results import copy_result, headline_scores, stored_result
from common.rouge import use_words
from common.runs import RunFolder, training_run
from common.sweeps import utility_floor
from common.training_arguments import training_arguments
from evaluation.during_training import Evaluator
from evaluation.report import report_sweep, write_page
from evaluation.run_report import write_report
from generation.sampler import use_engine
from unlearning.start_checkpoint import start_checkpoint, warn_unless_unlearned
from unlearning.trainer import UnlearningData, UnlearningTrainer


def unlearn(cfg: DictConfig) -> Path:
    """Run the stage; returns the run's folder.

    Raises:
        UserError: for an error in the configuration, the data or the model; before training starts.
    """
    method = method_class(cfg)
    check_settings_are_of_the_method(cfg, method)
    config = read_config(cfg, method.Settings, also=("finetuned",))
    use_engine(config.generation)
    config = replace(config, model=start_checkpoint(config, str(cfg.finetuned)))
    if method.starts_unlearned:
        warn_unless_unlearned(config.model.path)
    check_push(cfg, config)
    run = training_run("unlearned", cfg, config)
    with run.locked(), use_words(config.data.words):
        if not run.is_done():
            train(run, method, config)
        show_report(run.folder)
        push_if_wanted(run.folder, config)
    return run.folder


def train(run: RunFolder, method: type[UnlearningTrainer], config: RunConfig) -> None:
    """Unlearn, evaluate and publish the model."""
    tokenizer = load_tokenizer(config.model)
    rows = load_splits(config.data, ("forget", "retain"))
    prompts = PromptFormat(tokenizer, config.model.prompt)
    data = UnlearningData(rows["forget"], rows["retain"], prompts, config.data.max_length)
    check_rows_fit(prompts, data.forget + data.retain, config.data.max_length, "data.max_length")
    pairs = [row.pair for row in data.forget + data.retain]
    warn_if_cut(prompts, pairs, config.data.max_length, "data.max_length", given=True)
    if hasattr(config.settings, "max_length"):
        check_rows_fit(prompts, data.forget, config.settings.max_length, "method.max_length")
    evaluator = Evaluator(config, prompts, run.configuration)
    args = training_arguments(config, run.work, len(data.forget))
    set_seed(config.seed)
    model = load_model(config.model, tokenizer, trainable=True)
    check_positions(model, config)
    work = run.open()
    trainer = method(model, args, data, config.settings)
    if config.evaluation.start:
        vanilla = Path(run.start) / "vanilla"
        if stored_result(vanilla, run.configuration):
            copy_result(vanilla, work / "vanilla")
        with trainer.whole_model() as model:
            evaluator.start(work / "finetuned", run.start, model)
    if config.evaluation.every_epochs:
        trainer.evaluate_model, trainer.evaluate_every = evaluator.headline, config.evaluation.every_epochs
        trainer.min_utility = utility_floor()
    trainer.train_or_resume()
    evaluator.finish(trainer, work, stage="unlearning")
    if is_first_process():
        write_report(work, method.__name__)
    run.publish()


def method_class(cfg: DictConfig) -> type[UnlearningTrainer]:
    """Import the class named by `method._target_`.

    Raises:
        UserError: if there is no such class, or it is not an unlearning method.
    """
    method = cfg.get("method")
    target = method.get("_target_") if OmegaConf.is_dict(method) else None
    try:
        found = hydra.utils.get_class(target)
    except (HydraException, ValueError, ImportError, TypeError, AttributeError) as error:
        raise UserError(f"method._target_={target}: no such class ({reason(error)}); see configs/method/") from error
    if not (issubclass(found, UnlearningTrainer) and hasattr(found, "Settings")):
        raise UserError(f"method._target_={target}: not a subclass of UnlearningTrainer with a Settings dataclass")
    return found


def check_settings_are_of_the_method(cfg: DictConfig, method: type[UnlearningTrainer]) -> None:
    """Check that the recipe does not set keys of another method than the command line chose.

    Raises:
        UserError: names the keys.
    """
    typed = [word.lstrip("+~").partition("=")[0] for word in typed_overrides()]
    known = fields_of(method.Settings)
    others = [key for key in cfg.method if key != "_target_" and key not in known and f"method.{key}" not in typed]
    if others and "method" in typed:
        raise UserError(
            f"method: the recipe sets {', '.join(others)}, which {method.__name__} does not have; use a recipe without "
            "settings of another method, such as -cn=unlearn-tiny"
        )


def show_report(folder: Path) -> None:
    """Print the report's table and the path of the page, which is not written in a sweep: that has one on all its runs."""
    if not is_first_process():
        return
    print((folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0])
    report = folder / "report.md"
    if not is_in_sweep():
        report = write_page([folder], folder, f"{folder.parent.name}/{folder.name}")
    print(f"Report: {report}")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="unlearn")
def main(cfg: DictConfig) -> list[float]:
    with job_errors(cfg.output_dir or cfg.models_dir):
        check_recipe(cfg, "unlearning/main.py")
        return headline_scores(unlearn(cfg))


if __name__ == "__main__":
    launch(main, after_sweep=report_sweep)
