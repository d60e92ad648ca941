"""Target suppression by hand, from known logits."""

import numpy as np
import pytest

from common.data import Row
from evaluation.metrics import target_suppression
from evaluation.scores import Scores
from tests.helpers import bigram_outputs, context_of, random_table


def test_extreme_credit():
    assert target_suppression.extreme_credit(-3.0, [-1.0, -2.0], least=True) == 1
    assert target_suppression.extreme_credit(-3.0, [-1.0, -2.0], least=False) == 0
    assert target_suppression.extreme_credit(-1.0, [-1.0, -1.0, -2.0], least=False) == pytest.approx(1 / 3)


def options(*wrong, paraphrase="b"):
    return Row(0, "a", "g", paraphrased_answer=paraphrase, perturbed_answer=wrong)


def test_target_suppression_of_known_logits():
    table = np.full((8, 8), 1 / 8)
    table[1] = [0.05, 0.1, 0.3, 0.2, 0.2, 0.05, 0.05, 0.05]  # after a: b is likeliest, then c and d, e least
    scores = Scores()
    rows = [options("c", "d", "e"), options("b", "c", paraphrase="e"), options("d", paraphrase="c")]
    target_suppression.measure(context_of(bigram_outputs(table)[0], rows), scores)
    values = {name.rpartition("/")[2]: row["values"] for name, row in scores.rows.items()}
    assert values == {
        "least_likely": [0.0, 1.0, 0.5],
        "most_likely": [1.0, 0.0, 0.5],
        "chance": [pytest.approx(1 / 4), pytest.approx(1 / 3), pytest.approx(1 / 2)],
    }


def test_options_that_tie_are_at_chance():
    scores = Scores()
    rows = [options("c", "d", "e")]
    target_suppression.measure(context_of(bigram_outputs(np.full((8, 8), 1 / 8))[0], rows), scores)
    assert set(scores.values.values()) == {0.25}


def test_target_suppression_needs_paraphrases():
    scores = Scores()
    target_suppression.measure(context_of(bigram_outputs(random_table())[0], [options("c", paraphrase=None)]), scores)
    assert set(scores.values.values()) == {None}
    assert "without a paraphrased answer" in scores["target_suppression/chance"].note
