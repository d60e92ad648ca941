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


class Loader:
    """Loads models, and forgets the one that it gave out before: what was found out of it is kept elsewhere."""

    def __init__(self):
        self.of: ModelConfig | None = None
        self.model: PreTrainedModel | None = None

    def shared(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model as it is on disk; nobody may change it."""
        if self.of != config:
            self.model = self.fresh(config, tokenizer)
            self.of = config
        return self.model

    def fresh(
        self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, trainable: bool = False
    ) -> PreTrainedModel:
        """A copy of one's own, to be changed at will."""
        self.clear()
        return load_model(config, tokenizer, trainable).to(PartialState().device)

    def clear(self) -> None:
        """Make room, also of what only reference cycles hold: a Trainer's hold weights and optimizer."""
        self.of = self.model = None
        gc.collect()


@dataclass
class Model:
    """A checkpoint that is asked: where it is, its tokenizer, what it said, and what else was found out of it."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    outputs: ModelOutputs
    found: dict[str, Any] = field(default_factory=dict)


def open_model(config: RunConfig, model: ModelConfig, loader: Loader) -> Model:
    """A checkpoint ready to be asked; its weights are loaded by the first pass.

    Raises:
        UserError: when it is no checkpoint.
    """
    tokenizer = load_tokenizer(model)
    prompts = PromptFormat(tokenizer, model.prompt)
    outputs = ModelOutputs(lambda: loader.shared(model, tokenizer), prompts, config.evaluation, config.data.max_length)
    return Model(model, tokenizer, outputs)


@dataclass
class EvaluationContext:
    """What every family of metrics measures.

    Attributes:
        config: of the run; `config.sections` has the families' own settings.
        loader: where fresh copies of the model come from.
        model: under evaluation.
        find_retain_model, find_base_model: give the model finetuned without the forget set, and the model before
            unlearning; raise Missing where there is none.
    """

    config: RunConfig
    loader: Loader
    model: Model
    find_retain_model: Callable[[], Model]
    find_base_model: Callable[[], Model]
    _rows: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def outputs(self) -> ModelOutputs:
        return self.model.outputs

    def rows(self, role: str) -> list[Row]:
        """The rows of the split that plays a role.

        Raises:
            Missing: when no split does.
            UserError: when the split is not there.
        """
        if self.config.data.splits.get(role) is None:
            raise Missing(f"data.splits.{role} is not given")
        if role not in self._rows:
            self._rows[role] = load_split(self.config.data, role)
        return self._rows[role]
