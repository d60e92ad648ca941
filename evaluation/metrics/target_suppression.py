"""Attack: select the true answer among options by its probability.

Scores:
    target_suppression/least_likely (chance, and the value of the retain-only model): how often the true answer is the
        least likely of the options. Not shown: options that are not in the data set.
    target_suppression/most_likely (chance, and the value of the retain-only model): how often the true answer is the
        most likely of the options. Not shown: options that are not in the data set.
    target_suppression/chance (neither): one over the number of options. Not shown: anything about the model.
"""

from collections.abc import Sequence

from evaluation.context import EvaluationContext
from evaluation.metrics.tofu import wrong_answers
from evaluation.model_outputs import TokenLogProbs
from evaluation.scores import Missing, Scores


def extreme_credit(true: float, wrong: Sequence[float], least: bool) -> float:
    """1 if the true option is the least (or the most) likely, 1/m if it ties with m - 1 others, 0 otherwise."""
    extreme = (min if least else max)(true, *wrong)
    return 1 / (1 + list(wrong).count(true)) if true == extreme else 0.0


def measure(context: EvaluationContext, scores: Scores) -> None:
    """How often the paraphrased true answer is the least and the most likely option, and how often by chance.

    If unlearning suppressed the true answer, the least likely option is the best guess. Options are compared by mean token
    log-probability. Source: the PMC paper (arXiv 2507.04219).
    """
    names = [f"target_suppression/{name}" for name in ("least_likely", "most_likely", "chance")]
    with scores.null_if_missing(dict.fromkeys(names)):
        role = "forget_paraphrased"
        rows = context.rows(role)
        if any(row.paraphrased_answer is None for row in rows):
            raise Missing(f"the split of data.splits.{role} has rows without a paraphrased answer")
        wrong = wrong_answers(context.outputs, rows, role)
        true = context.outputs.tokens_of_answers([(row.question, row.paraphrased_answer) for row in rows])
        credits = [_credits(*options) for options in zip(true, wrong, strict=True)]
        for name, values in zip(names, zip(*credits, strict=True), strict=True):
            scores.mean(name, role, values, None)


def _credits(true: TokenLogProbs, wrong: Sequence[TokenLogProbs]) -> tuple[float | None, ...]:
    """The credit for the least likely option, that for the most likely one, and the chance of either."""
    first, *others = (tokens.mean_log_prob for tokens in (true, *wrong))
    if first is None or None in others:
        return None, None, None
    return extreme_credit(first, others, True), extreme_credit(first, others, False), 1 / (1 + len(others))
