"""GRPO: its advantages, and the gradient of its loss against finite differences of the formula in float64."""

import copy
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.helpers import ROWS, Plain, arguments, log_softmax, resumed_and_whole
from unlearning.methods.grpo import GRPO, GRPOSettings, advantages
from unlearning.methods.refusals import read_refusals
from unlearning.trainer import UnlearningData

SETTINGS = {"num_samples": 3, "max_length": 48, "temperature": 1.5}


def make_grpo(model, prompts, folder, rows=ROWS[:2], training=None, begun=True, **settings):
    data = UnlearningData(rows, ROWS[4:], prompts, 64)
    trainer = GRPO(
        copy.deepcopy(model),
        arguments(folder, len(rows), 1, **training or {}),
        data,
        GRPOSettings(**SETTINGS | settings),
    )
    if begun:
        trainer.before_training()
    return trainer


def test_advantages_are_relative_to_the_group():
    rewards = [0.25, 1.0, 0.5, 0.25]
    expected = [(reward - fmean(rewards)) / (pstdev(rewards) + 1e-4) for reward in rewards]
    assert advantages(rewards) == pytest.approx(expected)
    assert expected == pytest.approx([-0.8164, 1.6327, 0.0, -0.8164], abs=1e-3)
    assert advantages([0.5, 0.5]) == [0.0, 0.0], "equal rewards have no gradient"


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_gradient_is_that_of_the_formula(kl_weight, learned, prompts, tmp_path):
    """In a random direction, by central differences of -advantage * log pi + kl_weight * KL in float64."""
    trainer = make_grpo(learned, prompts, tmp_path, kl_weight=kl_weight, num_refusals=1, lambda_unlearning=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    (batch,), _ = trainer.get_batch_samples(iter([ROWS[:2]]), 1, None)
    trainer.compute_loss(trainer.model, batch).backward()

    def formula(model):
        terms = []
        for ids, labels, mask, weight in zip(
            *map(batch.get, ("input_ids", "labels", "attention_mask", "weights")), strict=True
        ):
            length = int(mask.sum())
            example = ids[:length].tolist(), int((labels[:length] >= 0).nonzero()[0])
            log_p, log_p0 = (log_p_at(own, example, SETTINGS["temperature"]) for own in (model, Plain(learned)))
            kl = np.exp(log_p0 - log_p) - (log_p0 - log_p) - 1
            terms.append(-weight.item() * log_p + kl_weight * kl)
        return np.concatenate(terms).mean()

    direction = {
        name: torch.randn(p.shape, generator=generator).double() for name, p in trainer.model.named_parameters()
    }
    step, values = 1e-4, []  # norms and softmax are float32: a smaller step shows their rounding
    for sign in (1, -1):
        moved = Plain(trainer.model)
        with torch.no_grad():
            for name, parameter in moved.model.named_parameters():
                parameter += sign * step * direction[name]
        values.append(formula(moved))
    slope = sum(float((p.grad.double() * direction[name]).sum()) for name, p in trainer.model.named_parameters())
    assert len(batch["weights"]) == 6
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)


def log_p_at(model, example, temperature):
    """log p of every answer token, the logits divided by the temperature."""
    logits, targets = model.logits(example)
    return log_softmax(logits / temperature)[np.arange(len(targets)), targets]


def test_every_sample_has_the_advantage_of_its_own_reward(learned, prompts, tmp_path):
    trainer = make_grpo(learned, prompts, tmp_path, num_samples=4, num_refusals=1)
    groups = trainer.forget_groups(ROWS[:2])
    refusals = read_refusals("data/refusals.txt")
    for row, group in zip(ROWS[:2], groups, strict=True):
        texts = [prompts.text(example.answer) for example in group]
        assert texts[3] in refusals
        rewards = trainer.scorer.rewards(trainer.initial_responses[row.index], [e.answer for e in group])
        assert [example.weight for example in group] == pytest.approx(advantages(rewards))
        assert all(example.prompt == prompts.prompt(row.question) for example in group)
    assert trainer.forget_groups(ROWS[1::-1]) == groups[::-1], "keyed by seed, step and row"


@pytest.mark.slow
def test_steps_raise_the_reward_and_make_the_initial_responses_unlikelier(learned, prompts, tmp_path):
    trainer = make_grpo(
        learned,
        prompts,
        tmp_path,
        ROWS[:4],
        {"learning_rate": 3e-3, "max_steps": 12, "num_train_epochs": 12},
        lambda_unlearning=0.0,
        temperature=0.7,
    )
    initial = [(trainer.prompt_ids[i] + ids, len(trainer.prompt_ids[i])) for i, ids in trainer.initial_tokens.items()]
    trainer.train()
    rewards = [record["sample_reward"] for record in trainer.history]
    assert np.mean(rewards[6:]) > np.mean(rewards[:6])
    before, after = (np.mean([Plain(m).log_p(e).mean() for e in initial]) for m in (learned, trainer.model))
    assert after < before - 0.1


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(learned, prompts, tmp_path):
    def trainer_in(folder):
        training = {"learning_rate": 3e-3, "max_steps": 4, "num_train_epochs": 4, "save_strategy": "epoch"}
        return make_grpo(learned, prompts, folder, ROWS[:4], training, begun=False, kl_weight=0.1, num_refusals=1)

    resumed_and_whole(trainer_in, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, "a single answer has the mean reward of its group"),
        ({"num_samples": 2, "num_refusals": 2}, "no sample would be left"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_learn_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        GRPOSettings(**settings)
