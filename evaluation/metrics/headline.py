"""The two headline scores of the PMC paper (arXiv 2507.04219): ROUGE-L recall of greedy answers.

    unlearn_quality = 50 * (2 - R[forget] - R[forget_paraphrased])
    utility         = 100/3 * (R[retain] + R[real_authors] + R[world_facts])

R[split] is the mean recall over the split's rows. On forget_paraphrased, paraphrased questions are scored against
paraphrased answers. If a data set lacks forget_paraphrased, real_authors or world_facts, only its other splits are used:
unlearn_quality = 100 * (1 - mean R of the forget splits), utility = 100 * mean R of the others. A note in the result then says
which splits the utility is of.

Both are percentages; higher is better. Neither depends on fluency: an empty or garbled forget answer gets the same score as
a sensible wrong one. The length of the forget answers and the fraction of empty ones are therefore reported as well.

Scores:
    unlearn_quality (higher): 100 * (1 - mean ROUGE-L recall of greedy answers to the forget and the paraphrased forget
        questions). Not shown: fluency; what sampling or token probabilities reveal.
    utility (higher): 100 * mean ROUGE-L recall of greedy answers to retain, real authors and world facts questions. Not
        shown: fluency; on which split the answers became worse.
    rougeL_recall/* (lower on forget and forget_paraphrased, higher elsewhere): mean ROUGE-L recall of the greedy
        answers of one split. Not shown: fluency; what an answer contains besides the reference.
    forget_answer_words (neither): mean number of words of a forget answer. Not shown: what the answers contain.
    forget_answers_empty (lower): fraction of empty forget answers. Not shown: whether the others make sense.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from common.config import DataConfig, EvaluationConfig
from common.data import (
    FORGET_ROLES,
    HEADLINE_ROLES,
    UTILITY_ROLES,
    Row,
    check_apart,
    load_splits,
    scored_retain_rows,
)
from common.errors import UserError
from common.prompts import PromptFormat, check_passages_fit, warn_if_cut
from common.rouge import rouge_l_recall, rouge_tokens, use_words, words
from evaluation.context import EvaluationContext
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A question, with the reference answer that its answer is scored against."""

    split: str
    index: int
    question: str
    reference: str
    is_passage: bool = False


def load_questions(data: DataConfig, evaluation: EvaluationConfig) -> list[Question]:
    """The questions of all splits that the headline scores are computed on.

    Raises:
        UserError: when a split is missing or a row of forget_paraphrased has no paraphrase.
    """
    roles = tuple(role for role in HEADLINE_ROLES if role in ("forget", "retain") or data.splits.get(role) is not None)
    rows = load_splits(data, roles)
    check_apart(rows["forget"], rows["retain"], "retain")
    if "forget_paraphrased" in rows:
        warn_of_other_rows(data, rows["forget"], rows["forget_paraphrased"])
    rows["retain"] = scored_retain_rows(rows["retain"], evaluation.full_eval)
    questions = []
    for split, row in [(role, row) for role in roles for row in rows[role]]:
        question, reference = row.question, row.answer
        if split == "forget_paraphrased":
            question, reference = row.paraphrased_question, row.paraphrased_answer
        if question is None or reference is None:
            raise UserError(
                f"data.splits.{split}={data.splits[split]}: row {row.index} has no paraphrase; the split needs the "
                "columns that data.columns.paraphrased_question and .paraphrased_answer name"
            )
        questions.append(Question(split, row.index, question, reference, row.is_passage))
    with use_words(data.words):
        check_words(questions, data.words)
    return questions


def warn_of_other_rows(data: DataConfig, forget: Sequence[Row], paraphrased: Sequence[Row]) -> None:
    """Warn if forget_paraphrased has other rows than forget: by their questions before paraphrasing, else by their number."""
    asked = {row.question for row in forget}
    originals = [row.question for row in paraphrased if row.paraphrased_question not in (None, row.question)]
    differ = set(originals) != asked if originals else len(paraphrased) != len(forget)
    if differ:
        known = f", of which {sum(question in asked for question in originals)} are of these" if originals else ""
        log.warning(
            "data.splits.forget_paraphrased=%s is not the paraphrase of data.splits.forget=%s: %d rows%s, and %d rows to be "
            "forgotten; half of unlearn_quality and the truth ratios are measured on it, so set both keys to the same rows",
            data.splits["forget_paraphrased"],
            data.splits["forget"],
            len(paraphrased),
            known,
            len(forget),
        )


def check_words(questions: Sequence[Question], kind: str) -> None:
    """Check that every reference has words to compare: without any, each answer would score 0.

    Raises:
        UserError: names the first row.
    """
    without = [question for question in questions if not rouge_tokens(question.reference)]
    if without:
        first = without[0]
        remedy = "set data.words=unicode" if kind == "latin" else "leave such rows out"
        raise UserError(
            f"data.splits.{first.split}, row {first.index}: the answer {first.reference[:60]!r} has no word that ROUGE can "
            f"compare with data.words={kind} (such answers in all splits: {len(without)}); {remedy}"
        )
    warn_of_other_scripts([question.reference for question in questions], kind)


def warn_of_other_scripts(answers: Sequence[str], kind: str) -> None:
    """Warn of answers of which ROUGE compares only a part; `kind` is `data.words`."""
    if kind == "latin" and (other := sum(map(is_mostly_of_another_script, answers))):
        log.warning(
            "%d of %d answers are mostly of another script, and ROUGE compares their words of a-z and 0-9 alone; set "
            "data.words=unicode",
            other,
            len(answers),
        )


def is_mostly_of_another_script(text: str) -> bool:
    """Whether more than half of the letters are neither a-z nor A-Z."""
    letters = [character for character in text if character.isalpha()]
    return sum(not letter.isascii() for letter in letters) > len(letters) / 2


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Add the evaluated model's headline scores and answers."""
    questions = load_questions(context.config.data, context.config.evaluation)
    max_length = context.config.evaluation.max_length
    check_questions_fit(context.outputs.prompts, questions, max_length)
    measured = score_outputs(context.outputs, questions)
    scores.by_name |= measured.by_name
    scores.generations += measured.generations


def check_questions_fit(prompts: PromptFormat, questions: Sequence[Question], max_length: int) -> None:
    """Refuse windows of a text, and warn of other questions, that have more tokens with their true answers than max_length."""
    passages, others = (
        [(question.question, question.reference) for question in questions if question.is_passage == is_passage]
        for is_passage in (True, False)
    )
    check_passages_fit(prompts, passages, max_length, "evaluation.max_length")
    warn_if_cut(prompts, others, max_length, "evaluation.max_length")


def score_outputs(outputs: ModelOutputs, questions: Sequence[Question]) -> Scores:
    """The headline scores of a model's greedy answers, and the answers."""
    return score_answers(questions, outputs.answers([question.question for question in questions]))


def score_answers(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """The headline scores, and one row per answer with its recall."""
    rows = answer_rows(questions, answers)
    recalls = {split: [row["rougeL_recall"] for row in rows if row["split"] == split] for split in HEADLINE_ROLES}
    means = {split: fmean(values) for split, values in recalls.items() if values}
    forget_words = [len(words(row["answer"])) for row in rows if row["split"] == "forget"]
    scores = Scores(generations=rows)
    scores.add("unlearn_quality", 100 * (1 - fmean(means[split] for split in FORGET_ROLES if split in means)), True)
    of_utility = [split for split in UTILITY_ROLES if split in means]
    note = None if {"real_authors", "world_facts"} <= means.keys() else f"of {', '.join(of_utility)} alone"
    scores.add("utility", 100 * fmean(means[split] for split in of_utility), True, note=note)
    for split, mean in means.items():
        scores.add(f"rougeL_recall/{split}", mean, split in UTILITY_ROLES, count=len(recalls[split]))
    scores.add("forget_answer_words", fmean(forget_words), None, count=len(forget_words))
    empty = forget_words.count(0) / len(forget_words)
    scores.add("forget_answers_empty", empty, False, count=len(forget_words))
    return scores


def answer_rows(questions: Sequence[Question], answers: Sequence[str]) -> list[dict]:
    """One row per answer with its recall, as in generations.jsonl."""
    return [
        {
            "split": question.split,
            "index": question.index,
            "question": question.question,
            "answer": answer,
            "reference": question.reference,
            "rougeL_recall": rouge_l_recall(question.reference, answer),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
