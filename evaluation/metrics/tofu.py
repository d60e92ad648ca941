"""TOFU's own scores (Maini et al. 2024, arXiv 2401.06121), from token probabilities and greedy answers.

The splits forget_paraphrased and retain_perturbed contain the paraphrases and wrong answers. An answer's EOS token and its tag
("Answer: ") count as its tokens, as in TOFU.

Scores:
    tofu/probability/* (lower on forget, higher elsewhere): length-normalized probability of the true answer; relative
        to the wrong options for real authors and world facts. Not shown: what is answered instead.
    tofu/rougeL_recall/* (lower on forget, higher elsewhere): ROUGE-L recall of the greedy answers. Not shown: fluency;
        what sampling or token probabilities reveal.
    tofu/truth_ratio/* (higher): probability r of wrong answers relative to the true one: min(r, 1/r) on forget, max(0,
        1 - r) elsewhere. Not shown: whether either is likely at all.
    tofu/model_utility (higher): harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors
        and world facts. Not shown: which of the nine became worse.
    tofu/forget_quality (higher): p-value of the Kolmogorov-Smirnov test between the truth ratios on forget and those of
        the retain-only model. Not shown: the size of a difference: with few rows it is high for every model.
"""

import math
from collections.abc import Sequence
from statistics import fmean, harmonic_mean

from scipy.stats import ks_2samp

from common.data import Row
from common.rouge import rouge_l_recall
from evaluation.context import EvaluationContext
from evaluation.model_outputs import ModelOutputs, TokenLogProbs
from evaluation.scores import Missing, Scores

ROLES = {"forget": "forget", "retain": "retain_perturbed", "real_authors": "real_authors", "world_facts": "world_facts"}
UTILITY = ("retain", "real_authors", "world_facts")


def probability(answer: TokenLogProbs) -> float | None:
    """Length-normalized probability of an answer, exp(-NLL/|y|), in [0, 1]; lower is better on forget."""
    return None if answer.mean_log_prob is None else math.exp(answer.mean_log_prob)


def probability_among(answer: TokenLogProbs, wrong: Sequence[TokenLogProbs]) -> float | None:
    """p(answer) / (p(answer) + sum of p(wrong answer)), in [0, 1]; TOFU's probability for real_authors and world_facts."""
    probabilities = [probability(tokens) for tokens in (answer, *wrong)]
    if None in probabilities:
        return None
    return probabilities[0] / sum(probabilities) if sum(probabilities) else 0.0


def truth_ratio(true: TokenLogProbs, wrong: Sequence[TokenLogProbs]) -> float | None:
    """exp(mean over wrong answers of their mean token log-probability) / exp(mean token log-probability of the true one).

    Above 1 if the wrong answers are likelier.
    """
    means = [tokens.mean_log_prob for tokens in (true, *wrong)]
    if None in means:
        return None
    return math.exp(min(fmean(means[1:]) - means[0], 700))  # exp of more than 709 overflows


def forget_truth_ratio(ratio: float) -> float:
    """min(r, 1/r): 1 if true and wrong answers are equally likely. TOFU reports its mean on forget; higher is better."""
    return min(ratio, 1 / ratio) if ratio else 0.0


def utility_truth_ratio(ratio: float) -> float:
    """max(0, 1 - r): 1 if wrong answers are impossible. TOFU reports its mean on the other splits; higher is better."""
    return max(0.0, 1 - ratio)


def forget_quality(ratios: Sequence[float], retain_model_ratios: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between two models' truth ratios on forget; higher is better.

    A low value means that the model differs from the retain-only model. The same difference gives a lower value with more
    rows.
    """
    return float(ks_2samp(ratios, retain_model_ratios).pvalue)


def measure(context: EvaluationContext, scores: Scores) -> None:
    """All of TOFU's scores of one model."""
    for split, role in ROLES.items():
        better = split != "forget"
        with scores.null_if_missing({f"tofu/{kind}/{split}": better for kind in ("probability", "rougeL_recall")}):
            rows = context.rows(role)
            values = probabilities(context.outputs, rows, role, with_options=split in ("real_authors", "world_facts"))
            scores.mean(f"tofu/probability/{split}", role, values, better)
            scores.mean(f"tofu/rougeL_recall/{split}", role, recalls(context.outputs, rows), better)
    for split, role in {**ROLES, "forget": "forget_paraphrased"}.items():
        with scores.null_if_missing({f"tofu/truth_ratio/{split}": True}):
            transform = forget_truth_ratio if split == "forget" else utility_truth_ratio
            ratios = truth_ratios(context.outputs, context.rows(role), role)
            values = [None if ratio is None else transform(ratio) for ratio in ratios]
            scores.mean(f"tofu/truth_ratio/{split}", role, values, True)
    with scores.null_if_missing({"tofu/model_utility": True}):
        scores.add("tofu/model_utility", model_utility(scores), True)
    with scores.null_if_missing({"tofu/forget_quality": True}):
        rows = context.rows("forget_paraphrased")
        models = (context.model, context.find_retain_model())
        ratios = [truth_ratios(model.outputs, rows, "forget_paraphrased") for model in models]
        ours, theirs = ([ratio for ratio in of_model if ratio is not None] for of_model in ratios)
        if not ours or not theirs:
            raise Missing("no row of forget_paraphrased has a truth ratio")
        scores.add("tofu/forget_quality", forget_quality(ours, theirs), True, count=len(ours))


def probabilities(outputs: ModelOutputs, rows: Sequence[Row], role: str, with_options: bool) -> list[float | None]:
    """Every row's probability, `with_options` relative to its wrong answers."""
    answers = outputs.tokens_of_answers([row.pair for row in rows], with_tag=True)
    if not with_options:
        return [probability(tokens) for tokens in answers]
    wrong = wrong_answers(outputs, rows, role, with_tag=True)
    return [probability_among(*pair) for pair in zip(answers, wrong, strict=True)]


def recalls(outputs: ModelOutputs, rows: Sequence[Row]) -> list[float]:
    """Every row's ROUGE-L recall of the greedy answer."""
    answers = outputs.answers([row.question for row in rows])
    return [rouge_l_recall(row.answer, answer) for row, answer in zip(rows, answers, strict=True)]


def truth_ratios(outputs: ModelOutputs, rows: Sequence[Row], role: str) -> list[float | None]:
    """Every row's truth ratio; the paraphrased answer, if the row has one, is the true answer."""
    wrong = wrong_answers(outputs, rows, role, with_tag=True)
    pairs = [(row.question, row.paraphrased_answer or row.answer) for row in rows]
    true = outputs.tokens_of_answers(pairs, with_tag=True)
    return [truth_ratio(*pair) for pair in zip(true, wrong, strict=True)]


def wrong_answers(
    outputs: ModelOutputs, rows: Sequence[Row], role: str, with_tag: bool = False
) -> list[list[TokenLogProbs]]:
    """The tokens of every row's perturbed answers.

    Args:
        with_tag: as in `ModelOutputs.tokens_of_answers`.
    Raises:
        Missing: when a row has none.
    """
    if not all(row.perturbed_answer for row in rows):
        raise Missing(f"the split of data.splits.{role} has rows without wrong answers (data.columns.perturbed_answer)")
    pairs = [(row.question, wrong) for row in rows for wrong in row.perturbed_answer]
    flat = iter(outputs.tokens_of_answers(pairs, with_tag))
    return [[next(flat) for _ in row.perturbed_answer] for row in rows]


def model_utility(scores: Scores) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real_authors and world_facts; in [0, 1].

    Raises:
        Missing: when one of the nine is null.
    """
    names = [f"tofu/{kind}/{split}" for kind in ("probability", "rougeL_recall", "truth_ratio") for split in UTILITY]
    if absent := [name for name in names if scores[name].value is None]:
        raise Missing(f"requires all nine of its parts; null: {', '.join(absent)}")
    return harmonic_mean([scores[name].value for name in names])
