"""How much of texts is memorized: word for word, and as knowledge that questions about them ask for.

Both as in MUSE (arXiv 2407.06460), from greedy answers; all scores are in [0, 1]. The texts are the rows of the role
forget_passages, or without it the windows (`data.windows`) of the role forget; the questions are those of the roles
forget_questions and retain_questions.

Scores:
    text/verbmem (lower): mean ROUGE-L F1 of the continuations of the forget texts. Not shown: the same facts in other
        words.
    text/knowmem/* (lower on forget_questions, higher on retain_questions): mean ROUGE-L F1 of the answers to questions
        about the texts. Not shown: whether the word that matters is right.
    text/exact_match/* (lower on forget_questions, higher on retain_questions): fraction of these answers that are the
        true one, without case and punctuation. Not shown: true answers within a longer one.
"""

import re

from common.rouge import rouge_l_f1
from evaluation.context import EvaluationContext
from evaluation.scores import Missing, Scores

QUESTION_ROLES = {"forget_questions": False, "retain_questions": True}  # role: whether higher is better


def exact_match(reference: str, answer: str) -> float:
    """1 if both have the same words in the same order, without case and punctuation; else 0."""
    expected, given = (re.findall(r"\w+", text.casefold()) for text in (reference, answer))
    return float(expected == given)


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Verbatim memorization of the forget texts, and knowledge of the forget and retain texts."""
    with scores.null_if_missing({"text/verbmem": False}):
        given = context.config.data.splits.get("forget_passages") is not None
        role = "forget_passages" if given else "forget"
        rows = context.rows(role)
        if not given and not any(row.is_passage for row in rows):
            raise Missing("the forget rows are no texts (data.columns.text, data.splits.forget_passages)")
        answers = context.outputs.answers([row.question for row in rows])
        pairs = zip(rows, answers, strict=True)
        values = [rouge_l_f1(row.answer, answer) if given or row.is_passage else None for row, answer in pairs]
        scores.mean("text/verbmem", role, values, False)
    for role, better in QUESTION_ROLES.items():
        names = [f"text/knowmem/{role}", f"text/exact_match/{role}"]
        with scores.null_if_missing(dict.fromkeys(names, better)):
            rows = context.rows(role)
            answers = context.outputs.answers([row.question for row in rows])
            for name, metric in zip(names, (rouge_l_f1, exact_match), strict=True):
                pairs = zip(rows, answers, strict=True)
                scores.mean(name, role, [metric(row.answer, answer) for row, answer in pairs], better)
