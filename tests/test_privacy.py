"""Membership inference: each attack by hand, AUC against scikit-learn, privleak as MUSE defines it."""

import math
import zlib

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.config import EvaluationConfig
from common.data import Row
from evaluation.metrics import privacy
from evaluation.model_outputs import ModelOutputs
from tests.helpers import ROWS, tokens

SETTINGS = privacy.Privacy()
ANSWER = tokens([-1.0, -3.0, -2.0, -6.0, -0.5, -9.0])  # the last is the EOS token


def test_loss_and_zlib():
    assert privacy.loss(ANSWER, "", SETTINGS) == pytest.approx(-12.5 / 5)
    assert privacy.zlib_loss(ANSWER, "some text", SETTINGS) == pytest.approx(-2.5 / len(zlib.compress(b"some text")))


def test_min_k_takes_the_lowest_two_fifths_and_at_least_one():
    assert privacy.min_k(ANSWER, "", SETTINGS) == (-6.0 - 3.0) / 2
    ten = tokens([-float(i) for i in range(1, 11)], has_eos=False)
    assert privacy.min_k(ten, "", SETTINGS) == -8.5
    assert privacy.min_k(ten, "", privacy.Privacy(min_k_fraction=0.2)) == -9.5
    assert privacy.min_k(tokens([-4.0, -9.0]), "", SETTINGS) == -4.0


def test_min_k_plus_plus_standardises_each_token():
    answer = tokens([-1.0, -3.0, -9.0], logp_mean=[-2.0, -1.0, 0.0], logp_std=[0.5, 4.0, 1.0])
    assert privacy.min_k_plus_plus(answer, "", SETTINGS) == pytest.approx(min((-1 + 2) / 0.5, (-3 + 1) / 4))
    certain = tokens([0.0, 0.0], logp_mean=[0.0, 0.0], logp_std=[0.0, 0.0])
    assert privacy.min_k_plus_plus(certain, "", SETTINGS) == 0.0


@pytest.mark.parametrize("attack", privacy.ATTACKS.values())
def test_an_answer_without_a_token_has_no_value(attack):
    assert attack(tokens([-1.0]), "text", SETTINGS) is None


def test_gradient_norm_is_that_of_backward(model, prompts):
    example = prompts.example(ROWS[1], 256)
    found = privacy.gradient_norm(model, example)
    labels = torch.tensor([[-100] * len(example.prompt) + example.answer])
    model(torch.tensor([example.prompt + example.answer]), labels=labels).loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert found == pytest.approx(-norm, rel=1e-5)
    assert privacy.gradient_norm(model, prompts.example(Row(0, "word " * 40, "x"), 8)) is None


def test_gradient_norm_leaves_no_gradient_behind_and_works_on_frozen_weights(model, prompts):
    model.requires_grad_(False)
    assert privacy.gradient_norm(model, prompts.example(ROWS[1], 256)) < 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_auc_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    for size in (3, 40, 100):
        members, others = rng.integers(0, 12, size).astype(float), rng.integers(3, 15, 2 * size).astype(float)
        labels = [1] * size + [0] * 2 * size
        assert privacy.auc(members, others) == pytest.approx(roc_auc_score(labels, [*members, *others]))


def test_auc_at_its_ends_and_without_values():
    assert privacy.auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert privacy.auc([0.0, None], [1.0]) == 0.0
    assert privacy.auc([1.0, 1.0], [1.0]) == 0.5
    assert privacy.auc([None], [1.0]) is None


def test_privleak():
    assert privacy.privleak(0.9, 0.5) == pytest.approx(100 * (0.1 - 0.5) / 0.5)
    assert privacy.privleak(0.3, 0.4) == pytest.approx(100 * (0.7 - 0.6) / 0.6)
    assert privacy.privleak(0.62, 0.62) == 0.0


def test_reference_attack_subtracts_the_loss_before_unlearning(model, prompts):
    subjects = [ModelOutputs(lambda m=m: m, prompts, EvaluationConfig(), 256) for m in (model, changed(model))]
    found = privacy.against_reference(*subjects, ROWS[:3], SETTINGS)
    alone = [privacy.attacked(outputs, ROWS[:3], privacy.loss, SETTINGS) for outputs in subjects]
    assert found == pytest.approx([one - other for one, other in zip(*alone, strict=True)])
    assert privacy.against_reference(subjects[0], subjects[0], ROWS[:3], SETTINGS) == [0.0] * 3


def changed(model):
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


def test_the_text_of_a_cut_answer_is_what_is_left_of_it(model, prompts):
    row = ROWS[1]
    whole = ModelOutputs(lambda: model, prompts, EvaluationConfig(), 256)
    cut = ModelOutputs(lambda: model, prompts, EvaluationConfig(), len(prompts.prompt(row.question)) + 4)
    assert whole.text_of_answer(row) == row.answer
    assert row.answer.startswith(cut.text_of_answer(row)) and 0 < len(cut.text_of_answer(row)) < len(row.answer) / 2


def test_a_gradient_that_is_not_finite_has_no_value(model, prompts, monkeypatch):
    monkeypatch.setattr(privacy, "gradients", lambda *_: [torch.tensor([float("inf")])])
    assert privacy.gradient_norm(model, prompts.example(ROWS[0], 64)) is None
