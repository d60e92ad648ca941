"""Can an attacker infer that the model was trained on the forget rows? Six membership-inference attacks and privleak.

Each attack computes a value per row that tends to be higher for training rows. The AUC is the probability that the value of
a forget row is higher than that of a holdout row, on which no model was trained; ties count half. 0.5: the two kinds of rows
cannot be distinguished. Above: the forget rows are recognized as training rows. Below: unlearning lowered their
probabilities so much that they can be distinguished again.

The attacks use the probabilities of the answer given its question. All but the gradient norm leave out the EOS token.

Scores:
    privacy/auc/* (0.5; for reference: that of the retain-only model): AUC of a membership-inference attack (loss, zlib,
        min-k, min-k++, gradient norm, reference), forget rows against holdout rows. Not shown: what was learned from
        the rows.
    privacy/privleak (0): min-k's AUC relative to the retain-only model's; below 0: still recognized, above:
        probabilities too low. Not shown: what was learned from the rows.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from transformers import PreTrainedModel

from common.collate import collate
from common.config import Fraction, RunConfig, section
from common.data import Row, check_apart, load_split
from common.forward import evaluation_mode
from common.losses import answer_losses
from common.prompts import Example
from evaluation.context import EvaluationContext
from evaluation.model_outputs import ModelOutputs, TokenLogProbs
from evaluation.scores import Missing, Scores

SPLITS = ("forget", "holdout")


@section
class Privacy:
    min_k_fraction: Fraction = 0.4
    """Min-k and min-k++ average this fraction of the tokens, the least likely ones."""


def loss(answer: TokenLogProbs, text: str, settings: Privacy) -> float | None:
    """Minus the mean loss of a token (Yeom et al. 2018, arXiv 1709.01604)."""
    return answer.without_eos().mean_log_prob


def zlib_loss(answer: TokenLogProbs, text: str, settings: Privacy) -> float | None:
    """Minus the mean loss of a token over the bytes of the zlib-compressed text (Carlini et al. 2021, arXiv 2012.07805)."""
    mean = answer.without_eos().mean_log_prob
    return None if mean is None else mean / len(zlib.compress(text.encode()))


def min_k(answer: TokenLogProbs, text: str, settings: Privacy) -> float | None:
    """Mean log-probability of the least likely tokens (Shi et al. 2023, arXiv 2310.16789)."""
    return _mean_of_lowest(answer.without_eos().log_probs, settings.min_k_fraction)


def min_k_plus_plus(answer: TokenLogProbs, text: str, settings: Privacy) -> float | None:
    """Min-k of log-probabilities that are standardized by the model's distribution at each position (arXiv 2404.02936).

    (log p(token) - mean of log p) / standard deviation of log p, mean and deviation over the whole vocabulary under p.
    """
    tokens = answer.without_eos()
    standardized = (tokens.log_probs - tokens.logp_mean) / np.maximum(tokens.logp_std, 1e-6)
    return _mean_of_lowest(standardized, settings.min_k_fraction)


def _mean_of_lowest(values: np.ndarray, fraction: float) -> float | None:
    if len(values) == 0:
        return None
    return float(np.sort(values)[: max(1, int(fraction * len(values)))].mean(dtype=np.float64))


def gradients(model: PreTrainedModel, example: Example) -> list[torch.Tensor]:
    """The gradient of an answer's mean loss, for each parameter tensor that has one."""
    batch = {name: tensor.to(model.device) for name, tensor in collate([example]).items()}
    parameters = list(model.requires_grad_(True).parameters())
    with torch.enable_grad(), evaluation_mode(model):
        losses, _ = answer_losses(model, batch)
        found = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def gradient_norm(model: PreTrainedModel, example: Example) -> float | None:
    """Minus the L2 norm over all parameters of the gradient of the answer's mean loss; the EOS token is part of that loss.

    None if the answer has no token, or the gradient is not finite, as it may be in float16.

    Source: Wang et al. 2024 (arXiv 2402.17012).
    """
    if not example.answer:
        return None
    norm = sum(gradient.double().square().sum().item() for gradient in gradients(model, example)) ** 0.5
    return -norm if math.isfinite(norm) else None


Attack = Callable[[TokenLogProbs, str, Privacy], float | None]  # of the answer's tokens, and the text of these
ATTACKS: dict[str, Attack] = {"loss": loss, "zlib": zlib_loss, "min_k": min_k, "min_k_plus_plus": min_k_plus_plus}


def auc(members: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """Probability that a member's value is higher than another row's, ties count half; None if one side has no value."""
    ours, theirs = ([value for value in values if value is not None] for values in (members, others))
    if not ours or not theirs:
        return None
    return float(mannwhitneyu(ours, theirs, method="asymptotic").statistic / (len(ours) * len(theirs)))


def privleak(auc_of_model: float | None, auc_of_retain_model: float | None) -> float:
    """100 * ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain), AUC by min-k (MUSE, arXiv 2407.06460). 0 is best.

    Below 0: the forget rows are recognized more easily than with a model that was never trained on them. Above: their
    probabilities are too low.

    Raises:
        Missing: if one of them is None, or that of the retain-only model is 1.
    """
    if auc_of_model is None or auc_of_retain_model in (None, 1.0):
        raise Missing("requires the AUC by min-k of this model and, below 1, of the retain-only model")
    return 100 * ((1 - auc_of_model) - (1 - auc_of_retain_model)) / (1 - auc_of_retain_model)


def check_inputs(config: RunConfig, rows: dict[str, list[Row]]) -> None:
    """Check that the model was trained on no holdout row.

    Raises:
        UserError: if all of them are forget rows or retain rows.
    """
    if "holdout" in rows:
        for role in ("forget", "retain"):
            check_apart(rows.get(role) or load_split(config.data, role), rows["holdout"], "holdout", role)


def measure(context: EvaluationContext, scores: Scores) -> None:
    """The AUC of every attack, and privleak."""
    names = [f"privacy/auc/{name}" for name in (*ATTACKS, "gradient_norm", "reference")] + ["privacy/privleak"]
    with scores.null_if_missing(dict.fromkeys(names)):
        outputs, splits = context.outputs, [context.rows(role) for role in SPLITS]
        settings: Privacy = context.config.sections["privacy"]
        for name, attack in ATTACKS.items():
            _add_attack(scores, name, *(attacked(outputs, rows, attack, settings) for rows in splits))
        examples = [[outputs.example(row) for row in rows] for rows in splits]
        _add_attack(
            scores, "gradient_norm", *(outputs.each("gradient norms", each, gradient_norm) for each in examples)
        )
        with scores.null_if_missing({"privacy/auc/reference": None}):
            base = context.find_base_model().outputs
            if examples != [[base.example(row) for row in rows] for rows in splits]:
                raise Missing("the model before unlearning has a different tokenizer")
            _add_attack(scores, "reference", *(against_reference(outputs, base, rows, settings) for rows in splits))
        _add_privleak(context, scores, splits)


def attacked(outputs: ModelOutputs, rows: Sequence[Row], attack: Attack, settings: Privacy) -> list[float | None]:
    """An attack's value of every row."""
    answers = outputs.tokens_of_answers([row.pair for row in rows])
    texts = map(outputs.text_of_answer, rows)
    return [attack(tokens, text, settings) for tokens, text in zip(answers, texts, strict=True)]


def against_reference(
    outputs: ModelOutputs, base: ModelOutputs, rows: Sequence[Row], settings: Privacy
) -> list[float | None]:
    """Minus the mean loss of a token, plus that of the model before unlearning (Carlini et al. 2021, arXiv 2012.07805)."""
    pairs = zip(attacked(outputs, rows, loss, settings), attacked(base, rows, loss, settings), strict=True)
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


def add_auc(
    scores: Scores, name: str, members: list[float | None], others: list[float | None], ideal: float | None = 0.5
) -> None:
    """Record the AUC of an attack under this name, from its values of the forget and of the holdout rows."""
    value = auc(members, others)
    note = None if value is not None else "no row of forget or of holdout has a value"
    left_out = (*members, *others).count(None)
    count = len(members) + len(others) - left_out
    scores.add(name, value, None, count=count, ideal=ideal, left_out=left_out, note=note)


def _add_attack(scores: Scores, name: str, members: list[float | None], others: list[float | None]) -> None:
    """`add_auc`, and the value of each row."""
    # The model before unlearning was trained on the forget rows: relative to it, even a retain-only model is far below 0.5.
    add_auc(scores, f"privacy/auc/{name}", members, others, ideal=None if name == "reference" else 0.5)
    for split, values in zip(SPLITS, (members, others), strict=True):
        scores.rows[f"privacy/{name}/{split}"] = {"split": split, "values": values}


def _add_privleak(context: EvaluationContext, scores: Scores, splits: list[list[Row]]) -> None:
    note, reference = None, 0.5
    try:
        retain_model = context.find_retain_model().outputs
        settings = context.config.sections["privacy"]
        reference = auc(*(attacked(retain_model, rows, min_k, settings) for rows in splits))
    except Missing as missing:
        note = f"against an AUC of 0.5: {missing}"
    value = privleak(scores["privacy/auc/min_k"].value, reference)
    scores.add("privacy/privleak", value, None, ideal=0.0, note=note)
