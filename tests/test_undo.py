"""UNDO: its noise by the formula, what is distilled, that distilling restores the outputs, and a resumed run."""

import copy
import math

import pytest
import torch

from common.config import LoraSettings
from common.errors import UserError
from common.model import add_adapter
from tests.helpers import ROWS, Plain, arguments, resumed_and_whole
from unlearning.methods.undo import UNDO, UNDOSettings, add_noise
from unlearning.trainer import UnlearningData


def make_undo(model, prompts, folder, steps=4, begun=True, **settings):
    data = UnlearningData(ROWS[:4], ROWS[4:], prompts, 64)
    training = {"learning_rate": 1e-2, "max_steps": steps, "num_train_epochs": steps, "save_strategy": "epoch"}
    trainer = UNDO(
        copy.deepcopy(model), arguments(folder, 4, 1, **training), data, UNDOSettings(**{"max_length": 48, **settings})
    )
    if begun:
        trainer.before_training()
    return trainer


def test_noise_is_that_of_the_formula(learned):
    noised, noise_alone = copy.deepcopy(learned), copy.deepcopy(learned)
    add_noise(noised, alpha=0.3, beta=0.2, seed=1)
    add_noise(noise_alone, alpha=1.0, beta=1.0, seed=1)
    start = dict(learned.named_parameters())
    for (name, found), noise in zip(noised.named_parameters(), noise_alone.parameters(), strict=True):
        torch.testing.assert_close(found, 0.7 * start[name] + 0.3 * 0.2 * noise)
        if noise.ndim == 1:
            assert not noise.any(), "vectors get no noise"
            continue
        bound = math.sqrt(6 / sum(noise.shape))  # Xavier uniform
        assert noise.abs().max() <= bound
        assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    other = copy.deepcopy(learned)
    add_noise(other, alpha=1.0, beta=1.0, seed=2)
    assert not torch.equal(other.lm_head.weight, noise_alone.lm_head.weight)


def test_each_expert_of_a_stack_has_the_noise_of_a_matrix():
    layer = torch.nn.Module()
    layer.experts = torch.nn.Parameter(torch.ones(8, 60, 40))
    add_noise(layer, alpha=1.0, beta=1.0, seed=0)
    bound = math.sqrt(6 / (60 + 40))
    assert 0.95 * bound < layer.experts.abs().max() <= bound
    assert layer.experts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_unlearned_model_s_own_answers_are_distilled_and_noise_comes_after_them(learned, prompts, tmp_path):
    trainer = make_undo(learned, prompts, tmp_path)
    for row, example in zip(ROWS[:4], trainer.forget_examples(ROWS[:4]), strict=True):
        ids = torch.tensor([example.prompt])
        with torch.no_grad():
            for token in example.answer:  # greedy, by the model before the noise
                assert copy.deepcopy(learned).eval()(ids).logits[0, -1].argmax() == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert example.prompt == prompts.prompt(row.question)
    noised = copy.deepcopy(learned)
    add_noise(noised, 0.5, 0.1, seed=trainer.args.seed)
    for found, expected in zip(trainer.model.parameters(), noised.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_distilling_restores_the_outputs(learned, prompts, tmp_path):
    trainer = make_undo(learned, prompts, tmp_path, steps=40)
    trainer.train()
    first, last = trainer.history[0], trainer.history[-1]
    for name in ("forget_loss", "retain_loss"):
        assert last[name] < 0.3 * first[name], name
    retain = [prompts.example(row, 64) for row in ROWS[4:]]
    noised = copy.deepcopy(learned)
    add_noise(noised, 0.5, 0.1, seed=trainer.args.seed)
    likelihoods = [
        sum(Plain(model).log_p((e.prompt + e.answer, len(e.prompt))).mean() for e in retain)
        for model in (noised, trainer.model)
    ]
    assert likelihoods[1] > likelihoods[0] + 1


@pytest.mark.slow
def test_a_resumed_run_has_noise_once_and_ends_as_the_whole_one(learned, prompts, tmp_path):
    resumed_and_whole(lambda folder: make_undo(learned, prompts, folder, begun=False), tmp_path)


def test_an_adapter_is_refused(learned, prompts, tmp_path):
    with pytest.raises(UserError, match=r"method=undo with model\.lora: the base model would get no noise"):
        make_undo(add_adapter(copy.deepcopy(learned), LoraSettings(r=2, alpha=4)), prompts, tmp_path)
