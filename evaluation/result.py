"""result.json and the files beside it: what a run found, and everything that the finding depends on."""

import logging
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from common.config import RunConfig
from common.prompts import PromptFormat, check_prompt_lengths
from common.runs import RESULT, result_of
from common.runtime import (
    device_name,
    git_commit,
    is_first_process,
    package_versions,
    peak_memory_bytes,
    resolve_path,
    write_json,
    write_json_lines,
)
from common.training import ExampleTrainer, save_trained
from evaluation.headline import load_questions, note_scores
from evaluation.passes import Subject
from evaluation.scores import Scores

GENERATIONS = "generations.jsonl"
ROWS = "rows.jsonl"
SAMPLES = "samples.jsonl"
HISTORY = "history.jsonl"

log = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """The scores of one model.

    Attributes:
        scores: with what belongs to them.
        seconds: where the time went; `evaluation` is all of it.
    """

    scores: Scores
    seconds: dict[str, float]


def write_result(
    folder: Path,
    scores: Scores,
    identity: dict[str, Any],
    seconds: dict[str, float],
    started_from: str | None = None,
) -> None:
    """Write the files of single rows, then result.json: a folder with a result.json is complete.

    generations.jsonl has a row a greedy answer, samples.jsonl a row a question, rows.jsonl a row a score with the values
    that it is the mean of.

    Args:
        identity: the run's configuration, from `common.runs.identity`.
        seconds: where the time went.
        started_from: the checkpoint that was trained further: a hub id, or a path relative to the run's folder.
    """
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / GENERATIONS, scores.generations)
    if scores.samples:
        write_json_lines(folder / SAMPLES, scores.samples)
    if scores.rows:
        write_json_lines(folder / ROWS, ({"name": name, **values} for name, values in scores.rows.items()))
    write_json(
        folder / RESULT,
        {
            "scores": scores.values,
            "higher_is_better": scores.higher_is_better,
            "ideal": scores.ideal,
            "counts": scores.counts,
            "left_out": scores.left_out,
            "notes": scores.notes,
            "histograms": scores.histograms,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": device_name(),
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": package_versions(),
            "git_commit": git_commit(),
            "id": uuid.uuid4().hex,
            "started_from": started_from,
            "config": identity,
        },
    )


def started_from(folder: Path | str) -> str | None:
    """The checkpoint that the run in a folder trained further, as a path or a hub id; None where that is not known."""
    start = (result_of(folder) or {}).get("started_from")
    beside = Path(folder) / str(start)
    return str(beside.resolve()) if start and beside.exists() else start


def stored_result(folder: str | Path, identity: dict[str, Any]) -> dict | None:
    """The result in a checkpoint's folder, if it was evaluated on the same data in the same way."""
    result = result_of(folder)
    if result is None:
        return None
    same = all(_how_evaluated(result["config"])[key] == value for key, value in _how_evaluated(identity).items())
    return result if same else None


def _how_evaluated(identity: dict[str, Any]) -> dict[str, Any]:
    data, evaluation = identity["data"], identity["evaluation"]
    return {
        "data": (data["path"], {role: split for role, split in data["splits"].items() if role != "train"}),
        "evaluation": {key: evaluation.get(key) for key in ("max_length", "full_eval", "bf16")},
        "prompt": identity["model"]["prompt"],
    }


class Evaluator:
    """Evaluates models on one run's questions: the start, the model during training, and the final one.

    Args:
        config: the run's configuration.
        prompts: how the models are asked.
        identity: the run's configuration as it is written into results.
    Raises:
        UserError: when a split is missing or a prompt leaves no room for an answer.
    """

    def __init__(self, config: RunConfig, prompts: PromptFormat, identity: dict[str, Any]):
        self.config = config
        self.prompts = prompts
        self.identity = identity
        self.questions = load_questions(config.data, config.evaluation)
        ids = [prompts.prompt(question.question) for question in self.questions]
        check_prompt_lengths(ids, config.evaluation.max_length, "evaluation.max_length")

    def evaluate(self, model: PreTrainedModel) -> Evaluation:
        """Answer every question greedily and score the answers."""
        started = time.perf_counter()
        scores = Scores()
        subject = Subject(lambda: model, self.prompts, self.config.evaluation, self.config.data.max_length)
        note_scores(scores, subject, self.questions)
        return Evaluation(scores, {"evaluation": time.perf_counter() - started})

    def headline(self, model: PreTrainedModel) -> dict[str, float]:
        """The two headline scores alone, for a look while training."""
        values = self.evaluate(model).scores.values
        return {name: values[name] for name in ("unlearn_quality", "utility")}

    def start(self, folder: Path, checkpoint: str | Path, model: PreTrainedModel) -> None:
        """Put the results of the model that training starts from into `folder`.

        They are copied from the checkpoint's own folder where it was evaluated in the same way.
        """
        if result_of(folder):
            return
        if stored_result(checkpoint, self.identity):
            copy_result(checkpoint, folder)
            return
        log.info("evaluating the model that training starts from")
        evaluation = self.evaluate(model)
        write_result(folder, evaluation.scores, self.identity, evaluation.seconds)
        _log_scores(folder.name, evaluation.scores)

    def finish(self, trainer: ExampleTrainer, folder: Path, stage: str) -> None:
        """Evaluate the trained model and write weights, history and result into `folder`."""
        evaluation = self.evaluate(trainer.model)
        if self.config.save_model:
            save_trained(trainer, folder, merge=bool(self.config.model.lora and self.config.model.lora.merge))
        write_json_lines(folder / HISTORY, trainer.history)
        seconds = dict(trainer.seconds)
        seconds[stage] = seconds["training"] + seconds.get("sampling", 0.0)
        seconds["evaluation"] = seconds.get("evaluation", 0.0) + evaluation.seconds["evaluation"]
        write_result(folder, evaluation.scores, self.identity, seconds, self._start_as_seen_from(folder.parent))
        _log_scores(stage, evaluation.scores)

    def _start_as_seen_from(self, folder: Path) -> str | None:
        """The checkpoint that training started from, a folder relative to the run's, so that both can move together."""
        path = self.config.model.path and resolve_path(self.config.model.path)
        return os.path.relpath(path, folder) if path and Path(path).exists() else path


def copy_result(source: str | Path, target: Path) -> None:
    """Copy a run's result.json and generations.jsonl, the result last."""
    if not is_first_process():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in (GENERATIONS, RESULT):
        shutil.copyfile(Path(source) / name, target / name)


def _log_scores(what: str, scores: Scores) -> None:
    values = scores.values
    log.info("%s: unlearn quality %.1f, utility %.1f", what, values["unlearn_quality"], values["utility"])
