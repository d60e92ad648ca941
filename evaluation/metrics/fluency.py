"""Refusals, repetition and perplexity of the forget answers.

Scores:
    fluency/refusals (neither): fraction of forget answers that contain a common phrase of refusal. Not shown: whether
        the refusal is appropriate.
    fluency/distinct_2 (higher): distinct pairs of neighboring words over all such pairs of a forget answer. Not shown:
        whether the answer makes sense; whether all questions have the same answer.
    fluency/perplexity (lower): perplexity of the forget answers under the model before unlearning. Not shown: whether
        the answers changed: the old answers have a low perplexity as well.
"""

import math
import re
from collections.abc import Sequence

from common.rouge import words
from evaluation.context import EvaluationContext
from evaluation.scores import Missing, Scores

REFUSAL = re.compile(
    r"\b(i|we) (do not|don't|can not|cannot|can't|could not|couldn't|am not|am unable|have no|haven't)\b"
    r"|\bi'm (not|sorry|afraid|unable)\b|\bas an ai\b|\bi apologi[sz]e\b|\bsorry\b|\bunable to (answer|provide|say)\b"
    r"|\b(no|not enough|insufficient) information\b|\bunknown to me\b|\bbeyond my knowledge\b",
)


def is_refusal(answer: str) -> bool:
    """Whether an answer contains a common phrase of refusal."""
    return bool(REFUSAL.search(answer.lower().replace("\u2019", "'")))


def distinct_2(answer: str) -> float | None:
    """Distinct pairs of neighboring words over all pairs; None for fewer than two words.

    1: no pair occurs twice; near 0: the same pairs are repeated throughout. Li et al. 2016 (arXiv 1510.03055) divide the
    distinct pairs of all answers by the number of words.
    """
    of_answer = words(answer.lower())
    pairs = list(zip(of_answer, of_answer[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else None


def perplexity(mean_log_probs: Sequence[float]) -> float:
    """exp(-m), where m is the mean over the answers of their mean token log-probability."""
    return math.exp(min(-math.fsum(mean_log_probs) / len(mean_log_probs), 700))


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Refusals, repetition and perplexity (under the model before unlearning) of the greedy forget answers."""
    rows = context.rows("forget")
    answers = context.outputs.answers([row.question for row in rows])
    scores.mean("fluency/refusals", "forget", [float(is_refusal(answer)) for answer in answers], None)
    scores.mean("fluency/distinct_2", "forget", [distinct_2(answer) for answer in answers], True)
    with scores.null_if_missing({"fluency/perplexity": False}):
        base = context.find_base_model().outputs
        pairs = [(row.question, answer) for row, answer in zip(rows, answers, strict=True)]
        of_answers = zip(answers, base.tokens_of_answers(pairs), strict=True)
        # An empty answer still has the token of a space where `model.prompt.answer` puts one before it.
        means = [tokens.without_eos().mean_log_prob if answer else None for answer, tokens in of_answers]
        kept = [mean for mean in means if mean is not None]
        if not kept:
            raise Missing("every forget answer is empty")
        scores.add("fluency/perplexity", perplexity(kept), False, count=len(kept), left_out=means.count(None))
        scores.rows["fluency/log_prob_before_unlearning"] = {"split": "forget", "values": means}
