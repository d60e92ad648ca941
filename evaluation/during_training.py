"""The headline scores that the training stages compute: of the model they start from, while training, and at the end."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from common.checkpoints import save_trained
from common.config import RunConfig
from common.files import resolve_path, write_json_lines
from common.prompts import PromptFormat, check_prompt_lengths
from common.results import HISTORY, copy_result, result_of, stored_result, write_result
from common.trainer import ExampleTrainer
from evaluation.metrics.headline import load_questions, score_outputs
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Scores

log = logging.getLogger(__name__)


class Evaluator:
    """Computes the headline scores on one run's questions and writes them.

    Args:
        config: the run's configuration.
        prompts: the models' prompt format.
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

    def evaluate(self, model: PreTrainedModel) -> Scores:
        """The headline scores of the model's greedy answers."""
        started = time.perf_counter()
        outputs = ModelOutputs(lambda: model, self.prompts, self.config.evaluation, self.config.data.max_length)
        scores = score_outputs(outputs, self.questions)
        scores.seconds = {"evaluation": time.perf_counter() - started}
        return scores

    def headline(self, model: PreTrainedModel) -> dict[str, float]:
        """The two headline scores alone, for a check while training."""
        values = self.evaluate(model).values
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
        self._write(folder, folder.name, self.evaluate(model))

    def finish(self, trainer: ExampleTrainer, folder: Path, stage: str) -> None:
        """Evaluate the trained model and write weights, history and result into `folder`."""
        scores = self.evaluate(trainer.model)
        if self.config.save_model:
            save_trained(trainer, folder, merge=bool(self.config.model.lora and self.config.model.lora.merge))
        write_json_lines(folder / HISTORY, trainer.history)
        spent = trainer.seconds
        stage_seconds = spent["training"] + spent.get("sampling", 0.0)
        evaluation_seconds = spent.get("evaluation", 0.0) + scores.seconds["evaluation"]
        scores.seconds = {**spent, stage: stage_seconds, "evaluation": evaluation_seconds}
        start = self.config.model.path and resolve_path(self.config.model.path)
        if start and Path(start).exists():  # relative to the run's folder, so that both can move together
            start = os.path.relpath(start, folder.parent)
        self._write(folder, stage, scores, start)

    def _write(self, folder: Path, name: str, scores: Scores, started_from: str | None = None) -> None:
        write_result(folder, scores.as_result(), scores.row_files(), self.identity, started_from)
        values = scores.values
        log.info("%s: unlearn quality %.1f, utility %.1f", name, values["unlearn_quality"], values["utility"])
