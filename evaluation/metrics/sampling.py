"""Attack: draw many samples per forget question and keep the best.

Scores:
    sampling/leak@* (lower): expected best ROUGE-L recall of k samples per forget question. Not shown: attacks with more
        than n samples.
    sampling/leak_probability_bound (lower): mean over the questions of an upper bound, at level alpha, on the
        probability that a sample leaks. Not shown: attacks with more than n samples; a bound over all questions at
        once.
    sampling/mean_recall_bound (lower): mean over the questions of an upper bound, at level alpha, on the mean recall of
        a sample. Not shown: attacks with more than n samples; a bound over all questions at once.
    sampling/recall_deviation_bound (lower): mean over the questions of an upper bound, at level alpha, on the standard
        deviation of a sample's recall. Not shown: attacks with more than n samples; a bound over all questions at
        once.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt
from scipy.stats import beta

from common.config import Fraction, section
from common.rouge import rouge_l_recall
from evaluation.context import EvaluationContext
from evaluation.scores import Scores
from generation.token_sampling import SamplingSettings


@section
class SamplingAttack:
    num_samples: PositiveInt = 100
    """Answers drawn for each forget question."""
    temperature: PositiveFloat = 1.0
    """The logits are divided by it."""
    top_p: Fraction = 1.0
    """Draw from the smallest set of likeliest tokens with at least this total probability."""
    leak_threshold: Fraction = 0.5
    """ROUGE-L recall at or above which an answer counts as a leak."""
    alpha: float = Field(0.05, gt=0, le=0.5)
    """Each bound is wrong with at most this probability."""


def leak_at_k(values: Sequence[float], k: int) -> float:
    """Expected largest of k values drawn without replacement: the best of k samples.

    sum over j of S_(j) C(j-1, k-1) / C(n, k), S_(j) the j-th smallest of n: an unbiased estimate of the expected best of k
    samples (arXiv 2511.04934). k = 1 gives the mean, k = n the largest.
    """
    weights = _weights_of_order_statistics(len(values), k)
    return math.fsum(value * weight for value, weight in zip(sorted(values), weights, strict=True))


@lru_cache
def _weights_of_order_statistics(n: int, k: int) -> list[float]:
    """For each of n sorted values, the fraction of the subsets of k values in which it is the largest."""
    subsets = math.comb(n, k)  # an integer: with more than 1029 samples it can overflow a float; the ratios cannot
    return [math.comb(j, k - 1) / subsets for j in range(n)]


def leak_probability_bound(leaks: int, n: int, alpha: float) -> float:
    """Upper bound on the leak probability from `leaks` in n samples (Clopper-Pearson, one-sided, level 1 - alpha).

    The (1 - alpha)-quantile of Beta(leaks + 1, n - leaks). Source: arXiv 2410.03523.
    """
    return 1.0 if leaks == n else float(beta.ppf(1 - alpha, leaks + 1, n - leaks))


def mean_bound(values: Sequence[float], alpha: float) -> float:
    """Upper bound on the mean of a variable in [0, 1] from samples of it, for any distribution; level 1 - alpha.

    The mean under the lowest distribution function in the Dvoretzky-Kiefer-Wolfowitz band, max(0, F_n - e) with
    e = sqrt(ln(1 / alpha) / 2n): a mass of e moves from the lowest values to 1. Source: arXiv 2410.03523.
    """
    return _moment(values, -math.sqrt(math.log(1 / alpha) / (2 * len(values))), 1)


def deviation_bound(values: Sequence[float], alpha: float) -> float:
    """Upper bound on the standard deviation of a variable in [0, 1] from samples of it; level 1 - alpha.

    sqrt(largest E[X^2] - smallest E[X]^2) over the two-sided Dvoretzky-Kiefer-Wolfowitz band F_n +- e with
    e = sqrt(ln(2 / alpha) / 2n); no distribution on [0, 1] has more than 1/2. Source: arXiv 2410.03523.
    """
    e = math.sqrt(math.log(2 / alpha) / (2 * len(values)))
    return min(0.5, math.sqrt(_moment(values, -e, 2) - _moment(values, e, 1) ** 2))


def _moment(values: Sequence[float], shift: float, power: int) -> float:
    """E[X^power] on [0, 1] under the values' distribution function shifted up by `shift`: 1 - integral of F d(x^power)."""
    edges = np.concatenate([[0.0], np.sort(values), [1.0]]) ** power
    distribution = np.clip(np.arange(len(values) + 1) / len(values) + shift, 0, 1)
    return float(1 - (distribution * np.diff(edges)).sum())


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Scores of the ROUGE-L recall of n samples per forget question. Lower is better.

    Each bound holds for a single question at its level; the score is the mean of the bounds over the questions.
    """
    attack: SamplingAttack = context.config.sections["sampling"]
    rows = context.rows("forget")
    n, alpha = attack.num_samples, attack.alpha
    evaluation = context.config.evaluation
    settings = SamplingSettings(
        evaluation.max_length, n, attack.temperature, top_p=attack.top_p, batch_size=evaluation.batch_size
    )
    samples = context.outputs.samples([row.question for row in rows], settings, context.config.seed)
    recalls = [[rouge_l_recall(row.answer, text) for text in texts] for row, texts in zip(rows, samples, strict=True)]
    for k in [2**i for i in range(n.bit_length()) if 2**i < n] + [n]:
        scores.mean(f"sampling/leak@{k}", "forget", [leak_at_k(values, k) for values in recalls], False)
    leaks = [sum(value >= attack.leak_threshold for value in values) for values in recalls]
    bounds = {
        "leak_probability_bound": [leak_probability_bound(count, n, alpha) for count in leaks],
        "mean_recall_bound": [mean_bound(values, alpha) for values in recalls],
        "recall_deviation_bound": [deviation_bound(values, alpha) for values in recalls],
    }
    for name, values in bounds.items():
        scores.mean(f"sampling/{name}", "forget", values, False)
    scores.samples += [
        {"split": "forget", "index": row.index, "samples": texts, "rougeL_recall": values}
        for row, texts, values in zip(rows, samples, recalls, strict=True)
    ]
