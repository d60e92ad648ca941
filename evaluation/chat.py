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

import importlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import hydra
from omegaconf import DictConfig

from common.cli import check_recipe, job_errors, launch, quoted
from common.command import resolve_checkpoint
from common.config import RunConfig, fields_of, read_config, section
from common.data import Row
from common.errors import UserError, naming
from common.files import CONFIGS, SURROGATE
from common.results import recorded_config
from evaluation.context import Loader
from evaluation.inputs import fill_from_run
from evaluation.metrics.tofu import probability
from evaluation.model_outputs import ModelOutputs
from generation.sampler import use_engine

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
        names = ("before", "after")
        if missing := [name for name in names if name not in cfg]:
            raise UserError(
                f"{missing[0]}: missing; name a folder or a hub id, as in {missing[0]}=models/unlearned/..."
            )
        configs = {name: read_chat(cfg, name) for name in names}
        self.settings = ChatSettings(**configs["before"].sections)
        use_engine(configs["before"].generation)
        self.models = {name: load(config, name) for name, config in configs.items()}

    def ask(self, question: str) -> dict[str, Reply]:
        """The reply of each model, by its name: before and after.

        Raises:
            UserError: if the question is empty or not text, or leaves no room for an answer.
        """
        if SURROGATE.search(question) or not question.strip():
            raise UserError(f"{question!r}: is {'empty' if not question.strip() else 'not UTF-8 text'}")
        answers = {name: outputs.answers([question])[0] for name, outputs in self.models.items()}
        return {name: reply(self.models[name], question, answers[name], answers["before"]) for name in answers}


def read_chat(cfg: DictConfig, name: str) -> RunConfig:
    """The configuration for one checkpoint, with the prompt format of the run that made it.

    Args:
        name: the key that names the checkpoint, before or after.
    Raises:
        UserError: if there is no such folder, or the configuration is invalid.
    """
    cfg, path = cfg.copy(), str(cfg[name])
    cfg.model.path = resolve_checkpoint(path, name)
    with naming(name):
        fill_from_run(cfg, recorded_config(cfg.model.path))
        return read_config(cfg, sections=KEYS)


def load(config: RunConfig, name: str) -> ModelOutputs:
    """The outputs of a checkpoint, with its weights in memory.

    Raises:
        UserError: if they cannot be loaded.
    """
    with naming(name):
        # A loader of its own: one that loads the other checkpoint as well would free these weights.
        outputs = Loader().open(config, config.model).outputs
        outputs.load()
        return outputs


def reply(outputs: ModelOutputs, question: str, answer: str, old: str) -> Reply:
    """A model's answer, with its probability of the old answer: of as many tokens as fit into evaluation.max_length."""
    prompts = outputs.prompts
    example = prompts.example(Row(0, question, old), outputs.evaluation.max_length)
    (tokens,) = outputs.tokens([example])
    is_cut = len(example.answer) < len(prompts.answer(old))
    return Reply(answer, probability(tokens), len(example.answer) if is_cut else None)


def plain(text: str) -> str:
    """The text without control characters: a terminal would obey them."""
    return CONTROL.sub("", text)


def shown(replies: dict[str, Reply]) -> str:
    """Both replies as lines for the terminal."""
    lines = []
    for name, found in replies.items():
        answer = plain(found.answer).replace("\n", "\n          ") or "(empty)"
        lines += [f"  {name:<6}  {answer}", f"          {likelihood(found)}"]
    return "\n".join(lines)


def likelihood(found: Reply) -> str:
    cut = f" (its first {found.tokens} tokens)" if found.tokens else ""
    return f"probability of the old answer{cut}: {found.probability:.2g}"


def questions_of(settings: ChatSettings) -> Iterator[str]:
    """The question of the command, or those typed or piped in, up to an empty line or the end."""
    if settings.question is not None:
        yield settings.question
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused by `ask`, and the loop goes on
    while True:
        try:
            question = input("Question: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def ask_in_terminal(pair: Pair) -> None:
    """Print both replies to each question. A question that cannot be answered is refused, and the next one is read."""
    typed = pair.settings.question is None and sys.stdin.isatty()
    for question in questions_of(pair.settings):
        if not typed:
            print(f"Question: {plain(SURROGATE.sub('?', question))}")
        try:
            print(shown(pair.ask(question)), flush=True)
        except UserError as error:
            if pair.settings.question is not None:
                raise
            print(f"  Error: {error}", flush=True)


def ask_in_browser(pair: Pair) -> None:
    """Serve a page with a field for the question, to this machine only, until Ctrl-C."""
    gradio = import_gradio()
    fonts = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # the default ones come from a server
    options = {"server_name": "127.0.0.1", "share": False, "footer_links": [], "theme": fonts}
    page = browser_page(pair)
    # Quiet, because gradio would print how to make the page public.
    _, url, _ = page.launch(quiet=True, prevent_thread_lock=True, **options)
    print(f"{url}  (Ctrl-C ends)", flush=True)
    page.block_thread()


def import_gradio() -> ModuleType:
    """The module gradio, which sends nothing anywhere.

    Raises:
        UserError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks its own server whether it has started
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise UserError("browser=true: gradio is not installed; pip install -r requirements-demo.txt") from error


def browser_page(pair: Pair) -> Any:
    """The page, a gradio.Blocks. Answers are the values of text boxes, which show markup as it is."""
    gradio = import_gradio()

    def ask(question: str) -> list[str]:
        try:
            replies = pair.ask(question.strip())
        except UserError as error:
            return [f"Error: {error}", ""] * 2
        return [text for found in replies.values() for text in (plain(found.answer), likelihood(found))]

    with gradio.Blocks(title="Before and after unlearning", analytics_enabled=False) as page:
        question = gradio.Textbox(label="Question")
        button = gradio.Button("Ask")
        boxes = []
        with gradio.Row():
            for name in pair.models:
                with gradio.Column():
                    boxes.append(gradio.Textbox(label=name, lines=4, interactive=False))
                    boxes.append(gradio.Textbox(show_label=False, interactive=False))
        gradio.on([question.submit, button.click], ask, question, boxes, api_name="ask")
    return page


def chat(cfg: DictConfig) -> None:
    """Answer questions until they end.

    Raises:
        UserError: if the configuration is invalid, a checkpoint cannot be loaded or gradio is missing.
    """
    if cfg.browser is True:
        if cfg.question is not None:
            raise UserError(f"question={cfg.question}: type it into the page, or leave out browser=true")
        import_gradio()  # before the weights are loaded
    pair = Pair(cfg)
    ask = ask_in_browser if pair.settings.browser else ask_in_terminal
    ask(pair)


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="chat")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.models_dir):
        check_recipe(cfg, "evaluation/chat.py")
        chat(cfg)


if __name__ == "__main__":
    # Hydra's grammar has a meaning for commas and brackets, which questions have, too.
    is_question = re.compile(r"question=(?![\"'])(.+)", re.DOTALL)
    sys.argv[1:] = [quoted("question", m[1]) if (m := is_question.fullmatch(word)) else word for word in sys.argv[1:]]
    launch(main, one_process=True)
