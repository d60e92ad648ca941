"""Sampled answers: leak@k against brute force, bounds against scipy and by simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from common.rouge import rouge_l_recall
from evaluation.metrics import sampling
from evaluation.scores import Scores
from tests.helpers import ROWS, context_of, outputs_of

# --- leak@k -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_leak_at_k_is_the_mean_of_the_largest_over_all_subsets(n):
    values = np.random.default_rng(n).integers(0, 5, n) / 4
    for k in range(1, n + 1):
        brute = np.mean([max(subset) for subset in itertools.combinations(values, k)])
        assert sampling.leak_at_k(values, k) == pytest.approx(brute)


def test_leak_at_k_of_more_samples_than_a_float_has_subsets():
    values = np.random.default_rng(0).random(3000)
    assert sampling.leak_at_k(values, 3000) == pytest.approx(values.max())
    # of a uniform variable the largest of k is k / (k + 1)
    assert sampling.leak_at_k(np.arange(1, 3001) / 3001, 1024) == pytest.approx(1024 / 1025)


def test_leak_at_the_ends_is_the_mean_and_the_largest():
    values = np.random.default_rng(0).random(100)
    assert sampling.leak_at_k(values, 1) == pytest.approx(values.mean())
    assert sampling.leak_at_k(values, 100) == pytest.approx(values.max())
    assert sampling.leak_at_k([1.0] * 100, 37) == pytest.approx(1.0)


# --- bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaks", [0, 1, 7, 19, 20])
def test_clopper_pearson_is_scipy_s(leaks):
    # The upper end of a two-sided interval at level 1 - 2 alpha.
    expected = binomtest(leaks, 20).proportion_ci(1 - 2 * 0.05, method="exact").high
    assert sampling.leak_probability_bound(leaks, 20, 0.05) == pytest.approx(expected)


def test_mean_bound_by_hand():
    # e = sqrt(ln(1/0.5) / 4) = 0.4163: the distribution function is max(0, F - e) between 0.2, 0.6 and 1.
    e = np.sqrt(np.log(2) / 4)
    area = (0.6 - 0.2) * (0.5 - e) + (1 - 0.6) * (1 - e)
    assert sampling.mean_bound([0.6, 0.2], 0.5) == pytest.approx(1 - area)


def test_deviation_bound_by_hand():
    # All values are 1/2: a mass of e may lie at 1 and one of e at 0.
    e = np.sqrt(np.log(2 / 0.1) / 800)
    second, first = 0.25 * (1 - e) + e, 0.5 * (1 - e)
    assert sampling.deviation_bound([0.5] * 400, 0.1) == pytest.approx(np.sqrt(second - first**2))
    assert sampling.deviation_bound([0.0, 1.0], 0.1) == 0.5


def test_bounds_tighten_to_the_truth():
    values = np.random.default_rng(0).random(200_000)
    assert sampling.mean_bound(values, 0.05) == pytest.approx(0.5, abs=0.01)
    assert sampling.deviation_bound(values, 0.05) == pytest.approx(np.sqrt(1 / 12), abs=0.02)
    assert sampling.leak_probability_bound(1000, 10_000, 0.05) == pytest.approx(0.1, abs=0.01)


DISTRIBUTIONS = {  # draws, mean, standard deviation
    "coin": (lambda rng, n: (rng.random(n) < 0.3).astype(float), 0.3, np.sqrt(0.21)),
    "uniform": (lambda rng, n: rng.random(n), 0.5, np.sqrt(1 / 12)),
    "rare": (lambda rng, n: (rng.random(n) < 0.02) * 1.0, 0.02, np.sqrt(0.02 * 0.98)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_bounds_hold_at_their_level(name):
    draw, mean, deviation = DISTRIBUTIONS[name]
    rng, alpha, runs, n = np.random.default_rng(0), 0.1, 1000, 30
    samples = [draw(rng, n) for _ in range(runs)]
    allowed = alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert np.mean([sampling.mean_bound(values, alpha) < mean for values in samples]) <= allowed
    assert np.mean([sampling.deviation_bound(values, alpha) < deviation - 1e-12 for values in samples]) <= allowed
    if name != "uniform":
        leaks = [int(values.sum()) for values in samples]
        wrong = np.mean([sampling.leak_probability_bound(count, n, alpha) < mean for count in leaks])
        assert wrong <= allowed


def test_clopper_pearson_is_wrong_about_as_often_as_it_may_be():
    """Against a bound that is merely huge: with many samples the level is nearly used up."""
    rng, n = np.random.default_rng(0), 400
    wrong = np.mean([sampling.leak_probability_bound(int(x), n, 0.1) < 0.3 for x in rng.binomial(n, 0.3, 4000)])
    assert 0.08 < wrong < 0.115


# --- on a model ---------------------------------------------------------------------------------------------------------


def test_sampling_scores_come_from_one_set_of_samples(model, prompts):
    scores = Scores()
    context = context_of(outputs_of(model, prompts), ROWS[:3], sampling=sampling.SamplingAttack(num_samples=6))
    sampling.measure(context, scores)
    assert [name for name in scores.values if "@" in name] == [f"sampling/leak@{k}" for k in (1, 2, 4, 6)]
    assert [len(row["samples"]) for row in scores.samples] == [6] * 3
    recalls = [
        [rouge_l_recall(row.answer, text) for text in found["samples"]]
        for row, found in zip(ROWS, scores.samples, strict=False)
    ]
    assert recalls == [row["rougeL_recall"] for row in scores.samples]
    assert scores.rows["sampling/leak@6"]["values"] == pytest.approx([max(values) for values in recalls])
    assert scores.values["sampling/leak@1"] == pytest.approx(np.mean(recalls))
    bound = np.mean([sampling.mean_bound(values, 0.05) for values in recalls])
    assert scores.values["sampling/mean_recall_bound"] == pytest.approx(bound)
