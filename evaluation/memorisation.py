"""How much of the forget answers a model has by heart, read off its likeliest tokens under teacher forcing.

Both scores are in [0, 1]; lower is better on forget. The end token is left out, as in OpenUnlearning (arXiv 2506.12618).
"""

import numpy as np

from evaluation.case import Case
from evaluation.passes import Tokens
from evaluation.scores import Scores


def extraction_strength(answer: Tokens) -> float | None:
    """1 - k/|y|, k the shortest beginning of the answer after which every remaining token is the likeliest.

    Source: Carlini et al. 2021 (arXiv 2012.07805), as in OpenUnlearning (arXiv 2506.12618).
    """
    likeliest = answer.words().is_likeliest
    if len(likeliest) == 0:
        return None
    wrong = np.flatnonzero(~likeliest)
    needed = wrong[-1] + 1 if len(wrong) else 0
    return 1 - float(needed) / len(likeliest)


def exact_memorisation(answer: Tokens) -> float | None:
    """Share of the answer's tokens that are the likeliest after the true tokens before them.

    Source: Tirumala et al. 2022 (arXiv 2205.10770), as in OpenUnlearning (arXiv 2506.12618).
    """
    likeliest = answer.words().is_likeliest
    return float(likeliest.mean()) if len(likeliest) else None


def measure(case: Case, scores: Scores) -> None:
    """Both scores on the forget rows."""
    answers = case.subject.tokens_of_answers([(row.question, row.answer) for row in case.rows("forget")])
    for metric in (extraction_strength, exact_memorisation):
        scores.mean(f"memorisation/{metric.__name__}", "forget", [metric(answer) for answer in answers], False)
