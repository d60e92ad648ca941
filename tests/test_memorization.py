"""Extraction strength and exact memorization against hand-computed values and a brute force."""

import numpy as np
import pytest

from evaluation.metrics.memorization import exact_memorization, extraction_strength
from tests.helpers import bigram_outputs, tokens


def hits(text, has_eos=True):
    return tokens([0.0] * len(text), [letter == "x" for letter in text], has_eos=has_eos)


@pytest.mark.parametrize(
    ("text", "strength", "exact"),
    [
        ("xxxx.", 1.0, 1.0),  # the last is the EOS token
        ("....x", 0.0, 0.0),
        ("x.xx.", 0.5, 0.75),
        ("xxx..", 0.0, 0.75),
        (".xxxx", 0.75, 0.75),
    ],
)
def test_by_hand(text, strength, exact):
    assert extraction_strength(hits(text)) == strength
    assert exact_memorization(hits(text)) == exact


def test_a_cut_answer_counts_to_its_last_token():
    assert extraction_strength(hits(".x", has_eos=False)) == 0.5


@pytest.mark.parametrize("metric", [extraction_strength, exact_memorization])
def test_an_answer_of_nothing_but_the_end_has_no_value(metric):
    assert metric(hits("x")) is None


def test_extraction_strength_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 9))
        likeliest = rng.random(n) < 0.6
        shortest = next(k for k in range(n + 1) if likeliest[k:].all())
        found = extraction_strength(tokens([0.0] * n, likeliest.tolist(), has_eos=False))
        assert found == pytest.approx(1 - shortest / n)


def test_on_known_logits():
    table = np.full((8, 8), 0.05)
    for present, following in ((1, 2), (2, 5), (3, 4), (4, 0)):  # a -> b, b -> e, c -> d, d -> end
        table[present, following] = 0.65
    outputs, _ = bigram_outputs(table)
    (answer,) = outputs.tokens_of_answers([("a", "bcd")])  # b and d are the likeliest, c is not
    assert (exact_memorization(answer), extraction_strength(answer)) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
