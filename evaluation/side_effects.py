"""What unlearning did besides: to the probabilities of unrelated text, and to the language of the forget answers.

Unlearn quality alone rewards gibberish, silence and refusals; these scores show them.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from common.data import Row
from common.prompts import Example
from evaluation.case import Case, Model
from evaluation.scores import Missing, Scores

HISTOGRAM_EDGES = np.linspace(-1, 1, 41)
REFUSAL = re.compile(
    r"\b(i|we) (do not|don't|can not|cannot|can't|could not|couldn't|am not|am unable|have no|haven't)\b"
    r"|\bi'm (not|sorry|afraid|unable)\b|\bas an ai\b|\bi apologi[sz]e\b|\bsorry\b|\bunable to (answer|provide|say)\b"
    r"|\b(no|not enough|insufficient) information\b|\bunknown to me\b|\bbeyond my knowledge\b",
)


# --- unrelated text ----------------------------------------------------------------------------------------------------


def as_text(model: Model, row: Row, max_length: int) -> Example:
    """A row as running text, "question answer" without any prompt format; its first token is the beginning."""
    ids = model.tokenizer(f"{row.question} {row.answer}", add_special_tokens=False)["input_ids"][:max_length]
    return Example(ids[:1], ids[1:])


def measure_side_effects(case: Case, scores: Scores) -> None:
    """p(token) minus that of the model before unlearning, over the tokens of the `unrelated` split: mean and deviation.

    Source: the PMC paper (arXiv 2507.04219). Both are 0 for a model without side effects; the histogram is in result.json.
    """
    names = ["side_effects/probability_shift", "side_effects/probability_shift_deviation"]
    with scores.null_if_missing({names[0]: None, names[1]: False}):
        rows = case.rows("unrelated")
        models = (case.model, case.find_base_model())
        texts = [[as_text(model, row, case.config.data.max_length) for row in rows] for model in models]
        if texts[0] != texts[1]:
            raise Missing("the model before unlearning has another tokenizer")
        ours, theirs = (
            np.exp(np.concatenate([tokens.log_probs for tokens in model.subject.tokens(examples)]).astype(np.float64))
            for model, examples in zip(models, texts, strict=True)
        )
        if not len(ours):
            raise Missing("no row of unrelated has two tokens")
        shift = ours - theirs
        scores.add(names[0], float(shift.mean()), None, len(shift), ideal=0.0)
        scores.add(names[1], float(shift.std()), False, len(shift), ideal=0.0)
        counts, _ = np.histogram(shift, HISTOGRAM_EDGES)
        scores.histograms[names[0]] = {"edges": HISTOGRAM_EDGES.round(2).tolist(), "counts": counts.tolist()}


# --- the language of forget answers ------------------------------------------------------------------------------------


def is_refusal(answer: str) -> bool:
    """Whether an answer says that it does not answer, by common turns of phrase."""
    return bool(REFUSAL.search(answer.lower().replace("\u2019", "'")))


def distinct_2(answer: str) -> float | None:
    """Different pairs of neighbouring words over all pairs (Li et al. 2016, arXiv 1510.03055); None below two words.

    1: nothing is repeated; near 0: the answer goes round in circles.
    """
    words = answer.lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else None


def perplexity(mean_log_probs: Sequence[float]) -> float:
    """exp of minus the mean over answers of their mean token log-probability."""
    return math.exp(min(-math.fsum(mean_log_probs) / len(mean_log_probs), 700))


def measure_fluency(case: Case, scores: Scores) -> None:
    """Of the greedy forget answers: refusals, repetition, and perplexity under the model before unlearning.

    Their length and the share of empty ones stand with the headline scores.
    """
    rows = case.rows("forget")
    answers = case.subject.answers([row.question for row in rows])
    scores.mean("fluency/refusals", "forget", [float(is_refusal(answer)) for answer in answers], None)
    scores.mean("fluency/distinct_2", "forget", [distinct_2(answer) for answer in answers], True)
    with scores.null_if_missing({"fluency/perplexity": False}):
        base = case.find_base_model().subject
        pairs = [(row.question, answer) for row, answer in zip(rows, answers, strict=True)]
        means = [tokens.words().mean_log_prob for tokens in base.tokens_of_answers(pairs)]
        kept = [mean for mean in means if mean is not None]
        if not kept:
            raise Missing("every forget answer is empty")
        scores.add("fluency/perplexity", perplexity(kept), False, len(kept))
        scores.rows["fluency/log_prob_before_unlearning"] = {"split": "forget", "values": means}
        if len(kept) < len(means):
            scores.left_out["fluency/perplexity"] = len(means) - len(kept)
