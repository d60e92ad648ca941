"""Rounding of linear layers, by hand and on a copy of the model."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from evaluation.metrics import quantization
from evaluation.metrics.quantization import Quantization, round_linear_layers, round_to_nearest
from evaluation.scores import Scores
from tests.helpers import ROWS


def test_rounding_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    round_to_nearest(weight, 4)  # largest integer 7, so the scale is 1
    assert weight.tolist() == [[7.0, -3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_bfloat16_weights_are_rounded_as_exactly_as_others():
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    exact, rounded = weight.float(), weight.clone()
    round_to_nearest(exact, 8)
    round_to_nearest(rounded, 8)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_have_scales_of_their_own_and_errors_of_half_a_step(bits):
    torch.manual_seed(0)
    weight = torch.randn(5, 150)
    weight[:, :64] *= 100
    rounded = weight.clone()
    round_to_nearest(rounded, bits)
    for block, other in zip(weight.split(64, 1), rounded.split(64, 1), strict=True):
        step = block.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((block - other).abs() <= step / 2 * 1.0001).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in other)
    again = rounded.clone()
    round_to_nearest(again, bits)
    assert torch.allclose(again, rounded, rtol=1e-6)


def test_every_linear_layer_but_the_head_is_rounded(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    round_linear_layers(model, 4)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == linear - {"lm_head.weight"} and changed


def test_a_model_without_linear_layers_is_refused():
    class Nothing(nn.Module):
        def get_output_embeddings(self):
            return None

    with pytest.raises(UserError, match="no torch.nn.Linear"):
        round_linear_layers(Nothing(), 8)


def test_quantized_scores_are_those_of_the_rounded_copy(context):
    scores = Scores()
    quantization.measure(context, scores)
    assert {name.split("/")[1] for name in scores.values} == {"8bit", "4bit"}
    questions = quantization.load_questions(context.config.data, context.config.evaluation)
    copy = context.outputs.with_weights(
        round_linear_layers(context.loader.fresh(context.model.config, context.model.tokenizer), 4)
    )
    values = quantization.score_outputs(copy, questions).values
    assert scores.values["quantization/4bit/unlearn_quality"] == values["unlearn_quality"]


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; pip install bitsandbytes, or method=round"):
        Quantization(method="bitsandbytes")


def test_quantization_by_bitsandbytes(context):
    pytest.importorskip("bitsandbytes")
    copy = quantization.quantized(context, "bitsandbytes", 8)
    assert type(copy.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert context.outputs.with_weights(copy).answers([ROWS[0].question])
