"""TOFU's scores against hand-computed values, published numbers and scipy."""

import math

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from scipy.stats import ks_2samp

from common.config import read_config
from common.data import Row, load_split
from common.files import CONFIGS
from evaluation.metrics import tofu
from evaluation.scores import Missing, Score, Scores
from tests.helpers import bigram_outputs, random_table, tokens


def of_loss(loss, n=4):
    return tokens([-loss] * n)


def test_probability_is_normalized_by_length():
    assert tofu.probability(tokens([math.log(0.5), math.log(0.125)])) == pytest.approx(0.25)
    assert tofu.probability(tokens([])) is None


def test_probability_among_options():
    correct, wrong = tokens([math.log(0.4)]), [tokens([math.log(0.1)] * n) for n in (1, 3)]
    assert tofu.probability_among(correct, wrong) == pytest.approx(0.4 / 0.6)
    assert tofu.probability_among(correct, [tokens([])]) is None


def test_truth_ratio_of_a_published_log():
    """Row 0 of forget10 in TOFU's log of Phi finetuned on full: loss a token of the paraphrase and of five wrong answers."""
    wrong = [of_loss(loss) for loss in (4.84890, 4.47636, 4.35039, 3.64654, 4.47017)]
    assert tofu.truth_ratio(of_loss(2.17159), wrong) == pytest.approx(0.11227, abs=5e-6)


def test_truth_ratio_averages_log_probabilities():
    wrong = [tokens([math.log(0.1)]), tokens([math.log(0.4)] * 7)]
    assert tofu.truth_ratio(tokens([math.log(0.8)]), wrong) == pytest.approx(0.2 / 0.8)
    assert tofu.truth_ratio(tokens([]), wrong) is None
    assert math.isfinite(tofu.truth_ratio(of_loss(9000), [of_loss(0)]))


def test_truth_ratios_are_reported_by_split():
    assert [tofu.forget_truth_ratio(ratio) for ratio in (0.5, 1.0, 4.0, 0.0)] == [0.5, 1.0, 0.25, 0.0]
    assert [tofu.utility_truth_ratio(ratio) for ratio in (0.25, 1.0, 4.0)] == [0.75, 0.0, 0.0]


def test_forget_quality_is_scipy_s_test_and_1_for_the_model_itself():
    one, other = np.random.default_rng(0).random(40), np.random.default_rng(1).random(40) ** 2
    assert tofu.forget_quality(one, other) == ks_2samp(one, other).pvalue
    assert tofu.forget_quality(one, one) == 1.0
    assert tofu.forget_quality(one, one + 2) < 1e-20


def utility_scores(values):
    names = [
        f"tofu/{kind}/{split}" for kind in ("probability", "rougeL_recall", "truth_ratio") for split in tofu.UTILITY
    ]
    return Scores({name: Score(value, True) for name, value in zip(names, values, strict=True)})


def test_model_utility_is_the_harmonic_mean_of_nine():
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert tofu.model_utility(utility_scores(values)) == pytest.approx(9 / sum(1 / value for value in values))
    assert tofu.model_utility(utility_scores([0.0, *values[1:]])) == 0
    with pytest.raises(Missing, match="tofu/probability/retain"):
        tofu.model_utility(utility_scores([None, *values[1:]]))


ROWS = [
    Row(0, "a", "bc", paraphrased_answer="cb", perturbed_answer=("d", "ef")),
    Row(1, "b", "d", perturbed_answer=("e",)),
]


def by_hand(table, first, text):
    ids = [first, *(ord(letter) - 96 for letter in text), 0]
    return np.mean([math.log(table[pair]) for pair in zip(ids, ids[1:], strict=False)])


def test_truth_ratios_of_known_logits():
    """The paraphrase stands in the denominator, the answer itself where there is none."""
    table = random_table()
    outputs, _ = bigram_outputs(table)
    expected = [
        math.exp((by_hand(table, 1, "d") + by_hand(table, 1, "ef")) / 2 - by_hand(table, 1, "cb")),
        math.exp(by_hand(table, 2, "e") - by_hand(table, 2, "d")),
    ]
    assert tofu.truth_ratios(outputs, ROWS, "forget_paraphrased") == pytest.approx(expected, rel=1e-5)


def test_probabilities_of_known_logits():
    table = random_table()
    outputs, _ = bigram_outputs(table)
    alone = [math.exp(by_hand(table, 1, "bc")), math.exp(by_hand(table, 2, "d"))]
    assert tofu.probabilities(outputs, ROWS, "retain", False) == pytest.approx(alone, rel=1e-5)
    wrong = [math.exp(by_hand(table, 1, "d")) + math.exp(by_hand(table, 1, "ef")), math.exp(by_hand(table, 2, "e"))]
    among = [p / (p + others) for p, others in zip(alone, wrong, strict=True)]
    assert tofu.probabilities(outputs, ROWS, "world_facts", True) == pytest.approx(among, rel=1e-5)


def test_a_split_without_wrong_answers_has_no_truth_ratio():
    outputs, _ = bigram_outputs(random_table())
    with pytest.raises(Missing, match="data.splits.retain_perturbed has rows without wrong answers"):
        tofu.truth_ratios(outputs, [Row(0, "a", "b")], "retain_perturbed")


def test_the_splits_of_the_real_data_have_what_the_scores_need(tofu):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        data = read_config(compose("finetune", ["data=tofu", f"data.path={tofu}"])).data
    rows = {role: load_split(data, role) for role in data.splits}
    for role in ("forget_paraphrased", "retain_perturbed", "real_authors", "world_facts"):
        assert {len(row.perturbed_answer) for row in rows[role]} == {
            3 if role in ("real_authors", "world_facts") else 5
        }
    assert [row.answer for row in rows["forget"]] == [row.answer for row in rows["forget_paraphrased"]]
    texts = {role: {(row.question, row.answer) for row in split} for role, split in rows.items()}
    assert texts["retain_perturbed"] < texts["retain"] and not texts["holdout"] & texts["train"]
    assert [len(rows[role]) for role in ("forget", "retain_perturbed", "holdout")] == [400, 400, 400]
