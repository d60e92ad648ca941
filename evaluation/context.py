"""One model under evaluation with what it is compared to. The weights of one model are in memory at a time."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.config import ModelConfig, RunConfig
from common.data import Row, load_split
from common.model import load_model, load_tokenizer
from common.prompts import PromptFormat
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Missing


@dataclass
class EvaluatedModel:
    """A checkpoint: where it is, its tokenizer, its outputs; `cache` holds what else a metric group stores."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    outputs: ModelOutputs
    cache: dict[str, Any] = field(default_factory=dict)


class Loader:
    """The models of a command. Each is opened once and keeps its outputs; loading weights frees the previous model's."""

    def __init__(self):
        self._opened: dict[str, EvaluatedModel] = {}
        self._loaded: tuple[ModelConfig, PreTrainedModel] | None = None

    def open(self, config: RunConfig, model: ModelConfig) -> EvaluatedModel:
        """A checkpoint whose weights are loaded when outputs are first needed.

        Raises:
            UserError: when the path holds no checkpoint.
        """
        key = repr((model, config.evaluation, config.data))
        if key not in self._opened:
            tokenizer = load_tokenizer(model)
            outputs = ModelOutputs(
                lambda: self.shared(model, tokenizer),
                PromptFormat(tokenizer, model.prompt),
                config.evaluation,
                config.data.max_length,
            )
            self._opened[key] = EvaluatedModel(model, tokenizer, outputs)
        return self._opened[key]

    def shared(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model as it is on disk; it must not be changed."""
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = (config, self.fresh(config, tokenizer))
        return self._loaded[1]

    def fresh(
        self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, trainable: bool = False
    ) -> PreTrainedModel:
        """A copy that the caller may change."""
        self.clear()
        return load_model(config, tokenizer, trainable).to(PartialState().device)

    def clear(self) -> None:
        """Free the weights. Reference cycles are collected, too: those of a Trainer hold its weights and its optimizer."""
        self._loaded = None
        gc.collect()


@dataclass
class EvaluationContext:
    """What a metric group measures.

    Attributes:
        config: of the run; `config.sections` has the settings of the metric groups.
        loader: where fresh copies of the model come from.
        model: under evaluation.
        find_retain_model, find_base_model: return the model finetuned without the forget set, and the model before
            unlearning; raise Missing where there is none.
    """

    config: RunConfig
    loader: Loader
    model: EvaluatedModel
    find_retain_model: Callable[[], EvaluatedModel]
    find_base_model: Callable[[], EvaluatedModel]
    _rows: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def outputs(self) -> ModelOutputs:
        return self.model.outputs

    def rows(self, role: str) -> list[Row]:
        """The rows of the split that has a role.

        Raises:
            Missing: when no split has it.
            UserError: when the split does not exist.
        """
        if self.config.data.splits.get(role) is None:
            raise Missing(f"data.splits.{role} is not given")
        if role not in self._rows:
            self._rows[role] = load_split(self.config.data, role)
        return self._rows[role]
