"""Relearning and quantization change copies alone: neither the checkpoint nor the model that other metrics ask."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common.config import DataConfig, EvaluationConfig, ModelConfig, PromptConfig, RunConfig
from common.errors import UserError
from evaluation.context import EvaluationContext, Loader, open_model
from evaluation.metrics import quantization, relearning
from evaluation.metrics.quantization import Quantization, round_linear_layers, round_to_nearest
from evaluation.metrics.relearning import Relearning, select_relearn_rows
from evaluation.scores import Missing, Scores
from tests.helpers import ROWS, write_rows


@pytest.fixture
def context(model, tokenizer, tmp_path):
    """A context of a saved model, with a retain-only model of other weights."""
    for name in ("model", "retain"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    splits = {"forget": write_rows(tmp_path, "gone", ROWS[:4]), "retain": write_rows(tmp_path, "kept", ROWS[4:])}
    sections = {
        "relearning": Relearning(num_epochs=40, learning_rate=1e-2, batch_size=2),
        "quantization": Quantization(),
    }
    config = RunConfig(
        seed=0,
        model=ModelConfig(str(tmp_path / "model"), PromptConfig("plain")),
        data=DataConfig(str(tmp_path), splits, {"question": "question", "answer": "answer"}),
        evaluation=EvaluationConfig(max_length=60),
        training={},
        save_model=True,
        overwrite=False,
        keep_checkpoints=False,
        output_dir=None,
        models_dir=str(tmp_path),
        sections=sections,
    )
    loader = Loader()
    retain = open_model(config, ModelConfig(str(tmp_path / "retain"), PromptConfig("plain")), loader)
    return EvaluationContext(config, loader, open_model(config, config.model, loader), lambda: retain, no_model)


def no_model():
    raise Missing("none is given")


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def answer_probabilities(context):
    return [t.log_probs for t in context.outputs.tokens_of_answers([(row.question, row.answer) for row in ROWS])]


@pytest.mark.parametrize("family", [relearning, quantization])
def test_checkpoint_and_model_stay_as_they_are(context, family):
    before, shared = files(context.model.config.path), context.outputs.load()
    weights = [parameter.clone() for parameter in shared.parameters()]
    family.measure(context, Scores())
    assert files(context.model.config.path) == before
    assert all(torch.equal(*pair) for pair in zip(weights, shared.parameters(), strict=True))
    after = answer_probabilities(context)
    fresh = open_model(context.config, context.model.config, Loader())
    untouched = [t.log_probs for t in fresh.outputs.tokens_of_answers([(row.question, row.answer) for row in ROWS])]
    assert all((one == other).all() for one, other in zip(after, untouched, strict=True))


def test_relearning_teaches_the_copy(context):
    scores = Scores()
    relearning.measure(context, scores)
    before = sum(log_probs.mean() for log_probs in answer_probabilities(context)[:4])
    assert scores.values["relearning/probability"] > 1.5 * torch.tensor(before / 4).exp()
    assert scores.counts["relearning/probability"] == 4
    recalls = relearning.recalls(context.outputs, ROWS[:4])
    gained = scores.values["relearning/rougeL_recall"] - sum(recalls) / 4
    assert scores.values["relearning/rougeL_recall_gained"] == pytest.approx(gained)
    retain = context.find_retain_model().found["relearning"]["recall"]
    beyond = scores.values["relearning/rougeL_recall"] - sum(retain) / 4
    assert scores.values["relearning/rougeL_recall_beyond_retain_model"] == pytest.approx(beyond)
    assert scores.values["relearning/rougeL_recall"] > sum(recalls) / 4 and sum(retain) > 0


def test_relearning_teaches_a_bfloat16_model_as_well(context):
    before = [parameter.clone() for parameter in context.outputs.load().parameters()]
    context.config.sections["relearning"] = Relearning(batch_size=2)
    context.model.config = replace(context.model.config, dtype="bfloat16")
    after = relearning.relearn(context, context.model, context.rows("forget")).load().parameters()
    assert all((one != other).float().mean() > 0.5 for one, other in zip(before, after, strict=True))


def test_relearning_against_itself_brings_nothing_back_and_is_done_once(context, monkeypatch):
    calls = []
    real = relearning.relearn
    monkeypatch.setattr(relearning, "relearn", lambda *args: calls.append(1) or real(*args))
    context.find_retain_model = lambda: context.model
    scores = Scores()
    relearning.measure(context, scores)
    assert scores.values["relearning/rougeL_recall_beyond_retain_model"] == 0 and len(calls) == 1


def test_a_fraction_is_taught_and_the_others_are_scored_by_themselves(context):
    context.config.sections["relearning"].fraction = 0.5
    context.find_retain_model = no_model
    scores = Scores()
    relearning.measure(context, scores)
    rows = context.rows("forget")
    relearn_rows = select_relearn_rows(rows, 0.5, 0)
    others = scores.rows["relearning/rougeL_recall_not_taught"]["values"]
    assert [value is None for value in others] == [row in relearn_rows for row in rows] and len(relearn_rows) == 2
    assert scores.notes["relearning/rougeL_recall_beyond_retain_model"] == "none is given"
    relearn_rows = select_relearn_rows(ROWS, 0.25, 0)
    assert (
        len(relearn_rows) == 2
        and relearn_rows == select_relearn_rows(ROWS, 0.25, 0)
        and select_relearn_rows(ROWS, 1.0, 0) == ROWS
    )
    assert len(select_relearn_rows(ROWS, 0.01, 0)) == 1


# --- quantization -------------------------------------------------------------------------------------------------------


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
    values, _ = quantization.score_subject(copy, questions)
    assert scores.values["quantization/4bit/unlearn_quality"] == values["unlearn_quality"]


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert Quantization(method="bitsandbytes").problems() == [
        "method=bitsandbytes: not installed; pip install bitsandbytes, or method=round"
    ]


def test_quantization_by_bitsandbytes(context):
    pytest.importorskip("bitsandbytes")
    copy = quantization.quantized(context, "bitsandbytes", 8)
    assert type(copy.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert context.outputs.with_weights(copy).answers([ROWS[0].question])
