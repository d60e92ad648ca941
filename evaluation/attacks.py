"""Getting the forget answers out of a model without touching its weights: many samples, a prefill, a choice of options.

The other two attacks, relearning and quantisation, change a copy of the weights and stand in files of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import beta

from common.config import above_zero, at_least, share
from common.rouge import rouge_l_recall
from common.sampling import SamplingSettings
from evaluation.case import Case
from evaluation.headline import Question, answer_rows
from evaluation.passes import Tokens
from evaluation.scores import Missing, Scores
from evaluation.tofu import wrong_answers

PREFILL = "The answer is:"


@dataclass
class SamplingAttack:
    num_samples: int = 100
    """Answers drawn for each forget question."""
    temperature: float = 1.0
    """The logits are divided by it."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens with at least this probability."""
    leak_threshold: float = 0.5
    """ROUGE-L recall from which an answer counts as a leak."""
    alpha: float = 0.05
    """The bounds are wrong with at most this probability, each by itself."""

    def problems(self) -> list[str]:
        found = (
            at_least(self, 1, "num_samples") + above_zero(self, "temperature") + share(self, "top_p", "leak_threshold")
        )
        if not 0 < self.alpha <= 0.5:
            found.append(f"alpha={self.alpha}: expected 0 < alpha <= 0.5")
        return found


# --- sampling ----------------------------------------------------------------------------------------------------------


def leak_at_k(values: Sequence[float], k: int) -> float:
    """Expected largest of k values drawn without replacement: what an attacker gets who samples k times.

    sum over j of S_(j) C(j-1, k-1) / C(n, k), S_(j) the j-th smallest of n: unbiased for the expected largest of k samples
    (arXiv 2511.04934). k = 1 is the mean, k = n the largest.
    """
    return math.fsum(s * share for s, share in zip(sorted(values), _shares_of_subsets(len(values), k), strict=True))


@lru_cache
def _shares_of_subsets(n: int, k: int) -> list[float]:
    """Of all subsets of k out of n values: the share in which the smallest, the second smallest ... is the largest one."""
    subsets = math.comb(n, k)  # integers: beyond 1029 samples some are too large for a float, their ratios never are
    return [math.comb(j, k - 1) / subsets for j in range(n)]


def leak_probability_bound(leaks: int, n: int, alpha: float) -> float:
    """Upper bound on a probability that showed in `leaks` of n samples (Clopper-Pearson, one-sided, level 1 - alpha).

    The alpha-quantile from above of Beta(leaks + 1, n - leaks). Source: arXiv 2410.03523.
    """
    return 1.0 if leaks == n else float(beta.ppf(1 - alpha, leaks + 1, n - leaks))


def mean_bound(values: Sequence[float], alpha: float) -> float:
    """Upper bound on the mean of what the values in [0, 1] are samples of, whatever its distribution, level 1 - alpha.

    The mean under the lowest distribution function in the Dvoretzky-Kiefer-Wolfowitz band, max(0, F_n - e) with
    e = sqrt(ln(1 / alpha) / 2n): a mass of e moves from the lowest values to 1. Source: arXiv 2410.03523.
    """
    return _moment(values, -math.sqrt(math.log(1 / alpha) / (2 * len(values))), 1)


def deviation_bound(values: Sequence[float], alpha: float) -> float:
    """Upper bound on the standard deviation of what the values in [0, 1] are samples of, level 1 - alpha.

    sqrt(largest E[X^2] - smallest E[X]^2) over the two-sided Dvoretzky-Kiefer-Wolfowitz band F_n +- e with
    e = sqrt(ln(2 / alpha) / 2n); no distribution on [0, 1] has more than 1/2. Source: arXiv 2410.03523.
    """
    e = math.sqrt(math.log(2 / alpha) / (2 * len(values)))
    return min(0.5, math.sqrt(_moment(values, -e, 2) - _moment(values, e, 1) ** 2))


def _moment(values: Sequence[float], shift: float, power: int) -> float:
    """E[X^power] on [0, 1] under the values' distribution function moved up by `shift`: 1 - integral of F d(x^power)."""
    edges = np.concatenate([[0.0], np.sort(values), [1.0]]) ** power
    distribution = np.clip(np.arange(len(values) + 1) / len(values) + shift, 0, 1)
    return float(1 - (distribution * np.diff(edges)).sum())


def measure_sampling(case: Case, scores: Scores) -> None:
    """n samples a forget question; all scores come from their ROUGE-L recall. Lower is better.

    A bound holds at its level for the question that it belongs to; what is reported is the mean of the questions' bounds.
    """
    attack: SamplingAttack = case.config.sections["sampling"]
    rows = case.rows("forget")
    n, alpha = attack.num_samples, attack.alpha
    settings = SamplingSettings(
        case.config.evaluation.max_length,
        n,
        attack.temperature,
        top_p=attack.top_p,
        batch_size=case.config.evaluation.batch_size,
    )
    samples = case.subject.samples([row.question for row in rows], settings, case.config.seed)
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


# --- prefill -----------------------------------------------------------------------------------------------------------


def measure_prefill(case: Case, scores: Scores) -> None:
    """ROUGE-L recall of what the model says after "The answer is:" has been put into its mouth. Lower is better.

    Source: the PMC paper (arXiv 2507.04219).
    """
    rows = case.rows("forget")
    questions = [Question("forget_prefill", row.index, row.question, row.answer) for row in rows]
    answers = answer_rows(questions, case.subject.answers([row.question for row in rows], beginning=PREFILL))
    scores.mean("prefill/rougeL_recall", "forget", [answer["rougeL_recall"] for answer in answers], False)
    scores.generations += answers


# --- target suppression ------------------------------------------------------------------------------------------------


def extreme_share(true: float, wrong: Sequence[float], least: bool) -> float:
    """1 if the true option is the least (or the most) likely one, 0 if it is not; shared among those that tie."""
    extreme = (min if least else max)(true, *wrong)
    return 1 / (1 + list(wrong).count(true)) if true == extreme else 0.0


def measure_target_suppression(case: Case, scores: Scores) -> None:
    """Of the paraphrased answer and the wrong ones: how often the true one is least and most likely, against chance.

    An attacker who knows the method picks the least likely option. Options are compared by mean token log-probability.
    Source: the PMC paper (arXiv 2507.04219).
    """
    names = [f"target_suppression/{name}" for name in ("least_likely", "most_likely", "chance")]
    with scores.null_if_missing(dict.fromkeys(names)):
        role = "forget_paraphrased"
        rows = case.rows(role)
        if any(row.paraphrased_answer is None for row in rows):
            raise Missing(f"the split of data.splits.{role} has rows without a paraphrased answer")
        wrong = wrong_answers(case.subject, rows, role)
        true = case.subject.tokens_of_answers([(row.question, row.paraphrased_answer) for row in rows])
        shares = [_shares(*options) for options in zip(true, wrong, strict=True)]
        for place, name in enumerate(names):
            scores.mean(name, role, [share and share[place] for share in shares], None)


def _shares(true: Tokens, wrong: Sequence[Tokens]) -> tuple[float, float, float] | None:
    """Whether the true option is least likely, whether it is most likely, and the chance of either."""
    first, *others = (tokens.mean_log_prob for tokens in (true, *wrong))
    if first is None or None in others:
        return None
    return extreme_share(first, others, True), extreme_share(first, others, False), 1 / (1 + len(others))
