"""Finetune a model on questions and answers, including those that unlearning will remove.

    python finetuning/main.py -cd=configs -cn=tiny
    python finetuning/main.py -cd=configs -cn=phi seed=1 training.num_epochs=3
    python finetuning/main.py -cd=configs -cn=llama3 "model.lora={r:16,alpha:32}"

Writes to models/finetuned/<recipe>/<seed and overrides>/: the checkpoint, result.json, generations.jsonl, history.jsonl,
and in vanilla/ the results of the model before training.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import hydra
from omegaconf import DictConfig
from transformers import set_seed

from common.cli import check_recipe, job_errors, launch, replace_mapping
from common.config import RunConfig, read_config
from common.data import load_rows, load_split
from common.files import CONFIGS
from common.hub import check_push, push_if_wanted
from common.model import load_model, load_tokenizer
from common.model_checks import check_positions
from common.prompts import PromptFormat, check_rows_fit, warn_if_cut
from common.results import headline_scores
from common.rouge import use_words
from common.runs import RunFolder, training_run
from common.trainer import ExampleTrainer
from common.training_arguments import training_arguments
from evaluation.during_training import Evaluator
from evaluation.report import report_sweep
from generation.sampler import use_engine


def finetune(cfg: DictConfig) -> Path:
    """Run the stage; returns the run's folder.

    Raises:
        UserError: for an error in the configuration, the data or the model; before training starts.
    """
    config = read_config(cfg)
    check_push(cfg, config)
    use_engine(config.generation)
    run = training_run("finetuned", cfg, config)
    with run.locked(), use_words(config.data.words):
        if not run.is_done():
            train(run, config)
        push_if_wanted(run.folder, config)
    return run.folder


def train(run: RunFolder, config: RunConfig) -> None:
    """Train, evaluate and publish the model."""
    rows = load_split(config.data, "train")
    tokenizer = load_tokenizer(config.model, tokenizer_texts(config))
    prompts = PromptFormat(tokenizer, config.model.prompt)
    check_rows_fit(prompts, rows, config.data.max_length, "data.max_length")
    examples = [prompts.example(row, config.data.max_length) for row in rows]
    if any(map(prompts.is_cut, examples)):  # without the check, thousands of rows would be tokenized a second time
        warn_if_cut(prompts, [row.pair for row in rows], config.data.max_length, "data.max_length", given=True)
    evaluator = Evaluator(config, prompts, run.configuration)
    args = training_arguments(config, run.work, len(examples))
    set_seed(config.seed)
    model = load_model(config.model, tokenizer, trainable=True)
    check_positions(model, config)
    work = run.open()
    trainer = ExampleTrainer(model, args, examples, tokenizer)
    if config.evaluation.start:
        with trainer.whole_model() as model:
            evaluator.start(work / "vanilla", run.start, model)
    if config.evaluation.every_epochs:
        trainer.evaluate_model, trainer.evaluate_every = evaluator.headline, config.evaluation.every_epochs
    trainer.train_or_resume()
    evaluator.finish(trainer, work, stage="finetuning")
    run.publish()


def tokenizer_texts(config: RunConfig) -> list[str]:
    """The texts for training a new model's tokenizer; empty for a model that is loaded."""
    if not config.model.new:
        return []
    rows = load_rows(config.data, " + ".join(config.model.new.tokenizer_splits), "model.new.tokenizer_splits")
    return [f"{row.question} {row.answer}" for row in rows]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="finetune")
def main(cfg: DictConfig) -> list[float]:
    with job_errors(cfg.output_dir or cfg.models_dir):
        check_recipe(cfg, "finetuning/main.py")
        replace_mapping(cfg, "model.new.settings")  # those of another architecture are no use
        return headline_scores(finetune(cfg))


if __name__ == "__main__":
    launch(main, after_sweep=report_sweep)
