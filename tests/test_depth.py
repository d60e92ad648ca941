"""The unlearning depth score: by hand, on models that differ in known layers, and against a computation row by row."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.collate import collate
from common.config import PromptConfig
from common.data import Row
from common.losses import answer_losses
from common.prompts import Example, PromptFormat
from evaluation.metrics import depth
from evaluation.metrics.depth import decoder_layers, log_prob_drops, mean_log_probs, unlearning_depth
from evaluation.scores import Missing, Scores
from tests.helpers import ARCHITECTURES, ROWS, outputs_of, random_model, random_prompts

EXAMPLES = [Example(ids[:4], ids[4:]) for ids in random_prompts([9, 5, 14, 7, 6])]


def named(model, prompts=None, name="model", **evaluation):
    """A model as the metric groups see it."""
    prompts = prompts or SimpleNamespace(eos_token_id=0)
    return SimpleNamespace(
        config=SimpleNamespace(path=name), outputs=outputs_of(model, prompts, **evaluation), cache={}
    )


def with_other_layers(model, first, last=None):
    """A copy of the model with other random weights in the layers from `first` on."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in decoder_layers(other)[first:last]:
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter[torch.randperm(len(parameter))])
    return other


# --- the score ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retain_drops", "drops", "expected"),
    [
        ([0.0, 1.0, 3.0], [9.0, 0.5, 3.0], (0.5 + 3) / 4),  # the first layer encodes nothing
        ([0.0, 1.0, 3.0], [0.0, -2.0, 7.0], 3 / 4),  # each ratio is clipped: 0 and 1
        ([0.05, 0.06], [0.05, 0.0], 0.0),  # 0.05 does not exceed the threshold
        ([1.0, 2.0], [1.0, 2.0], 1.0),
        ([0.01, -3.0], [1.0, 1.0], None),
    ],
)
def test_by_hand(retain_drops, drops, expected):
    assert unlearning_depth(np.array(retain_drops), np.array(drops)) == (expected and pytest.approx(expected))


# --- the drops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_layers_from_the_changed_one_on_have_a_drop(architecture):
    model = random_model(architecture)
    other = with_other_layers(model, 1, 2)
    drops = log_prob_drops(named(model), named(other, name="other"), EXAMPLES, "other")
    assert drops.shape == (len(EXAMPLES), len(decoder_layers(model)))
    assert (drops[:, 0] == 0).all() and (np.abs(drops[:, 1:]) > 1e-3).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_the_last_layer_the_patched_model_predicts_what_the_source_does(architecture):
    """Embedding, final norm and output layer are the same in both."""
    model = random_model(architecture)
    other = with_other_layers(model, 0)
    own, of_other = (mean_log_probs(each, EXAMPLES) for each in (model, other))
    assert np.abs(own - of_other).min() > 1e-3
    drops = log_prob_drops(named(model), named(other, name="other"), EXAMPLES, "other")
    assert drops[:, -1] == pytest.approx(own - of_other, abs=1e-5)


def drops_of_one_row(model, other, example):
    """Every position that predicts a token of the answer, without the product's batches, hooks and positions."""
    ids = torch.tensor([example.prompt + example.answer])
    predicts = slice(len(example.prompt) - 1, len(example.prompt) + len(example.answer) - 1)
    states = other(ids, output_hidden_states=True).hidden_states[1:]

    def log_prob():
        log_probs = model(ids).logits[0, predicts].log_softmax(-1)
        return log_probs[range(len(example.answer)), example.answer].mean().item()

    before, drops = log_prob(), []
    for layer, of_other in zip(model.model.layers, states, strict=True):
        real = layer.forward

        def patched(*args, real=real, of_other=of_other, **kwargs):
            output = real(*args, **kwargs)
            return torch.cat([output[:, : predicts.start], of_other[:, predicts], output[:, predicts.stop :]], 1)

        layer.forward = patched
        drops.append(before - log_prob())
        layer.forward = real
    return drops[:-1]  # transformers has the last layer's states after the final norm only


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma3_text"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_batches_find_what_single_rows_find(architecture, batch_size):
    model = random_model(architecture)
    other = with_other_layers(model, 0)
    drops = log_prob_drops(named(model, batch_size=batch_size), named(other, name="other"), EXAMPLES, "other")
    expected = [drops_of_one_row(model, other, example) for example in EXAMPLES]
    assert drops[:, :-1] == pytest.approx(np.array(expected), abs=1e-5)


def test_models_of_different_size_are_refused_by_name():
    model, larger = random_model("llama"), random_model("gemma3_text")
    with pytest.raises(Missing, match="the large one has 3 layers and hidden size 32, .* 2 and 32:"):
        log_prob_drops(named(model), named(larger, name="large"), EXAMPLES, "the large one")


def test_a_source_is_patched_once_and_leaves_no_hook():
    model, other = random_model(), random_model(seed=1)
    base, source = named(model), named(other, name="other")
    drops = log_prob_drops(base, source, EXAMPLES, "other")
    assert log_prob_drops(base, source, EXAMPLES, "other") is drops
    assert not any(layer._forward_hooks for each in (model, other) for layer in decoder_layers(each))


# --- the group ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(model, prompts):
    """The model after a few steps on the forget rows, and before them."""
    before = copy.deepcopy(model)
    batch = collate([prompts.example(row, 256) for row in ROWS[:4]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        answer_losses(model, batch)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


def measured(model, base, retain, rows=ROWS[:4]):
    scores, data = Scores(), SimpleNamespace(max_length=256)

    def find(other, name):
        if other is None:
            raise Missing(f"no {name}")
        return other

    context = SimpleNamespace(
        model=model,
        rows=lambda role: rows,
        config=SimpleNamespace(data=data),
        find_base_model=lambda: find(base, "base"),
        find_retain_model=lambda: find(retain, "retain"),
    )
    depth.measure(context, scores)
    return scores


def test_the_finetuned_model_has_0_and_the_retain_only_model_1(trained, prompts):
    base, retain = (named(model, prompts, name) for model, name in zip(trained, ("base", "retain"), strict=True))
    copies = [named(model, prompts, name) for model, name in zip(trained, ("same", "never"), strict=True)]
    intact, erased = (measured(model, base, retain) for model in copies)
    assert intact.values["depth/uds"] == 0.0 and erased.values["depth/uds"] == 1.0
    assert intact.rows["depth/uds"]["values"] == [0.0] * 4 and intact["depth/uds"].count == 4
    assert intact.values["depth/encoding_layers"] == 2.0
    drops = intact.rows["depth/drop_retain_model/layer_1"]["values"]
    assert min(drops) > depth.THRESHOLD and erased.rows["depth/drop/layer_1"]["values"] == drops


def test_half_way_between_them_is_in_between(trained, prompts):
    base, retain = (named(model, prompts, name) for model, name in zip(trained, ("base", "retain"), strict=True))
    half = copy.deepcopy(trained[0])
    with torch.no_grad():
        for parameter, other in zip(half.parameters(), trained[1].parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    assert 0.02 < measured(named(half, prompts, "half"), base, retain).values["depth/uds"] < 0.98


def test_the_score_is_null_with_a_reason(trained, prompts, tokenizer):
    base, retain = (named(model, prompts, name) for model, name in zip(trained, ("base", "retain"), strict=True))
    other_prompt = named(trained[0], PromptFormat(tokenizer, PromptConfig("plain", question="Q {question}")), "other")
    for models, note in (
        ((base, None, retain), "no base"),
        ((base, base, None), "no retain"),
        ((base, retain, base), "the model before unlearning does not know the forget answers better"),
        ((other_prompt, base, retain), "the evaluated model has another tokenizer"),
    ):
        scores = measured(*models)
        assert set(scores.values.values()) == {None} and note in scores["depth/uds"].note


def test_a_row_without_tokens_has_no_value(trained, prompts):
    base, retain = (named(model, prompts, name) for model, name in zip(trained, ("base", "retain"), strict=True))
    scores = measured(base, base, retain, [ROWS[0], Row(1, "word " * 300, "Never reached."), *ROWS[1:4]])
    assert [value is None for value in scores.rows["depth/uds"]["values"]] == [False, True, False, False, False]
    assert (scores["depth/uds"].count, scores["depth/uds"].left_out) == (4, 1)


# --- the span -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["{answer}", " Answer: {answer}"])
def test_the_span_is_the_entity_or_the_answer_without_eos(tokenizer, template):
    prompts = PromptFormat(tokenizer, PromptConfig("plain", answer=template))
    row = ROWS[3]
    whole = depth.span_example(prompts, row, 256)
    tag = tokenizer(" Answer: ")["input_ids"][:-1] if "Answer" in template else []  # the space is that of " He"
    assert whole.prompt == prompts.prompt(row.question) + tag
    assert tag + whole.answer == prompts.answer(row.answer)[:-1]
    for entity in ("Copper Quill", "B", "1987 for his second book."):
        span = depth.span_example(prompts, Row(3, row.question, row.answer, entity=entity), 256)
        assert entity in tokenizer.decode(span.answer)
        assert entity not in tokenizer.decode(span.answer[1:]) and entity not in tokenizer.decode(span.answer[:-1])
        assert (whole.prompt + whole.answer)[: len(span)] == span.prompt + span.answer


def test_an_entity_inside_another_word_is_not_the_span(tokenizer):
    prompts = PromptFormat(tokenizer, PromptConfig("plain"))
    span = depth.span_example(prompts, Row(0, "Who?", "Marta studied art.", entity="art"), 256)
    before = tokenizer.decode([*span.prompt, *span.answer])
    assert "studied" in before and "art" in tokenizer.decode(span.answer)
