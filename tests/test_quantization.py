"""Rounding of linear layers, by hand and on a copy of the model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.config import NewModelConfig
from common.errors import UserError
from common.new_model import new_model
from evaluation.metrics import quantization
from evaluation.metrics.quantization import Quantization, round_linear_layers, round_to_nearest
from evaluation.scores import Scores
from tests.helpers import EXPERTS, ROWS


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


@pytest.mark.parametrize("architecture", EXPERTS)  # gpt_oss has inputs before outputs
def test_the_matrices_of_experts_are_rounded(architecture, tokenizer):
    torch.manual_seed(0)
    model = new_model(NewModelConfig(architecture, EXPERTS[architecture], 400), tokenizer, "float32")
    parameters = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    assert len(parameters) == 4 and all("experts" in name for name in parameters)
    before = {name: p.clone() for name, p in parameters.items()}
    round_linear_layers(model, 4)
    for name, parameter in parameters.items():
        for found, matrix in zip(parameter, before[name], strict=True):
            expected = (matrix.T if architecture == "gpt_oss" else matrix).clone()
            round_to_nearest(expected, 4)
            assert torch.equal(found, expected.T if architecture == "gpt_oss" else expected)
            assert not torch.equal(found, matrix)


def test_bitsandbytes_is_refused_for_a_model_with_experts(context, tokenizer, monkeypatch):
    model = new_model(NewModelConfig("qwen3_moe", EXPERTS["qwen3_moe"], 400), tokenizer, "float32")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(UserError, match=r"experts as they are; use quantization\.method=round"):
        quantization.load_with_bitsandbytes(context, 4)


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
