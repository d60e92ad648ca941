"""RepSelect: the collapse against an SVD in float64, and which gradients an optimizer step has with each method."""

import copy
import re

import numpy as np
import pytest
import torch

from common.config import LoraSettings, NewModelConfig
from common.errors import UserError
from common.model import add_adapter
from common.new_model import new_model
from tests.helpers import EXPERTS, ROWS, arguments, gradients_of_one_step, resumed_and_whole
from unlearning.gradient_collapse import MATRICES, collapse
from unlearning.methods.npo import NPO, NPOSettings
from unlearning.methods.repselect import RepSelect, RepSelectSettings
from unlearning.trainer import UnlearningData


def make_trainer(model, prompts, folder, batch_size=4, accumulation=1, method=RepSelect, settings=None, **training):
    data = UnlearningData(ROWS[:4], ROWS[4:], prompts, 64)
    settings = settings or RepSelectSettings(collapsed_components=5, gamma=0.7, lambda_unlearning=1.9)
    return method(copy.deepcopy(model), arguments(folder, batch_size, accumulation, **training), data, settings)


def collapsed(matrix, components):
    """By the formula, with the SVD of numpy."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s.copy()
    s[:components] = s[components - 1] ** 2 / s[:components]
    return (u * s) @ vt


def test_the_largest_singular_values_are_inverted():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 6)))[0] for size in (20, 9))
    matrix = (u * [50.0, 20.0, 10.0, 0.1, 0.05, 0.01]) @ v.T
    found = collapse(torch.tensor(matrix), 3).numpy()
    np.testing.assert_allclose(found, collapsed(matrix, 3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(found)[1][:6], [10.0, 5.0, 2.0, 0.1, 0.05, 0.01], atol=1e-5)
    np.testing.assert_allclose(collapse(torch.tensor(matrix), 1).numpy(), matrix, atol=1e-9)


def test_components_that_are_rounding_errors_are_not_counted():
    """A gradient of rank 2 keeps its size; with s_k of a rounding error it would become one."""
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])) + 1e-9 * torch.rand(4, 4)
    torch.testing.assert_close(torch.linalg.svdvals(collapse(matrix, 4))[:2], torch.tensor([2.0, 1.0]))
    assert not collapse(torch.zeros(3, 5), 2).any()


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2)])
def test_a_step_has_the_collapsed_forget_gradient_and_the_whole_retain_gradient(
    batch_size, accumulation, learned, prompts, tmp_path
):
    components = 64  # all of each matrix's, so that the randomized SVD is exact

    def gradients(gamma, weight, collapsed_components):
        settings = RepSelectSettings(gamma=gamma, lambda_unlearning=weight)
        settings.collapsed_components = collapsed_components
        return gradients_of_one_step(
            make_trainer(learned, prompts, tmp_path, batch_size, accumulation, settings=settings)
        )

    forget, retain = gradients(0.7, 0.0, 0), gradients(0.0, 1.9, 0)
    both, forget_alone = gradients(0.7, 1.9, components), gradients(0.7, 0.0, components)
    matrices = [name for name in forget if re.search(MATRICES, name)]
    assert len(matrices) == 6
    for name in forget:
        expected = torch.zeros_like(forget[name])
        if name in matrices:
            kept = int((torch.linalg.svdvals(forget[name]) > 1e-5 * torch.linalg.matrix_norm(forget[name], 2)).sum())
            expected = torch.tensor(collapsed(forget[name].double().numpy(), kept)).float()
            assert expected.norm() < 0.5 * forget[name].norm()
            scale = expected.abs().max().item()
        torch.testing.assert_close(
            forget_alone[name], expected, rtol=1e-2, atol=2e-2 * scale if name in matrices else 0
        )
        torch.testing.assert_close(both[name], retain[name] + forget_alone[name], rtol=1e-3, atol=1e-6)


def test_the_forget_loss_alone_changes_only_the_mlps_and_makes_the_forget_answers_unlikelier(
    learned, prompts, tmp_path
):
    settings = RepSelectSettings(collapsed_components=5, lambda_unlearning=0.0)
    training = {"learning_rate": 3e-3, "max_steps": 8, "num_train_epochs": 8, "weight_decay": 0.0}
    trainer = make_trainer(learned, prompts, tmp_path, settings=settings, **training)
    trainer.train()
    start = dict(learned.named_parameters())
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if re.search(MATRICES, name)}
    losses = [record["forget_loss"] for record in trainer.history]
    assert losses[-1] < losses[0] - 0.1


def test_any_method_can_have_its_forget_gradient_collapsed(learned, prompts, tmp_path):
    plain, some = (
        gradients_of_one_step(
            make_trainer(learned, prompts, tmp_path, method=NPO, settings=NPOSettings(collapsed_components=components))
        )
        for components in (0, 5)
    )
    for name in plain:
        assert not torch.equal(plain[name], some[name]), name


def test_gradients_are_collapsed_before_they_are_clipped(learned, prompts, tmp_path):
    trainer = make_trainer(learned, prompts, tmp_path)
    trainer.args.max_grad_norm = 1e-3
    found = gradients_of_one_step(trainer)
    assert torch.cat([value.flatten() for value in found.values()]).norm() == pytest.approx(1e-3, rel=1e-2)


def test_gradient_checkpointing_does_not_change_a_step(learned, prompts, tmp_path):
    plain, checkpointed = (
        gradients_of_one_step(make_trainer(learned, prompts, tmp_path, gradient_checkpointing=wanted))
        for wanted in (False, True)
    )
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(learned, prompts, tmp_path):
    training = {"learning_rate": 3e-3, "max_steps": 4, "num_train_epochs": 4, "save_strategy": "epoch"}
    resumed_and_whole(lambda folder: make_trainer(learned, prompts, folder, **training), tmp_path)


def test_what_has_no_whole_gradients_is_refused(learned, prompts, tmp_path):
    with pytest.raises(UserError, match=r"method.collapsed_components=5: .*=\{use_reentrant: true\}; set it to false"):
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        make_trainer(learned, prompts, tmp_path, **more)
    with_adapter = add_adapter(copy.deepcopy(learned), LoraSettings(r=2, alpha=4))
    with pytest.raises(UserError, match=r"method.collapsed_components=5: .* leave out model.lora"):
        make_trainer(with_adapter, prompts, tmp_path)
    frozen = copy.deepcopy(learned)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    with pytest.raises(UserError, match=r"method.collapsed_components=5: no trained matrix"):
        make_trainer(frozen, prompts, tmp_path)


def test_a_model_with_experts_is_refused(prompts, tokenizer, tmp_path):
    """Of its MLPs, the routers alone are matrices."""
    model = new_model(NewModelConfig("qwen3_moe", EXPERTS["qwen3_moe"], 400), tokenizer, "float32")
    with pytest.raises(UserError, match=r"method.collapsed_components=5: .*\.mlp\.experts\..* several experts"):
        make_trainer(model, prompts, tmp_path)
