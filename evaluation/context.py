"""The evaluated model and the models that it is compared to. Only one model's weights are in memory at a time."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.config import ModelConfig, RunConfig
from common.data import Row, load_split
from common.errors import UserError
from common.files import resolve_path
from common.model import has_tokenizer, load_model, load_tokenizer
from common.model_checks import check_positions
from common.prompts import PromptFormat
from common.results import checkpoint_id, is_unlearned, recorded_config, started_from
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Missing


@dataclass
class EvaluatedModel:
    """A checkpoint with its tokenizer and its outputs.

    Attributes:
        cache: further values that a metric group computes once per model.
    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    outputs: ModelOutputs
    cache: dict[str, Any] = field(default_factory=dict)


class Loader:
    """Opens the models of a command, each once, and keeps their outputs. Loading weights frees those of the previous model."""

    def __init__(self):
        self._opened: dict[str, EvaluatedModel] = {}
        self._loaded: tuple[ModelConfig, PreTrainedModel] | None = None

    def open(self, config: RunConfig, model: ModelConfig) -> EvaluatedModel:
        """Open a checkpoint; its weights are loaded when an output is first needed.

        Raises:
            UserError: when there is no checkpoint at the path.
        """
        key = repr((model, config.evaluation, config.data))
        if key not in self._opened:
            tokenizer = load_tokenizer(model)
            prompts = PromptFormat(tokenizer, model.prompt)

            def load() -> PreTrainedModel:
                loaded = self.shared(model, tokenizer)
                check_positions(loaded, config)
                return loaded

            outputs = ModelOutputs(load, prompts, config.evaluation, config.data.max_length)
            self._opened[key] = EvaluatedModel(model, tokenizer, outputs)
        return self._opened[key]

    def shared(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model with its weights as on disk. All callers share it, so none may change it."""
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = (config, self.fresh(config, tokenizer))
        return self._loaded[1]

    def fresh(
        self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, trainable: bool = False
    ) -> PreTrainedModel:
        """A newly loaded copy, which the caller may change."""
        self.clear()
        return load_model(config, tokenizer, trainable).to(PartialState().device)

    def clear(self) -> None:
        """Free the weights, also those in reference cycles, such as a Trainer with its model and its optimizer."""
        self._loaded = None
        gc.collect()


@dataclass
class EvaluationContext:
    """The inputs of a metric group.

    Attributes:
        config: the evaluation's configuration; `config.sections` has the settings of the metric groups.
        loader: loads fresh copies of a model.
        model: the evaluated model.
        others: name -> path of the models that it is compared to: `retain_model`, finetuned without the forget set, and
            `base_model`, the model before unlearning.
        revisions: name -> revision of one of these models on the hub, if it is not the newest.
        unknown: name -> why the path of one of these models is not known.
    """

    config: RunConfig
    loader: Loader
    model: EvaluatedModel
    others: dict[str, str]
    revisions: dict[str, str | None] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    _rows: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def outputs(self) -> ModelOutputs:
        return self.model.outputs

    def rows(self, role: str) -> list[Row]:
        """The rows of the split that is configured for a role.

        Raises:
            Missing: when no split is configured for it.
            UserError: when the split does not exist.
        """
        if self.config.data.splits.get(role) is None:
            raise Missing(f"data.splits.{role} is not given")
        if role not in self._rows:
            self._rows[role] = load_split(self.config.data, role)
        return self._rows[role]

    def find_retain_model(self) -> EvaluatedModel:
        """The model finetuned without the forget set; raises Missing when none is given."""
        if "retain_model" not in self.others:
            raise Missing("no retain-only model is given (retain_model.path)")
        return self.open_other("retain_model")

    def find_base_model(self) -> EvaluatedModel:
        """The model before unlearning; raises Missing when it is unknown or cannot be loaded."""
        if "base_model" not in self.others:
            raise Missing(self.unknown.get("base_model", "the model before unlearning is not known (base_model.path)"))
        try:
            return self.open_other("base_model")
        except UserError as error:  # the path is not in the command: it was read from a result.json
            raise Missing(f"the model before unlearning cannot be loaded (base_model.path): {error}") from error

    def open_other(self, name: str) -> EvaluatedModel:
        """Open a model to compare to, with the settings of the evaluated model, except those that describe its files.

        One without a tokenizer gets that of the evaluated model.
        """
        own, path = self.config.model, self.others[name]
        of_files = dict.fromkeys(("gguf_file", "lora", "made_by", "tokenizer"))
        of_files["revision"] = self.revisions.get(name)
        if not has_tokenizer(resolve_path(path)):
            of_files["tokenizer"] = own.tokenizer or own.path
        return self.loader.open(self.config, replace(own, path=path, **of_files))


def trained_from(path: str) -> Iterator[tuple[str, str, str | None]]:
    """The trainings that led from the model before unlearning to an unlearned one, the last first.

    Yields:
        The trained model, the checkpoint that it started from, as a path or a hub id, and that one's id, if it was recorded.
    """
    while start := started_from(path):
        yield path, start, recorded_config(path).get("start")
        if not is_unlearned(start):
            return
        path = start


def revision_before(path: str) -> str | None:
    """The revision of `model_before` on the hub; None if it is a folder, or the newest one."""
    *_, (trained, start, _) = trained_from(path)
    return None if Path(start).exists() else recorded_config(trained).get("model", {}).get("revision")


def model_before(path: str) -> str | None:
    """The checkpoint that the model was trained from, as a path or a hub id; None if it is not recorded.

    If that one was itself unlearned, it is the first one before it that was not.

    Raises:
        Missing: when a folder on the way has another result than at the time of that training.
    """
    start = None
    for trained, start, recorded in trained_from(path):
        if recorded and Path(start).exists() and checkpoint_id(start) != recorded:
            raise Missing(
                f"{start} was trained again or replaced since {trained} was trained from it; base_model.path names the model "
                "before unlearning"
            )
    return start
