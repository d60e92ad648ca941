"""Measure what a checkpoint still knows.

    python evaluation/main.py -cd=configs -cn=evaluate model.path=models/unlearned/PMC-unlearn-tiny/seed-0

Writes models/evaluated/evaluate/<seed and overrides>/: result.json and generations.jsonl. The prompt format and the data
are those of the run that made the checkpoint unless the command names others.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from common.config import read_config
from common.model import load_model, load_tokenizer
from common.prompts import PromptFormat
from common.runs import RunFolder, identity, job_errors, result_of, run_folder
from common.runtime import CONFIGS, UserError, launch, resolve_path
from evaluation.report import table
from evaluation.result import Evaluator, write_result


def evaluate(cfg: DictConfig) -> Path:
    """Run the stage; returns the run's folder.

    Raises:
        UserError: for whatever is wrong with the configuration, the data or the model.
    """
    if OmegaConf.is_missing(cfg.model, "path"):
        raise UserError("model.path: missing; name a folder or a hub id, as in model.path=models/unlearned/...")
    made_by_run = result_of(resolve_path(str(cfg.model.path))) or {}
    fill_from_run(cfg, made_by_run.get("config"))
    config = read_config(cfg)
    run = RunFolder(
        run_folder("evaluated", config), identity(cfg, made_by_run.get("id")), resolve_path(config.model.path)
    )
    if config.overwrite or not run.is_done():
        tokenizer = load_tokenizer(config.model)
        evaluator = Evaluator(config, PromptFormat(tokenizer, config.model.prompt), run.configuration)
        model = load_model(config.model, tokenizer, trainable=False)
        evaluation = evaluator.evaluate(model)
        write_result(run.open(fresh=True), evaluation, run.configuration, {"evaluation": evaluation.seconds})
        run.publish()
    print(table({config.model.path: result_of(run.folder)}))
    print(f"\nResult: {run.folder / 'result.json'}")
    return run.folder


def fill_from_run(cfg: DictConfig, made_by: dict | None) -> None:
    """Give the keys that are null in `model` and `data` the values of the run that made the checkpoint, in place.

    Raises:
        UserError: when a value is needed and no run of ours made the checkpoint.
    """
    needed = {"model": ["prompt"], "data": ["path", "splits", "columns"]}
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
