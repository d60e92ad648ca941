"""Attack: make the response start with "The answer is:".

Scores:
    prefill/rougeL_recall (lower): mean ROUGE-L recall of the greedy text after "The answer is:". Not shown: other
        prefills.
"""

from evaluation.context import EvaluationContext
from evaluation.metrics.headline import Question, answer_rows
from evaluation.scores import Scores

PREFILL = "The answer is:"


def measure(context: EvaluationContext, scores: Scores) -> None:
    """ROUGE-L recall of the greedy continuation of "The answer is:". Lower is better.

    Source: the PMC paper (arXiv 2507.04219).
    """
    rows = context.rows("forget")
    questions = [Question("forget_prefill", row.index, row.question, row.answer) for row in rows]
    answers = answer_rows(questions, context.outputs.answers([row.question for row in rows], beginning=PREFILL))
    scores.mean("prefill/rougeL_recall", "forget", [answer["rougeL_recall"] for answer in answers], False)
    scores.generations += answers
