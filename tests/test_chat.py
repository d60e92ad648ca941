"""Questions to two checkpoints: the answers, the probability of the old one, and what ends or does not end the loop."""

import io
import os
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir

from common.errors import UserError
from common.files import CONFIGS, ROOT, write_json
from common.results import result_of
from evaluation import chat
from tests.helpers import ROWS, run_imported

pytestmark = pytest.mark.slow  # nearly all load two checkpoints
QUESTION = ROWS[0].question


@pytest.fixture
def pair(model, tokenizer, tmp_path, monkeypatch):
    """A model with random weights, and another one; both as checkpoints without a result.json."""
    monkeypatch.setenv("PMC_ROOT", str(ROOT))
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
    return chat.Pair(configured(tmp_path))


def configured(folder, *words):
    named = [f"before={folder}/before", f"after={folder}/after", "model=tiny", "data=tiny", "evaluation.max_length=60"]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("chat", [*named, *words])


def test_each_model_answers_and_the_probability_is_that_of_the_answer_of_before(pair):
    replies = pair.ask(QUESTION)
    old = replies["before"].answer
    assert old and replies["after"].answer != old
    for name, found in replies.items():
        outputs = pair.models[name]
        model, prompt = outputs.load(), outputs.prompts.prompt(QUESTION)
        answer = outputs.prompts.answer(old)[: 60 - len(prompt)]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        own = [log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
        assert found.probability == pytest.approx(torch.tensor(own).mean().exp().item(), rel=1e-4)
        assert found.tokens == (len(answer) if len(answer) < len(outputs.prompts.answer(old)) else None)
    assert replies["before"].probability > replies["after"].probability


def test_both_models_stay_in_memory(pair):
    before, after = (outputs.load() for outputs in pair.models.values())
    assert before is pair.models["before"].load() and after is pair.models["after"].load() and before is not after


def run(pair, monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    chat.ask_in_terminal(pair)
    return capsys.readouterr().out


def test_questions_are_read_up_to_an_empty_line(pair, monkeypatch, capsys):
    shown = run(pair, monkeypatch, capsys, f"{QUESTION}\nWho?\n\nNever read?\n".encode())
    assert shown.count("probability of the old answer") == 4
    assert f"Question: {QUESTION}\n  before  " in shown and "\n  after   " in shown and "Never" not in shown
    assert run(pair, monkeypatch, capsys, b"") == ""


def test_a_question_that_cannot_be_answered_does_not_end_the_loop(pair, monkeypatch, capsys):
    shown = run(pair, monkeypatch, capsys, b"long " * 99 + b"\n\xff\nWho?")
    assert shown.count("Error: ") == 2 and shown.count("probability") == 2
    assert "evaluation.max_length=60: the longest prompt has" in shown and "is not UTF-8 text" in shown


def test_an_empty_question_is_refused(pair):
    with pytest.raises(UserError, match="is empty"):
        pair.ask("  ")


def test_a_single_question_of_the_command_is_refused_with_an_error(tmp_path, pair, monkeypatch, capsys):
    pair.settings.question = "long " * 99
    with pytest.raises(UserError, match="evaluation.max_length=60"):
        chat.ask_in_terminal(pair)
    pair.settings.question = "Who?"
    chat.ask_in_terminal(pair)
    assert capsys.readouterr().out.count("probability") == 2


def test_a_terminal_gets_no_control_characters():
    replies = {"before": chat.Reply("a\x1b[31mb\r\u202ec\nfoo\x07", 0.5), "after": chat.Reply("", 0.25, tokens=3)}
    assert chat.shown(replies) == (
        "  before  a[31mbc\n          foo\n          probability of the old answer: 0.5\n"
        "  after   (empty)\n          probability of the old answer (its first 3 tokens): 0.25"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["after=models/none"], "after=models/none: no such folder"),
        (["++question=5"], "before: question=5: expected str or null"),
        (["browser=maybe"], "before: browser=maybe: expected bool"),
        (["model=from_run"], "before: model.prompt: not given, and"),
        (["~after"], "after: missing; name a folder or a hub id"),
    ],
)
def test_what_is_refused(words, message, pair, tmp_path):
    with pytest.raises(UserError) as caught:
        chat.Pair(configured(tmp_path, *words))
    assert str(caught.value).startswith(message)


def test_the_prompt_is_that_of_each_checkpoint_s_run(pair, tmp_path):
    made = {"prompt": {"style": "plain", "question": "Q: {question} A:"}}
    data = {"path": "x/y", "splits": {"forget": "f"}, "columns": {"question": "q", "answer": "a"}}
    write_json(tmp_path / "after/result.json", {"config": {"model": made, "data": data, "evaluation": {"bf16": False}}})
    assert result_of(tmp_path / "after")
    cfg = configured(tmp_path, "model=from_run", "data=from_run")
    assert chat.read_chat(cfg, "after").model.prompt.question == "Q: {question} A:"


def test_without_gradio_the_message_says_what_to_install(monkeypatch, tmp_path, pair):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="gradio is not installed; pip install -r requirements-demo.txt"):
        chat.chat(configured(tmp_path, "browser=true"))
    with pytest.raises(UserError, match="question=Who: type it into the page"):
        chat.chat(configured(tmp_path, "browser=true", "question=Who"))


def test_the_page_shows_answers_as_text_and_is_served_to_this_machine_alone(pair, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")
    page = chat.browser_page(pair)
    boxes = [block for block in page.blocks.values() if isinstance(block, gradio.components.Component)]
    assert {type(block).__name__ for block in boxes} == {"Textbox", "Button"}, "neither HTML nor Markdown"
    assert page.analytics_enabled is False and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.update(options) or (0, "url", 0))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)
    chat.ask_in_browser(pair)
    assert (launched["server_name"], launched["share"]) == ("127.0.0.1", False)


@pytest.mark.slow
def test_the_command_takes_a_question_with_commas_and_brackets(pair, tmp_path):
    script = ROOT / "evaluation" / "chat.py"
    words = [f"before='{tmp_path}/before'", f"after='{tmp_path}/after'", "model=tiny", "data=tiny"]
    (done,) = run_imported(script, [str(script), *words, 'question=Who, [really], wrote {a} "b"=c?'])
    assert done.returncode == 0, done.stderr
    assert 'Question: Who, [really], wrote {a} "b"=c?' in done.stdout and done.stdout.count("probability") == 2
