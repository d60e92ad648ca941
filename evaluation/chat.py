"""Put questions to two checkpoints side by side, and see how likely each finds the answer that the first one gives.

    python evaluation/chat.py before=models/finetuned/tiny/seed-0 after=models/unlearned/PMC-unlearn-tiny/seed-0
    python evaluation/chat.py before=FOLDER after=FOLDER question="Where was Ada Novak born?"
    python evaluation/chat.py before=FOLDER after=FOLDER browser=true

Questions are read from the terminal or a pipe until an empty line or Ctrl-D. Answers are greedy. The old answer is that of
`before`; its probability is exp(-NLL/|y|), the geometric mean over its tokens, with the EOS token.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import hydra
from omegaconf import DictConfig

from common.cli import check_recipe, launch, quoted
from common.config import RunConfig, fields_of, read_config, section
from common.data import Row
from common.errors import UserError
from common.files import CONFIGS, SURROGATE, looks_local, resolve_path
from common.prompts import PromptFormat
from common.results import result_of
from evaluation.context import Loader
from evaluation.inputs import fill_from_run
from evaluation.metrics.tofu import probability
from evaluation.model_outputs import ModelOutputs
from generation.cuda_graphs import use_cuda_graphs

# C0 and C1 control characters except tab and newline, and those that change the direction of writing.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@section
class ChatSettings:
    before: str
    """Folder or hub id of the checkpoint before unlearning, whose answers are the old ones."""
    after: str
    """Folder or hub id of the checkpoint after unlearning."""
    question: str | None = None
    """A single question; null: those typed or piped in, up to an empty line."""
    browser: bool = False
    """Ask in the browser instead of the terminal; pip install -r requirements-demo.txt."""


KEYS = {name: field.annotation for name, field in fields_of(ChatSettings).items()}


@dataclass(frozen=True)
class Reply:
    """What one model says to a question.

    Attributes:
        answer: its greedy answer.
        probability: of the old answer under this model, in [0, 1].
        tokens: number of tokens of the old answer that the probability is computed from, if not all.
    """

    answer: str
    probability: float
    tokens: int | None = None


class Pair:
    """Two checkpoints that answer the same questions. The weights of both are in memory.

    Args:
        cfg: configuration of the command.
    Raises:
        UserError: if the configuration is invalid or a checkpoint cannot be loaded.
    """

    def __init__(self, cfg: DictConfig):
        self.models = {name: open_model(cfg, name) for name in ("before", "after")}

    def ask(self, question: str) -> dict[str, Reply]:
        """Each model's reply.

        Raises:
            UserError: if the question is not text, or leaves no room for an answer.
        """
        if SURROGATE.search(question):
            raise UserError(f"{question!r}: is not UTF-8 text")
        answers = {name: outputs.answers([question])[0] for name, outputs in self.models.items()}
        old = answers["before"]
        return {name: reply(outputs, question, answers[name], old) for name, outputs in self.models.items()}


def open_model(cfg: DictConfig, name: str) -> ModelOutputs:
    """The outputs of the checkpoint that `before` or `after` names, with its weights loaded."""
    cfg = cfg.copy()
    path = None if name not in cfg or cfg._get_node(name)._is_missing() else cfg[name]
    raise NotImplementedError(path)
