"""The two headline scores of the PMC paper (arXiv 2507.04219), from greedy answers by ROUGE-L recall.

    unlearn_quality = 50 * (2 - R[forget] - R[paraphrased question against paraphrased answer of forget])
    utility         = 100/3 * (R[retain] + R[real_authors] + R[world_facts])

R[split] is the mean over the split's rows. A data set without paraphrases, real_authors or world_facts has the means of the
splits that it has: unlearn_quality = 100 * (1 - mean R of the forget splits), utility = 100 * mean R of the others.

Both are percentages, higher is better. Neither depends on fluency: an empty or garbled forget answer scores as well as a
sensible wrong one, so the length of the forget answers and the fraction of empty ones are reported as well.

Scores:
    unlearn_quality (higher): 100 * (1 - mean ROUGE-L recall of greedy answers to the forget and the paraphrased forget
        questions). Not shown: fluency; what sampling or token probabilities reveal.
    utility (higher): 100 * mean ROUGE-L recall of greedy answers to retain, real authors and world facts questions. Not
        shown: fluency; which of the splits fell.
    rougeL_recall/* (lower on forget and forget_paraphrased, higher elsewhere): mean ROUGE-L recall of the greedy
        answers of one split. Not shown: fluency; what is said beside the reference answer.
    forget_answer_words (neither): mean number of words of a forget answer. Not shown: what the words say.
    forget_answers_empty (lower): fraction of forget answers without a word. Not shown: whether the others make sense.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from common.config import DataConfig, EvaluationConfig
from common.data import Row, load_splits, scored_retain_rows
from common.errors import UserError
from common.rouge import rouge_l_recall
from evaluation.context import EvaluationContext
from evaluation.model_outputs import ModelOutputs
from evaluation.scores import Scores

FORGET_ROLES = ("forget", "forget_paraphrased")
UTILITY_ROLES = ("retain", "real_authors", "world_facts")
ROLES = FORGET_ROLES + UTILITY_ROLES
NEEDED = ("forget", "retain")
HIGHER_IS_BETTER = {
    "unlearn_quality": True,
    "utility": True,
    "rougeL_recall/forget": False,
    "rougeL_recall/forget_paraphrased": False,
    "rougeL_recall/retain": True,
    "rougeL_recall/real_authors": True,
    "rougeL_recall/world_facts": True,
    "forget_answer_words": None,
    "forget_answers_empty": False,
}


@dataclass(frozen=True)
class Question:
    """A question, with the reference answer of its recall."""

    split: str
    index: int
    question: str
    reference: str


def load_questions(data: DataConfig, evaluation: EvaluationConfig) -> list[Question]:
    """The questions of every split that the headline scores need.

    Raises:
        UserError: when a split is missing or the paraphrased forget rows lack their paraphrases.
    """
    roles = tuple(role for role in ROLES if role in NEEDED or data.splits.get(role) is not None)
    rows = load_splits(data, roles)
    rows["retain"] = scored_retain_rows(rows["retain"], evaluation.full_eval)
    questions = []
    for split in roles:
        for row in rows[split]:
            question, reference = row.question, row.answer
            if split == "forget_paraphrased":
                question, reference = _paraphrase(row, data)
            questions.append(Question(split, row.index, question, reference))
    return questions


def _paraphrase(row: Row, data: DataConfig) -> tuple[str, str]:
    if row.paraphrased_question is None or row.paraphrased_answer is None:
        raise UserError(
            f"data.splits.forget_paraphrased={data.splits['forget_paraphrased']}: row {row.index} has no paraphrase; the "
            "split needs the columns that data.columns.paraphrased_question and .paraphrased_answer name"
        )
    return row.paraphrased_question, row.paraphrased_answer


def measure(context: EvaluationContext, scores: Scores) -> None:
    """The headline scores of one model."""
    add_scores(scores, context.outputs, load_questions(context.config.data, context.config.evaluation))


def add_scores(scores: Scores, outputs: ModelOutputs, questions: Sequence[Question]) -> None:
    """Add a model's headline scores and its answers."""
    values, rows = score_outputs(outputs, questions)
    of_split = {f"rougeL_recall/{split}": count for split, count in counts(questions).items()}
    of_split |= dict.fromkeys(("forget_answer_words", "forget_answers_empty"), of_split["rougeL_recall/forget"])
    for name, value in values.items():
        scores.add(name, value, HIGHER_IS_BETTER[name], count=of_split.get(name))
    scores.generations += rows


def score_outputs(outputs: ModelOutputs, questions: Sequence[Question]) -> tuple[dict[str, float], list[dict]]:
    """The headline scores of a model's greedy answers, and one row per answer."""
    return score_answers(questions, outputs.answers([question.question for question in questions]))


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


def score_answers(questions: Sequence[Question], answers: Sequence[str]) -> tuple[dict[str, float], list[dict]]:
    """The headline scores, and one row per answer with its recall."""
    rows = answer_rows(questions, answers)
    splits = counts(questions)
    recall = {split: fmean(row["rougeL_recall"] for row in rows if row["split"] == split) for split in splits}
    forget_words = [len(row["answer"].split()) for row in rows if row["split"] == "forget"]
    scores = {
        "unlearn_quality": 100 * (1 - fmean(recall[split] for split in FORGET_ROLES if split in recall)),
        "utility": 100 * fmean(recall[split] for split in UTILITY_ROLES if split in recall),
        **{f"rougeL_recall/{split}": value for split, value in recall.items()},
        "forget_answer_words": fmean(forget_words),
        "forget_answers_empty": fmean(words == 0 for words in forget_words),
    }
    return scores, rows


def counts(questions: Sequence[Question]) -> dict[str, int]:
    """How many rows the mean of each split is taken over."""
    rows = Counter(question.split for question in questions)
    return {split: rows[split] for split in ROLES if split in rows}
