"""The headline scores in the training stages: of the model that training starts from, during training, and at the end."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from common.checkpoints import save_trained
from common.command import this_command
from common.config import RunConfig
from common.files import resolve_path, write_json_lines
from common.prompts import PromptFormat, check_prompt_lengths
from common.results import copy_result, result_of, stored_result, write_result
from common.trainer import ResumableTrainer
from evaluation.metrics.headline import check_questions_fit, load_questions, score_outputs
from evaluation.model_card import write_model_card
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Scores

CHECKED_PROMPTS = 4  # prompts on which a saved model is compared with the trained one
log = logging.getLogger(__name__)


class Evaluator:
    """Computes the headline scores of a run's models and writes them.

    Args:
        config: the run's configuration.
        prompts: the models' prompt format.
        identity: the run's configuration in result.json, from `common.runs.comparable_config`.
    Raises:
        UserError: when a split is missing or a prompt leaves no room for an answer.
    """

    def __init__(self, config: RunConfig, prompts: PromptFormat, identity: dict[str, Any]):
        self.config = config
        self.prompts = prompts
        self.identity = identity
        self.questions = load_questions(config.data, config.evaluation)
        self.prompt_ids = [prompts.prompt(question.question) for question in self.questions]
        check_prompt_lengths(self.prompt_ids, config.evaluation.max_length, "evaluation.max_length")
        check_questions_fit(prompts, self.questions, config.evaluation.max_length)

    def evaluate(self, model: PreTrainedModel) -> Scores:
        """The headline scores of the model's greedy answers."""
        started = time.perf_counter()
        outputs = ModelOutputs(lambda: model, self.prompts, self.config.evaluation, self.config.data.max_length)
        scores = score_outputs(outputs, self.questions)
        scores.seconds = {"evaluation": time.perf_counter() - started}
        return scores

    def headline(self, model: PreTrainedModel) -> dict[str, float]:
        """Only the two headline scores, for checks during training."""
        values = self.evaluate(model).values
        return {name: values[name] for name in ("unlearn_quality", "utility")}

    def start(self, folder: Path, checkpoint: str | Path, model: PreTrainedModel) -> None:
        """Write the results of the model that training starts from to `folder`.

        If the checkpoint's own folder has results of the same evaluation, they are copied.
        """
        if result_of(folder):
            return
        if stored_result(checkpoint, self.identity):
            copy_result(checkpoint, folder)
            return
        log.info("evaluating the model that training starts from")
        self._write(folder, folder.name, self.evaluate(model))

    def finish(self, trainer: ResumableTrainer, folder: Path, stage: str) -> None:
        """Evaluate the trained model; write weights, history, result and model card to `folder`."""
        with trainer.whole_model() as model:
            scores = self.evaluate(model)
            if self.config.save_model:
                checked = self.prompt_ids[:CHECKED_PROMPTS]
                save_trained(model, trainer.processing_class, folder, self.config.model, checked)
        for name, rows in trainer.row_files().items():
            write_json_lines(folder / name, rows)
        spent = trainer.seconds
        stage_seconds = spent["training"] + spent.get("sampling", 0.0)
        evaluation_seconds = spent.get("evaluation", 0.0) + scores.seconds["evaluation"]
        scores.seconds = {**spent, stage: stage_seconds, "evaluation": evaluation_seconds}
        start = self.config.model.path and resolve_path(self.config.model.path)
        # a relative path: both folders can be moved together
        recorded = os.path.relpath(start, folder.parent) if start and Path(start).exists() else start
        command = this_command(stage, self.config.models_dir)
        self._write(folder, stage, scores, started_from=recorded, command=command)
        if self.config.save_model:
            write_model_card(folder, stage, start)

    def _write(self, folder: Path, name: str, scores: Scores, **made_by: str | None) -> None:
        write_result(folder, scores.as_result(), scores.row_files(), self.identity, **made_by)
        values = scores.values
        log.info("%s: unlearn quality %.1f, utility %.1f", name, values["unlearn_quality"], values["utility"])
