"""Answers whose beginning is given."""

from common.config import PromptConfig
from common.prompts import PromptFormat
from evaluation.metrics import prefill
from evaluation.scores import Scores
from tests.helpers import ROWS, context_of, outputs_of


def test_prefill_scores_what_comes_after_the_beginning(model, prompts, monkeypatch):
    scores = Scores()
    outputs = outputs_of(model, prompts)
    said = {"The answer is:": [ROWS[0].answer, "nothing"]}
    monkeypatch.setattr(outputs, "answers", lambda questions, beginning: said[beginning])
    prefill.measure(context_of(outputs, ROWS[:2]), scores)
    assert scores.rows["prefill/rougeL_recall"]["values"] == [1.0, 0.0]
    assert [row["split"] for row in scores.generations] == ["forget_prefill"] * 2


def test_a_continuation_that_looks_like_the_beginning_of_a_tag_is_text(tokenizer):
    prompts = PromptFormat(tokenizer, PromptConfig("plain", answer="Answer: {answer}"))
    ids = tokenizer("An", add_special_tokens=False)["input_ids"]
    assert (prompts.text(ids), prompts.text(ids, begun=True)) == ("", "An")
