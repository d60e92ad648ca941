"""How unlearning changed the token probabilities of unrelated text.

Scores:
    side_effects/probability_shift (0): mean change in the token probabilities of unrelated text since the model before
        unlearning, with a histogram. Not shown: which text is affected; changes that cancel out.
    side_effects/probability_shift_deviation (0): standard deviation of that change. Not shown: which text is affected.
"""

import numpy as np

from common.data import Row
from common.prompts import Example
from evaluation.context import EvaluatedModel, EvaluationContext
from evaluation.scores import Missing, Scores

HISTOGRAM_EDGES = np.linspace(-1, 1, 41)


def as_text(model: EvaluatedModel, row: Row, max_length: int) -> Example:
    """A row as plain text, "question answer", without a prompt format; its first token serves as the prompt."""
    ids = model.tokenizer(f"{row.question} {row.answer}", add_special_tokens=False)["input_ids"][:max_length]
    return Example(ids[:1], ids[1:])


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Mean and deviation, over the tokens of the `unrelated` split, of p(token) minus its value before unlearning.

    Source: the PMC paper (arXiv 2507.04219). Both are 0 without side effects; the histogram is in result.json.
    """
    names = ["side_effects/probability_shift", "side_effects/probability_shift_deviation"]
    with scores.null_if_missing({names[0]: None, names[1]: False}):
        rows = context.rows("unrelated")
        models = (context.model, context.find_base_model())
        texts = [[as_text(model, row, context.config.data.max_length) for row in rows] for model in models]
        if texts[0] != texts[1]:
            raise Missing("the model before unlearning has a different tokenizer")
        ours, theirs = (
            np.exp(np.concatenate([tokens.log_probs for tokens in model.outputs.tokens(examples)]).astype(np.float64))
            for model, examples in zip(models, texts, strict=True)
        )
        if not len(ours):
            raise Missing("no row of unrelated has at least two tokens")
        shift = ours - theirs
        counts, _ = np.histogram(shift, HISTOGRAM_EDGES)
        histogram = {"edges": HISTOGRAM_EDGES.round(2).tolist(), "counts": counts.tolist()}
        scores.add(names[0], float(shift.mean()), None, count=len(shift), ideal=0.0, histogram=histogram)
        scores.add(names[1], float(shift.std()), False, count=len(shift), ideal=0.0)
