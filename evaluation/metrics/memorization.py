"""How much of the forget answers is memorized: which of their tokens are the argmax under teacher forcing.

Both scores are in [0, 1], and lower is better. The EOS token is left out.

Scores:
    memorization/extraction_strength (lower): fraction of the answer that greedy decoding reproduces, given the shortest
        beginning of it after which all the rest is reproduced. Not shown: the same facts in other words.
    memorization/exact_memorization (lower): fraction of the answer's tokens that are the argmax given the true tokens
        before them. Not shown: the same facts in other words.
"""

import numpy as np

from evaluation.context import EvaluationContext
from evaluation.model_outputs import TokenLogProbs
from evaluation.scores import Scores


def extraction_strength(answer: TokenLogProbs) -> float | None:
    """1 - k/|y|, where k is the length of the shortest prefix of the answer after which every token is the argmax.

    Source: Carlini et al. 2021 (arXiv 2012.07805). OpenUnlearning (arXiv 2506.12618) has 1/|y| where this is 0.
    """
    is_argmax = answer.without_eos().is_argmax
    if len(is_argmax) == 0:
        return None
    wrong = np.flatnonzero(~is_argmax)
    needed = wrong[-1] + 1 if len(wrong) else 0
    return 1 - float(needed) / len(is_argmax)


def exact_memorization(answer: TokenLogProbs) -> float | None:
    """Fraction of the answer's tokens that are the argmax given the true tokens before them.

    Source: Tirumala et al. 2022 (arXiv 2205.10770), as in OpenUnlearning (arXiv 2506.12618).
    """
    is_argmax = answer.without_eos().is_argmax
    return float(is_argmax.mean()) if len(is_argmax) else None


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Both scores on the forget rows."""
    answers = context.outputs.tokens_of_answers([row.pair for row in context.rows("forget")])
    for metric in (extraction_strength, exact_memorization):
        scores.mean(f"memorization/{metric.__name__}", "forget", [metric(answer) for answer in answers], False)
