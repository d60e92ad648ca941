"""Answers whose beginning is given."""

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
