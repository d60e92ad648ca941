"""The TOFU scores of OpenUnlearning (arXiv 2506.12618), under its names and with its conventions, to compare with its tables.

Read from its code (github.com/locuslab/open-unlearning, src/evals). Where it differs from the groups tofu, memorization and
privacy: 1e-10 is added to denominators; the extraction strength is at least 1/|y|; the loss and zlib attacks include the
EOS token, and zlib compresses the answer as decoded from its tokens; min-k and min-k++ use 40% of the tokens, whatever
`privacy.min_k_fraction` is; min-k++ has a variance of at least 1e-6; the gradient norm is the mean of the tensors' norms,
without the EOS token. Prompts are those of the configuration (`model.prompt`), not OpenUnlearning's.

Scores:
    openunlearning/forget_Q_A_Prob (lower): length-normalized probability of the answer. Not shown: what is answered
        instead.
    openunlearning/forget_Q_A_PARA_Prob (lower): that of the paraphrased answer. Not shown: what is answered instead.
    openunlearning/forget_Q_A_ROUGE (lower): ROUGE-L recall of the greedy answers. Not shown: what sampling reveals.
    openunlearning/forget_Truth_Ratio (higher): mean of min(r, 1/r) of the truth ratio r, wrong over true. Not shown:
        whether either is likely at all.
    openunlearning/forget_Truth_Ratio_prob_mean (lower): mean of p/(p + q), p the paraphrase's, q the wrong answers'
        probability. Not shown: whether either is likely at all.
    openunlearning/forget_quality (higher): p-value of the Kolmogorov-Smirnov test of the truth ratios against those of
        the retain-only model. Not shown: the size of a difference.
    openunlearning/retain_* (higher): probability, ROUGE-L recall and truth ratio on retain. Not shown: fluency.
    openunlearning/ra_* (higher): the same on real authors. Not shown: fluency.
    openunlearning/wf_* (higher): the same on world facts. Not shown: fluency.
    openunlearning/model_utility (higher): harmonic mean of these nine. Not shown: which of them became worse.
    openunlearning/extraction_strength (lower): that of the group memorization, at least 1/|y|. Not shown: the same facts
        in other words.
    openunlearning/exact_memorization (lower): that of the group memorization. Not shown: the same facts in other words.
    openunlearning/mia_* (0.5; for reference: that of the retain-only model): AUC of the membership-inference attacks loss,
        zlib, min_k, min_k_plus_plus and gradnorm, forget rows against holdout rows. Not shown: what was learned.
    openunlearning/privleak (0): min-k's AUC relative to the retain-only model's. Not shown: what was learned.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
from scipy.stats import hmean, ks_2samp
from transformers import PreTrainedModel

from common.data import Row
from common.prompts import Example
from evaluation.context import EvaluationContext
from evaluation.metrics import memorization, privacy, tofu
from evaluation.model_outputs import ModelOutputs, TokenLogProbs
from evaluation.scores import Missing, Scores

EPSILON = 1e-10  # added to denominators
MIN_K = privacy.Privacy(min_k_fraction=0.4)
SHORT = {"retain": "retain", "real_authors": "ra", "world_facts": "wf"}  # split: its name in OpenUnlearning
PARTS = [
    f"{short}_{score}"
    for split, short in SHORT.items()
    for score in ("Q_A_Prob" if split == "retain" else "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
]


def probability_among(answer: TokenLogProbs, wrong: Sequence[TokenLogProbs]) -> float | None:
    """p(answer) / (p(answer) + sum of p(wrong answer) + 1e-10)."""
    true, *others = [tofu.probability(tokens) for tokens in (answer, *wrong)]
    return None if None in (true, *others) else true / (true + sum(others) + EPSILON)


def probabilities(true: TokenLogProbs, wrong: Sequence[TokenLogProbs]) -> tuple[float, float] | None:
    """(p, q): the true answer's length-normalized probability, and exp of the mean of the wrong answers' log-probabilities."""
    means = [tokens.mean_log_prob for tokens in (true, *wrong)]
    return None if None in means else (math.exp(means[0]), math.exp(fmean(means[1:])))


def truth_ratio(true: float, wrong: float) -> float:
    """q / (p + 1e-10)."""
    return wrong / (true + EPSILON)


def closer_to_1(ratio: float) -> float:
    """min(r, 1/(r + 1e-10))."""
    return min(ratio, 1 / (ratio + EPSILON))


def forget_quality(ratios: Sequence[float], retain_model_ratios: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test of the inverse truth ratios."""
    ours, theirs = (1 / (np.asarray(values) + EPSILON) for values in (ratios, retain_model_ratios))
    return float(ks_2samp(ours, theirs).pvalue)


def extraction_strength(answer: TokenLogProbs) -> float | None:
    """1 - k/|y|, with k at most |y| - 1; 0 for an empty answer."""
    strength = memorization.extraction_strength(answer)
    return 0.0 if strength is None else max(strength, 1 / len(answer.without_eos().log_probs))


def loss(answer: TokenLogProbs, text: str) -> float | None:
    """Minus the mean loss of a token, the EOS token among them."""
    return answer.mean_log_prob


def zlib_loss(answer: TokenLogProbs, text: str) -> float | None:
    """Minus the mean loss of a token, the EOS token among them, over the bytes of the compressed text."""
    return None if answer.mean_log_prob is None else answer.mean_log_prob / len(zlib.compress(text.encode()))


def min_k(answer: TokenLogProbs, text: str) -> float | None:
    """Mean log-probability of the 40% least likely tokens."""
    return privacy.min_k(answer, text, MIN_K)


def min_k_plus_plus(answer: TokenLogProbs, text: str) -> float | None:
    """Min-k of standardized log-probabilities, with a variance of at least 1e-6."""
    return privacy.min_k_plus_plus(replace(answer, logp_std=np.maximum(answer.logp_std, 1e-3)), text, MIN_K)


def gradient_norm(model: PreTrainedModel, example: Example) -> float | None:
    """Minus the mean over the parameter tensors of the L2 norm of the gradient of the mean loss; `example` without EOS."""
    if not example.answer:
        return None
    return -fmean(gradient.double().norm().item() for gradient in privacy.gradients(model, example))


ATTACKS = {"loss": loss, "zlib": zlib_loss, "min_k": min_k, "min_k_plus_plus": min_k_plus_plus}


def measure(context: EvaluationContext, scores: Scores) -> None:
    """All of OpenUnlearning's scores of one model."""
    _measure_forget(context, scores)
    for split, short in SHORT.items():
        _measure_utility(context, scores, split, short)
    names = [f"openunlearning/{part}" for part in PARTS]
    with scores.null_if_missing({"openunlearning/model_utility": True}):
        if absent := [name for name in names if scores[name].value is None]:
            raise Missing(f"requires all nine of its parts; null: {', '.join(absent)}")
        scores.add("openunlearning/model_utility", float(hmean([scores[name].value for name in names])), True)
    _measure_privacy(context, scores)


def _measure_forget(context: EvaluationContext, scores: Scores) -> None:
    outputs, rows = context.outputs, context.rows("forget")
    answers = outputs.tokens_of_answers([row.pair for row in rows])
    _mean(scores, "forget_Q_A_Prob", "forget", map(tofu.probability, answers), False)
    _mean(scores, "forget_Q_A_ROUGE", "forget", tofu.recalls(outputs, rows), False)
    _mean(scores, "extraction_strength", "forget", map(extraction_strength, answers), False)
    _mean(scores, "exact_memorization", "forget", map(memorization.exact_memorization, answers), False)
    of_paraphrases = {"forget_Q_A_PARA_Prob": False, "forget_Truth_Ratio": True, "forget_Truth_Ratio_prob_mean": False}
    with scores.null_if_missing({f"openunlearning/{name}": better for name, better in of_paraphrases.items()}):
        role, pairs = "forget_paraphrased", pairs_of(context, outputs, "forget_paraphrased")
        _mean(scores, "forget_Q_A_PARA_Prob", role, [pair and pair[0] for pair in pairs], False)
        _mean(scores, "forget_Truth_Ratio", role, [pair and closer_to_1(truth_ratio(*pair)) for pair in pairs], True)
        shares = [pair and pair[0] / (pair[0] + pair[1] + EPSILON) for pair in pairs]
        _mean(scores, "forget_Truth_Ratio_prob_mean", role, shares, False)
    with scores.null_if_missing({"openunlearning/forget_quality": True}):
        models = (context.model, context.find_retain_model())
        of_models = [pairs_of(context, model.outputs, "forget_paraphrased") for model in models]
        ours, theirs = ([truth_ratio(*pair) for pair in pairs if pair] for pairs in of_models)
        if not ours or not theirs:
            raise Missing("no row of forget_paraphrased has a truth ratio")
        scores.add("openunlearning/forget_quality", forget_quality(ours, theirs), True, count=len(ours))


def _measure_utility(context: EvaluationContext, scores: Scores, split: str, short: str) -> None:
    """Probability, ROUGE-L recall and truth ratio of one split, each of which is higher for a better model."""
    with scores.null_if_missing({f"openunlearning/{part}": True for part in PARTS if part.startswith(f"{short}_")}):
        role, outputs = tofu.ROLES[split], context.outputs
        rows = context.rows(role)
        answers = outputs.tokens_of_answers([row.pair for row in rows])
        if split == "retain":
            _mean(scores, "retain_Q_A_Prob", role, map(tofu.probability, answers), True)
        else:
            wrong = tofu.wrong_answers(outputs, rows, role)
            _mean(scores, f"{short}_Q_A_Prob_normalised", role, map(probability_among, answers, wrong), True)
        _mean(scores, f"{short}_Q_A_ROUGE", role, tofu.recalls(outputs, rows), True)
        ratios = [pair and max(0.0, 1 - truth_ratio(*pair)) for pair in pairs_of(context, outputs, role)]
        _mean(scores, f"{short}_Truth_Ratio", role, ratios, True)


def _measure_privacy(context: EvaluationContext, scores: Scores) -> None:
    names = [f"openunlearning/mia_{name}" for name in (*ATTACKS, "gradnorm")] + ["openunlearning/privleak"]
    with scores.null_if_missing(dict.fromkeys(names)):
        outputs, splits = context.outputs, [context.rows(role) for role in privacy.SPLITS]
        for name in ATTACKS:
            values = [attacked(outputs, rows, name) for rows in splits]
            privacy.add_auc(scores, f"openunlearning/mia_{name}", *values)
        examples = [[_without_eos(outputs, row) for row in rows] for rows in splits]
        norms = [outputs.each("gradient norms", each, gradient_norm) for each in examples]
        privacy.add_auc(scores, "openunlearning/mia_gradnorm", *norms)
        theirs = privacy.auc(*(attacked(context.find_retain_model().outputs, rows, "min_k") for rows in splits))
        value = privacy.privleak(scores["openunlearning/mia_min_k"].value, theirs)
        scores.add("openunlearning/privleak", value, None, ideal=0.0)


def pairs_of(context: EvaluationContext, outputs: ModelOutputs, role: str) -> list[tuple[float, float] | None]:
    """The `probabilities` of each row's paraphrase (the answer, if there is none) and wrong answers.

    Raises:
        Missing: when a row has no wrong answers.
    """
    rows = context.rows(role)
    wrong = tofu.wrong_answers(outputs, rows, role)
    true = outputs.tokens_of_answers([(row.question, row.paraphrased_answer or row.answer) for row in rows])
    return [probabilities(*pair) for pair in zip(true, wrong, strict=True)]


def attacked(outputs: ModelOutputs, rows: Sequence[Row], name: str) -> list[float | None]:
    """An attack's value of every row."""
    answers = outputs.tokens_of_answers([row.pair for row in rows])
    decode = outputs.prompts.tokenizer.decode
    texts = [decode(_without_eos(outputs, row).answer, skip_special_tokens=True) for row in rows]
    return [ATTACKS[name](tokens, text) for tokens, text in zip(answers, texts, strict=True)]


def _without_eos(outputs: ModelOutputs, row: Row) -> Example:
    """The example of a row, its answer without the EOS token."""
    return outputs.prompts.without_eos(outputs.example(row))


def _mean(scores: Scores, name: str, split: str, values: Iterable[float | None], higher_is_better: bool) -> None:
    scores.mean(f"openunlearning/{name}", split, list(values), higher_is_better)
