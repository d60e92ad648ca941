"""OpenUnlearning's scores against its formulas, computed from plain forward passes and scikit-learn."""

import math
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from evaluation.metrics import openunlearning, privacy
from evaluation.metrics.registry import METRIC_GROUPS, PRESETS
from evaluation.scores import Scores
from tests.helpers import ROWS, context_of, no_model, outputs_of, tokens

# The first answer's gradient and tokens decide little alone, so the two sides have four rows each.
WRONG = ("Nobody knows.", "It was a cold day in March.", "A painter of ships.")
FORGET = [replace(row, paraphrased_answer=f"Well: {row.answer}", perturbed_answer=WRONG) for row in ROWS[:4]]
OTHER = [replace(row, perturbed_answer=WRONG) for row in ROWS[4:]]


def rows(role):
    return FORGET if role in ("forget", "forget_paraphrased") else OTHER


@pytest.fixture
def measured(model, prompts):
    """The scores of a model whose weights are large enough to be far from uniform, and of another retain-only model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    torch.manual_seed(2)
    retain_model = type(model)(model.config)
    outputs = outputs_of(model, prompts)
    context = context_of(outputs, [])
    context.rows, context.model = rows, SimpleNamespace(outputs=outputs)
    context.find_retain_model = lambda: SimpleNamespace(outputs=outputs_of(retain_model, prompts))
    scores = Scores()
    openunlearning.measure(context, scores)
    return {name.removeprefix("openunlearning/"): score.value for name, score in scores.by_name.items()}, retain_model


def log_probs(model, prompts, question, answer):
    """Log-probabilities over the vocabulary at each answer token, and the tokens; both with the EOS token."""
    prompt, target = prompts.prompt(question), prompts.answer(answer)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1), torch.tensor(target)


def mean_loss(model, prompts, question, answer):
    lps, target = log_probs(model, prompts, question, answer)
    return -lps.gather(1, target[:, None]).mean().item()


def ratios(model, prompts, some):
    p = [math.exp(-mean_loss(model, prompts, row.question, row.paraphrased_answer or row.answer)) for row in some]
    q = [math.exp(-np.mean([mean_loss(model, prompts, row.question, wrong) for wrong in WRONG])) for row in some]
    return np.array(p), np.array(q)


def test_scores_of_the_forget_rows(measured, model, prompts):
    scores, retain_model = measured
    losses = [mean_loss(model, prompts, row.question, row.answer) for row in FORGET]
    assert scores["forget_Q_A_Prob"] == pytest.approx(np.mean(np.exp(-np.array(losses))), rel=1e-5)
    p, q = ratios(model, prompts, FORGET)
    assert scores["forget_Q_A_PARA_Prob"] == pytest.approx(p.mean(), rel=1e-5)
    r = q / (p + 1e-10)
    assert scores["forget_Truth_Ratio"] == pytest.approx(np.minimum(r, 1 / (r + 1e-10)).mean(), rel=1e-5)
    assert scores["forget_Truth_Ratio_prob_mean"] == pytest.approx((p / (p + q + 1e-10)).mean(), rel=1e-5)
    other_p, other_q = ratios(retain_model, prompts, FORGET)
    other = other_q / (other_p + 1e-10)
    expected = ks_2samp(1 / (r + 1e-10), 1 / (other + 1e-10)).pvalue
    assert scores["forget_quality"] == pytest.approx(expected)


def test_model_utility_is_the_harmonic_mean_of_nine(measured, model, prompts):
    scores, _ = measured
    p, q = ratios(model, prompts, OTHER)
    assert scores["wf_Truth_Ratio"] == pytest.approx(np.maximum(0, 1 - q / (p + 1e-10)).mean(), rel=1e-5, abs=1e-9)
    wrong = [[math.exp(-mean_loss(model, prompts, row.question, text)) for text in WRONG] for row in OTHER]
    shares = p / (p + np.sum(wrong, 1) + 1e-10)
    assert (
        scores["ra_Q_A_Prob_normalised"] == scores["wf_Q_A_Prob_normalised"] == pytest.approx(shares.mean(), rel=1e-5)
    )
    nine = [scores[name] for name in openunlearning.PARTS]
    assert len(nine) == 9
    assert scores["model_utility"] == pytest.approx(9 / sum(1 / v for v in nine) if all(nine) else 0.0)


def test_membership_inference(measured, model, prompts):
    scores, retain_model = measured

    def auc(attack):
        values = [attack(row) for row in FORGET + OTHER]
        return roc_auc_score([0] * 4 + [1] * 4, values)  # theirs: a higher value for holdout rows

    def loss(row):
        return mean_loss(model, prompts, row.question, row.answer)

    def zlib_loss(row):
        text = prompts.tokenizer.decode(prompts.answer(row.answer)[:-1])
        return loss(row) / len(zlib.compress(text.encode()))

    def min_k(row, of=model):
        lps, target = log_probs(of, prompts, row.question, row.answer)
        lowest = lps.gather(1, target[:, None])[:-1, 0].sort().values
        return -lowest[: max(1, int(0.4 * len(lowest)))].mean().item()

    def min_k_plus_plus(row):
        lps, target = log_probs(model, prompts, row.question, row.answer)
        lps, target = lps[:-1], target[:-1]
        mu = (lps.exp() * lps).sum(-1)
        variance = ((lps.exp() * lps.square()).sum(-1) - mu.square()).clamp(min=1e-6)
        standardized = ((lps.gather(1, target[:, None])[:, 0] - mu) / variance.sqrt()).sort().values
        return -standardized[: max(1, int(0.4 * len(standardized)))].mean().item()

    def gradnorm(row):
        prompt, answer = prompts.prompt(row.question), prompts.answer(row.answer)[:-1]
        model.zero_grad()
        labels = torch.tensor([[-100] * len(prompt) + answer])
        model(torch.tensor([prompt + answer]), labels=labels).loss.backward()
        return torch.stack([p.grad.norm() for p in model.parameters()]).mean().item()

    for attack in (loss, zlib_loss, min_k, min_k_plus_plus, gradnorm):
        name = {"zlib_loss": "zlib"}.get(attack.__name__, attack.__name__)
        assert scores[f"mia_{name}"] == pytest.approx(auc(attack)), name
    theirs = auc(lambda row: min_k(row, retain_model))
    score, reference = 1 - scores["mia_min_k"], 1 - theirs
    assert scores["privleak"] == pytest.approx((score - reference) / (reference + 1e-10) * 100)


def test_values_where_the_conventions_differ():
    known = tokens([-1.0] * 4, likeliest=[True, False, True, True])  # the last is the EOS token
    unknown = tokens([-1.0] * 4, likeliest=[True, True, False, False])
    assert openunlearning.extraction_strength(known) == pytest.approx(1 / 3)
    assert openunlearning.extraction_strength(unknown) == pytest.approx(1 / 3), "theirs is never below 1/|y|"
    assert openunlearning.extraction_strength(tokens([-1.0])) == 0.0, "no token but EOS"
    answer = tokens([-1.0, -9.0])
    assert openunlearning.loss(answer, "") == -5.0 and privacy.loss(answer, "", privacy.Privacy()) == -1.0
    certain = tokens([-0.1, 0.0], logp_mean=[0.0, 0.0], logp_std=[1e-5, 1.0])
    assert openunlearning.min_k_plus_plus(certain, "") == pytest.approx(-0.1 / 1e-3)


def test_it_is_measured_on_request_only_and_names_what_is_missing(model, prompts):
    assert "openunlearning" in METRIC_GROUPS and not any("openunlearning" in groups for groups in PRESETS.values())
    context = context_of(outputs_of(model, prompts), ROWS)
    context.model, context.find_retain_model = SimpleNamespace(outputs=context.outputs), no_model
    scores = Scores()
    openunlearning.measure(context, scores)
    absent = {name for name, score in scores.by_name.items() if score.value is None}
    expected = {"forget_Truth_Ratio", "forget_quality", "ra_Q_A_Prob_normalised", "model_utility", "privleak"}
    assert {f"openunlearning/{name}" for name in expected} <= absent
    assert all(scores[name].note for name in absent)
