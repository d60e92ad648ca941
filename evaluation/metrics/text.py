"""How much of texts is memorized: word for word, and as knowledge that questions about them ask for.

Both after MUSE (arXiv 2407.06460), from greedy answers to the prompts of `model.prompt`; all scores are in [0, 1]. The group
`muse` has MUSE's own prompts, lengths and words. The texts are the rows of the role
forget_passages, or without it the windows (`data.windows`) of the role forget; the questions are those of the roles
forget_questions and retain_questions.

Scores:
    text/verbmem (lower): mean ROUGE-L F1 of the continuations of the forget texts. Not shown: the same facts in other
        words.
    text/knowmem/* (lower on forget_questions, higher on retain_questions): mean ROUGE-L F1 of the answers to questions
        about the texts. Not shown: whether the word that matters is right.
    text/rougeL_recall/* (lower on forget_questions, higher on retain_questions): mean ROUGE-L recall of these answers, as in
        RWKU (arXiv 2406.10890). Not shown: what an answer contains besides the reference.
    text/exact_match/* (lower on forget_questions, higher on retain_questions): fraction of these answers that are the
        true one, without case and punctuation. Not shown: true answers within a longer one; symbols beside words (C++, C#).
    text/contains_answer/* (lower on forget_questions, higher on retain_questions): fraction of these answers in which the
        words of the true one stand one after the other; a long number in any notation, as "(721) 625 3765" for 721-625-3765.
        Not shown: whether the answer denies it; answers with one wrong letter or digit; minus signs and decimal points.
"""

import logging
import unicodedata
from collections.abc import Callable, Sequence

import regex

from common.data import Row
from common.prompts import check_passages_fit, warn_if_cut
from common.rouge import rouge_l_f1, rouge_l_recall, rouge_tokens, use_words, words
from evaluation.context import EvaluationContext
from evaluation.metrics.headline import warn_of_other_scripts
from evaluation.scores import Missing, Scores

log = logging.getLogger(__name__)
# A word has its vowel signs and accents (\p{M}), and a number its minus sign.
WORD = regex.compile(r"(?:(?<!\w)-(?=\d))?[\w\p{M}]+")
LONG_NUMBER = 7  # digits of a telephone number
MAX_LENGTH_RATIO = 1.5  # words of the continuations over those of the true ones, beyond which a warning is given
QUESTION_ROLES = {"forget_questions": False, "retain_questions": True}  # role: whether higher is better


def exact_match(reference: str, answer: str) -> float:
    """1 if both have the same words in the same order, without case and punctuation; else 0.

    A reference without letters and digits, such as "$", must be given as it is.
    """
    expected, given = (
        unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold().strip() for text in (reference, answer)
    )
    if of_reference := WORD.findall(expected):
        return float(of_reference == WORD.findall(given))
    return float(expected == given)


def contains_answer(reference: str, answer: str) -> float:
    """1 if the reference's words stand in the answer one after the other, without case and punctuation; else 0.

    Numbers of at least LONG_NUMBER digits may be written with other spaces and signs, and after a country code (+1). A
    reference without letters and digits, such as "$", must be given as it is.

    >>> contains_answer("721-625-3765", "Her number is (721) 625 3765."), contains_answer("721-625-3765", "+17216253765")
    (1.0, 1.0)
    """
    with use_words("unicode"):
        expected, given = (rouge_tokens(text.casefold(), stemmed=False) for text in (reference, answer))
    if not expected:
        return exact_match(reference, answer)
    number = "".join(expected)
    if number.isdecimal() and len(number) >= LONG_NUMBER:
        return float(has_number(number, unicodedata.normalize("NFKC", answer)))
    return float(any(given[start : start + len(expected)] == expected for start in range(len(given))))


def has_number(number: str, text: str) -> bool:
    """Whether a text has these digits, with spaces and signs between them, and neither in a longer run of letters and digits
    nor behind a decimal point. Before them a country code may stand: with + or 00, or a 1 alone.
    """
    between = r"[^\p{L}\p{N}]*"
    digits, code = between.join(number), rf"(?:(?:\+|00)\d{{1,3}}|1){between}"
    return bool(regex.search(rf"(?<![a-z\d])(?<!\d[.,])(?:{code})?{digits}(?![a-z\d])", text, regex.IGNORECASE))


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Verbatim memorization of the forget texts, and knowledge of the forget and retain texts."""
    with scores.null_if_missing({"text/verbmem": False}):
        given = context.config.data.splits.get("forget_passages") is not None
        role = "forget_passages" if given else "forget"
        rows = context.rows(role)
        if not given and not any(row.is_passage for row in rows):
            raise Missing("the forget rows are no texts (data.columns.text, data.splits.forget_passages)")
        pairs = [row.pair for row in rows if given or row.is_passage]
        max_length = context.config.evaluation.max_length
        check_passages_fit(context.outputs.prompts, pairs, max_length, "evaluation.max_length")
        answers = context.outputs.answers([row.question for row in rows])
        warn_of_long_continuations(rows, answers)
        pairs = zip(rows, answers, strict=True)
        values = [compared(rouge_l_f1, row, answer) if given or row.is_passage else None for row, answer in pairs]
        scores.mean("text/verbmem", role, values, False)
    for role, better in QUESTION_ROLES.items():
        names = [f"text/{name}/{role}" for name in ("knowmem", "rougeL_recall", "exact_match", "contains_answer")]
        with scores.null_if_missing(dict.fromkeys(names, better)):
            rows = context.rows(role)
            pairs = [row.pair for row in rows]
            warn_if_cut(context.outputs.prompts, pairs, context.config.evaluation.max_length, "evaluation.max_length")
            answers = context.outputs.answers([row.question for row in rows])
            warn_of_other_scripts([row.answer for row in rows], context.config.data.words)
            for name, metric in zip(names, (rouge_l_f1, rouge_l_recall, exact_match, contains_answer), strict=True):
                pairs = zip(rows, answers, strict=True)
                scores.mean(name, role, [compared(metric, row, answer) for row, answer in pairs], better)


def warn_of_long_continuations(rows: Sequence[Row], answers: Sequence[str]) -> None:
    """Warn if the model goes on where a text ends: F1 is then low even for a text that is there word for word."""
    true, given = (sum(len(words(text)) for text in texts) for texts in ([row.answer for row in rows], answers))
    if given > MAX_LENGTH_RATIO * true:
        log.warning(
            "text/verbmem: the continuations have %.1f times as many words as the true ones, which lowers F1; "
            "lower evaluation.max_length, or use metrics=muse, which cuts both",
            given / true,
        )


def compared(metric: Callable[[str, str], float], row: Row, answer: str) -> float | None:
    """The metric of an answer; None for ROUGE if the true answer has no words, as each answer would score 0."""
    if metric in (rouge_l_f1, rouge_l_recall) and not rouge_tokens(row.answer):
        return None
    return metric(row.answer, answer)
