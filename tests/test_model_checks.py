"""What is checked of a loaded model: left-to-right prediction, positions of padded rows, and their number."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.config import NewModelConfig
from common.errors import UserError
from common.model import load_model
from common.model_checks import check_causal, check_positions
from evaluation.context import Loader
from tests.helpers import ARCHITECTURES, SMALL, random_model
from tests.test_model import config

REFUSED = {
    ("bert", False): (SMALL, "BertLMHeadModel is bidirectional"),
    ("roberta", False): (SMALL, "RobertaForCausalLM is bidirectional"),
}
ACCEPTED = {
    **ARCHITECTURES,
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4},
    "gpt_neox": SMALL,
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "mixtral": {**SMALL, "num_key_value_heads": 2},
}


def fresh(architecture, settings, **more):
    torch.manual_seed(0)
    ids = {"vocab_size": 400, "bos_token_id": None, "pad_token_id": 1, "eos_token_id": 2}
    made = AutoConfig.for_model(architecture, **ids, **settings, **more)
    return AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize(("architecture", "is_decoder"), REFUSED)
def test_a_model_with_wrong_samples_is_refused(architecture, is_decoder):
    settings, message = REFUSED[architecture, is_decoder]
    with pytest.raises(UserError, match=f"^model.path=x: {message}"):
        check_causal(fresh(architecture, settings, is_decoder=is_decoder), "model.path=x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ACCEPTED)
def test_a_causal_model_is_accepted_as_it_is(architecture, dtype, caplog):
    """Neither its mode nor the random numbers after it change."""
    model = fresh(architecture, ACCEPTED[architecture]).to(dtype).train()
    state = torch.get_rng_state()
    check_causal(model, "model.path=x")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records


def test_a_bidirectional_checkpoint_is_refused_on_loading(tmp_path, tokenizer):
    fresh("bert", SMALL).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.path={tmp_path}: BertLMHeadModel is bidirectional"):
        load_model(config(tmp_path), tokenizer, trainable=True)
    with pytest.raises(UserError, match="model.new.architecture=bert: BertLMHeadModel is bidirectional"):
        load_model(config(None, new=NewModelConfig("bert", SMALL, vocab_size=400)), tokenizer, trainable=True)


def run_with(data=100, evaluation=100, **method):
    return SimpleNamespace(
        data=SimpleNamespace(max_length=data),
        evaluation=SimpleNamespace(max_length=evaluation),
        settings=SimpleNamespace(**method) if method else None,
    )


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        ({"data": 1025}, "data.max_length=1025"),
        ({"evaluation": 2000, "max_length": 1100}, "evaluation.max_length=2000, method.max_length=1100"),
    ],
)
def test_lengths_beyond_learned_positions_are_refused(lengths, named):
    """GPT-2 has 1024."""
    with pytest.raises(UserError) as caught:
        check_positions(random_model("gpt2"), run_with(**lengths))
    assert str(caught.value) == f"{named}: the model has positions for 1024 tokens only; set it to at most 1024"


def test_lengths_up_to_the_last_position_are_accepted(caplog):
    check_positions(random_model("gpt2"), run_with(1024, 1024, max_length=1024))
    assert not caplog.records


def test_lengths_beyond_the_trained_rotary_positions_are_warned_about(caplog):
    check_positions(random_model("llama"), run_with(evaluation=4000))
    assert "evaluation.max_length=4000: the model was made for at most 2048 tokens" in caplog.text


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "longrope", "original_max_position_embeddings": 1000}, 1000),
        (
            {
                "full": {"rope_type": "longrope", "original_max_position_embeddings": 500},
                "other": {"rope_type": "default"},
            },
            500,
        ),
    ],
)
def test_lengths_beyond_which_rotary_embeddings_depend_on_the_batch_are_refused(rope, limit):
    model = random_model("llama")
    model.config.rope_parameters = rope
    check_positions(model, run_with(limit, limit))
    with pytest.raises(
        UserError, match=rf"^data\.max_length={limit + 1}: beyond {limit} tokens .*; set it to at most {limit}$"
    ):
        check_positions(model, run_with(limit + 1))


@pytest.mark.parametrize("split", ["data", "evaluation"])
def test_the_evaluation_checks_the_lengths_of_the_model_it_loads(context, tmp_path, split):
    fresh("gpt2", {**ARCHITECTURES["gpt2"], "n_positions": 120}).save_pretrained(tmp_path / "model")
    lengths = {"data": 100, "evaluation": 60, split: 130}
    config = replace(
        context.config,
        data=replace(context.config.data, max_length=lengths["data"]),
        evaluation=replace(context.config.evaluation, max_length=lengths["evaluation"]),
    )
    with pytest.raises(UserError, match=f"^{split}.max_length=130: the model has positions for 120 tokens only"):
        Loader().open(config, config.model).outputs.load()
