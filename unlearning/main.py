"""Make a finetuned model forget: by PMC, or by any method that configs/method/ names.

    python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny
    python unlearning/main.py -m -cd=configs -cn=PMC-unlearn-tiny method.lambda_unlearning=0.5,1.5 method.num_samples=2,5

Writes models/unlearned/<recipe>/<seed and overrides>/: the checkpoint, result.json, generations.jsonl, history.jsonl and
the report, with the results of the vanilla and the finetuned model beside them.
"""

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

from dataclasses import asdict, replace

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from transformers import set_seed

from common.cli import job_errors, launch
from common.config import ModelConfig, PromptConfig, RunConfig, read_config
from common.data import load_splits
from common.errors import UserError
from common.files import CONFIGS, ROOT, is_first_process, looks_local, resolve_path
from common.model import load_model, load_tokenizer
from common.prompts import PromptFormat, check_prompt_lengths
from common.results import copy_result, result_of, stored_result
from common.runs import RunFolder, comparable_config, run_folder, with_portable_paths
from common.trainer import training_arguments
from evaluation.during_training import Evaluator
from evaluation.report import write_report
from generation.cuda_graphs import use_cuda_graphs
from unlearning.trainer import UnlearningData, UnlearningTrainer


def unlearn(cfg: DictConfig) -> Path:
    """Run the stage; returns the run's folder.

    Raises:
        UserError: for whatever is wrong with the configuration, the data or the model, before training starts.
    """
    method = method_class(cfg)
    config = read_config(cfg, method.Settings, also=("finetuned",))
    use_cuda_graphs(config.generation.cuda_graphs)
    config = replace(config, model=start_checkpoint(config, str(cfg.finetuned)))
    start = result_of(config.model.path) or {}
    run = RunFolder(run_folder("unlearned", config), comparable_config(cfg, start.get("id")), config.model.path)
    if not config.overwrite and run.is_done():
        show_report(run.folder)
        return run.folder
    tokenizer = load_tokenizer(config.model)
    rows = load_splits(config.data, ("forget", "retain"))
    prompts = PromptFormat(tokenizer, config.model.prompt)
    data = UnlearningData(rows["forget"], rows["retain"], prompts, config.data.max_length)
    prompt_ids = {role: [prompts.prompt(row.question) for row in split] for role, split in rows.items()}
    for ids in prompt_ids.values():
        check_prompt_lengths(ids, config.data.max_length, "data.max_length")
    if hasattr(config.settings, "max_length"):
        check_prompt_lengths(prompt_ids["forget"], config.settings.max_length, "method.max_length")
    evaluator = Evaluator(config, prompts, run.configuration)
    args = training_arguments(config, run.work, len(data.forget))
    set_seed(config.seed)
    model = load_model(config.model, tokenizer, trainable=True)
    work = run.open(fresh=config.overwrite)
    trainer = method(model, args, data, config.settings)
    if config.evaluation.start:
        vanilla = Path(config.model.path) / "vanilla"
        if stored_result(vanilla, run.configuration):
            copy_result(vanilla, work / "vanilla")
        evaluator.start(work / "finetuned", config.model.path, trainer.model)
    if config.evaluation.every_epochs:
        trainer.evaluate_model, trainer.evaluate_every = evaluator.headline, config.evaluation.every_epochs
    trainer.train_or_resume()
    evaluator.finish(trainer, work, stage="unlearning")
    if is_first_process():
        write_report(work, method.__name__)
    run.publish(config.keep_checkpoints)
    show_report(run.folder)
    return run.folder


def method_class(cfg: DictConfig) -> type[UnlearningTrainer]:
    """The class that `method._target_` names.

    Raises:
        UserError: when there is none, or it is no unlearning method.
    """
    target = cfg.get("method", {}).get("_target_")
    try:
        found = hydra.utils.get_class(target)
    except (HydraException, ValueError, ImportError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"method._target_={target}: no such class ({reason}); see configs/method/") from error
    if not (issubclass(found, UnlearningTrainer) and hasattr(found, "Settings")):
        raise UserError(f"method._target_={target}: not a subclass of UnlearningTrainer with a Settings dataclass")
    return found


def start_checkpoint(config: RunConfig, finetuned: str) -> ModelConfig:
    """The model section with the finetuned checkpoint as its path.

    Raises:
        UserError: when there is no such folder, or its run used another data set, base model or prompt than this one.
    """
    path, command = resolve_path(finetuned), finetuning_command(finetuned)
    beside = sorted(folder.name for folder in Path(resolve_path(str(Path(finetuned).parent))).glob("seed-*"))
    there = f" (there: {', '.join(beside)}; name one with finetuned=FOLDER)" if beside else ""
    if looks_local(finetuned) and not Path(path).exists():
        remedy = f"; make it with: {command}" if command else "; name the folder of a finetuned model, or a hub id"
        raise UserError(f"finetuned={finetuned}: no such folder{remedy}{there}")
    if differing := differences_from_finetuning(config, path):
        raise UserError(
            f"finetuned={finetuned}: was made with other settings than this run has: {'; '.join(differing)}. "
            f"Give this run the same, or finetune with these{there or ' and name that folder with finetuned=FOLDER'}"
        )
    return replace(config.model, path=path, made_by=command, gguf_file=None, revision=None, new=None)


def finetuning_command(path: str) -> str | None:
    """The command that writes <models_dir>/finetuned/<recipe>/seed-<seed>; None for other paths and other people's recipes."""
    match = re.fullmatch(r"(?:(.*)/)?finetuned/([^/]+)/seed-(\d+)/?", path)
    if not match or not (CONFIGS / f"{match[2]}.yaml").exists():
        return None
    models_dir = "" if match[1] in ("models", f"{ROOT}/models") else f" models_dir={match[1] or '.'}"
    return f"python finetuning/main.py -cd=configs -cn={match[2]} seed={match[3]}{models_dir}"


def differences_from_finetuning(config: RunConfig, path: str) -> list[str]:
    """The settings that unlearning must share with the run that made a checkpoint and does not, each with both values.

    None for a checkpoint made elsewhere. Seeds in paths may differ.
    """
    recorded = (result_of(path) or {}).get("config")
    if recorded is None:
        return []

    def normalized(place: str | None) -> str:
        return resolve_path(re.sub(r"/seed-\d+", "", with_portable_paths(str(place), config.models_dir)))

    theirs = {"data.path": recorded["data"]["path"], "model.path": recorded["model"]["path"]}
    ours = {"data.path": config.data.path, "model.path": config.model.path}
    differing = {key for key in ours if normalized(theirs[key]) != normalized(ours[key])}
    for key, value in asdict(config.model.prompt).items():
        name = f"model.prompt.{key}"
        theirs[name], ours[name] = (
            recorded["model"]["prompt"].get(key, getattr(PromptConfig(style="plain"), key)),
            value,
        )
        differing |= {name} if theirs[name] != value else set()
    return [f"{key}={theirs[key]} there, {ours[key]} here" for key in sorted(differing)]


def show_report(folder: Path) -> None:
    """Print the report's table and where the rest is."""
    if not is_first_process():
        return
    print((folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0])
    print(f"Report: {folder / 'report.md'}")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="unlearn")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        unlearn(cfg)


if __name__ == "__main__":
    launch(main)
