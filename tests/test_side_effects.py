"""Probability shift, refusals, repetition and perplexity against hand-computed values."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from common.data import Row
from evaluation.metrics import fluency, side_effects
from evaluation.scores import Missing, Scores
from tests.helpers import ROWS, LetterTokenizer, bigram_outputs, outputs_of, random_table

TEXTS = [Row(0, "ab", "cd"), Row(1, "e", "f")]


def model_of(table, tokenizer=None):
    return SimpleNamespace(outputs=bigram_outputs(table)[0], tokenizer=tokenizer or LetterTokenizer())


def context_of(model, base, rows=TEXTS):
    def find_base_model():
        if base is None:
            raise Missing("the model before unlearning is not known")
        return base

    config = SimpleNamespace(data=SimpleNamespace(max_length=256))
    return SimpleNamespace(
        model=model, outputs=model.outputs, find_base_model=find_base_model, rows=lambda role: rows, config=config
    )


def measured(measure, *args):
    scores = Scores()
    measure(context_of(*args), scores)
    return scores


def test_probability_shift_of_known_logits():
    tables = random_table(0), random_table(1)
    scores = measured(side_effects.measure, *map(model_of, tables))
    pairs = [(1, 2), (2, 3), (3, 4), (5, 6)]  # abcd and ef; no prompt, no EOS token
    shift = np.array([tables[0][pair] - tables[1][pair] for pair in pairs])
    assert scores.values["side_effects/probability_shift"] == pytest.approx(shift.mean(), abs=1e-6)
    assert scores.values["side_effects/probability_shift_deviation"] == pytest.approx(shift.std(), abs=1e-6)
    assert scores["side_effects/probability_shift"].count == 4
    histogram = scores["side_effects/probability_shift"].histogram
    assert sum(histogram["counts"]) == 4 and len(histogram["edges"]) == len(histogram["counts"]) + 1


def test_a_model_against_itself_has_no_side_effects():
    model = model_of(random_table())
    assert set(measured(side_effects.measure, model, model).values.values()) == {0.0}


def test_another_tokenizer_makes_the_shift_null():
    class Shifted(LetterTokenizer):
        def __call__(self, text, **_):
            return {"input_ids": [8 - i for i in super().__call__(text)["input_ids"]]}

    scores = measured(side_effects.measure, model_of(random_table()), model_of(random_table(), Shifted()))
    assert set(scores.values.values()) == {None}
    assert set(scores.as_result()["notes"].values()) == {"the model before unlearning has a different tokenizer"}


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I don't know the answer.", True),
        ("I\u2019m not sure about that.", True),
        ("Sorry, I cannot help with this.", True),
        ("As an AI, I have no access to it.", True),
        ("There is no information on this author.", True),
        ("He was born in Kuwait City.", False),
        ("She does not know fear.", False),
        ("", False),
    ],
)
def test_refusals(answer, refuses):
    assert fluency.is_refusal(answer) is refuses


def test_distinct_2():
    assert fluency.distinct_2("a b a b a") == pytest.approx(2 / 4)
    assert fluency.distinct_2("one two Three") == 1.0
    assert fluency.distinct_2("word") is None and fluency.distinct_2("") is None


def test_perplexity():
    assert fluency.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert math.isfinite(fluency.perplexity([-1e4]))


def test_perplexity_is_that_of_the_model_before_unlearning(monkeypatch):
    table = random_table(1)
    context_model = model_of(random_table(0))
    monkeypatch.setattr(type(context_model.outputs), "answers", lambda self, questions: ["cd", ""])
    scores = measured(fluency.measure, context_model, model_of(table), [Row(0, "ab", "x"), Row(1, "e", "x")])
    expected = 1 / math.sqrt(table[2, 3] * table[3, 4])  # the EOS token is left out
    assert scores.values["fluency/perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (scores["fluency/perplexity"].count, scores["fluency/perplexity"].left_out) == (1, 1)
    assert scores.values["fluency/refusals"] == 0 and scores.values["fluency/distinct_2"] is None


def test_without_a_model_before_unlearning_the_perplexity_is_null(monkeypatch):
    model = model_of(random_table())
    monkeypatch.setattr(type(model.outputs), "answers", lambda self, questions: ["c d e"])
    scores = measured(fluency.measure, model, None, [Row(0, "ab", "x")])
    assert scores.values == {"fluency/refusals": 0.0, "fluency/distinct_2": 1.0, "fluency/perplexity": None}
    assert scores["fluency/perplexity"].note == "the model before unlearning is not known"


def test_an_empty_answer_has_no_perplexity_though_a_space_stands_before_it(model, prompts, monkeypatch):
    assert len(prompts.answer("")) == 2, "a space and the EOS token"
    base, rows = outputs_of(model, prompts), ROWS[:3]
    found = {}
    for answers in (["A poet.", ""], ["A poet."]):
        outputs = outputs_of(model, prompts)
        monkeypatch.setattr(outputs, "answers", lambda questions, answers=answers: answers)
        models = (SimpleNamespace(outputs=of_model) for of_model in (outputs, base))
        found[len(answers)] = measured(fluency.measure, *models, rows[: len(answers)])["fluency/perplexity"]
    assert found[2].value == pytest.approx(found[1].value) and found[2].left_out == 1
