"""Every causal architecture of transformers that a small configuration can build: its answers and its losses are right, or the
model is refused. docs/architectures.md has the outcomes; after a change of transformers, `python tests/test_architectures.py`
prints them anew."""

import re
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from common.collate import collate
from common.errors import UserError
from common.files import ROOT
from common.losses import answer_losses
from common.model_checks import check_causal
from common.prompts import Example
from generation.plain_decoder import PlainDecoder, decoder_of
from generation.sampler import generate
from generation.token_sampling import SamplingSettings

PAGE = ROOT / "docs" / "architectures.md"
LARGEST = 3_000_000  # parameters; composite models build parts of full size, whose text models are types of their own
NOT_TRIED = {"kimi_linear", "zamba", "zamba2"}  # half a minute without its kernels; no small configuration found
EOS = 2
PROMPTS = [[50, 51, 52, 53, 54, 55, 56], [60, 61, 62], [70, 71, 72, 73, 74]]
# Values for whichever of these names a configuration has.
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "block_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "decoder_ffn_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_layer_input", "d_kv", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_topk"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_head", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "rotary_dim"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    "index_head_dim": 16,
    "sliding_window": 16,
    "conv_L_cache": 3,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "is_decoder": True,
}
MORE = {
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "expand": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16), "attention_head_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def small_model(architecture: str) -> PreTrainedModel | None:
    """A model with random weights, large enough that its answers vary; None if it cannot be built or is too large."""
    try:
        default = AutoConfig.for_model(architecture)
    except Exception:  # its own default values are refused
        return None
    names = default.to_dict().keys()
    values = {name: value for name, value in SMALL.items() if name in names or hasattr(default, name)}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if isinstance(kinds := default.to_dict().get("layer_types"), list):
        values["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        values["num_hidden_layers"] = len(values["layer_types"])
    values |= MORE.get(architecture, {})
    for left_out in ((), ("head_dim", "v_head_dim"), ("num_hidden_layers",), ("max_position_embeddings",)):
        kept = {name: value for name, value in values.items() if name not in left_out}
        try:
            config = type(default)(**kept)
            with torch.device("meta"):
                parameters = AutoModelForCausalLM.from_config(config).num_parameters()
            break
        except Exception:  # whatever its code raises for such values
            parameters = LARGEST + 1
    if parameters > LARGEST:
        return None
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5)
    return model


def outcome(architecture: str) -> str:
    """How answers of the architecture are generated, after a check that they and its losses are right."""
    model = None if architecture in NOT_TRIED else small_model(architecture)
    if model is None:
        return "not tried"
    settings = SamplingSettings(max_length=16)
    try:
        check_causal(model, "model.path=x")
        answers = generate(model, PROMPTS, settings, [EOS])
    except UserError as error:
        reasons = {
            "bidirectional": "bidirectional",
            "padding at its end": "depends on padding",
            "fails": "needs more than ids",
        }
        return "refused: " + next(short for words, short in reasons.items() if words in str(error))
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        assert answer == greedy_without_cache(model, prompt, settings.max_length)
    examples = [Example(prompt[:2], prompt[2:]) for prompt in PROMPTS]
    losses, _ = answer_losses(model, collate(examples))
    alone = [cross_entropy_of_answer(model, prompt, 2) for prompt in PROMPTS]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-3, atol=1e-4)
    return "plain" if isinstance(decoder_of(model, settings.max_length), PlainDecoder) else "cache"


def greedy_without_cache(model: PreTrainedModel, prompt: list[int], max_length: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < max_length and (len(ids) == len(prompt) or ids[-1] != EOS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def cross_entropy_of_answer(model: PreTrainedModel, ids: list[int], prompt_length: int) -> torch.Tensor:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, prompt_length - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt_length:]), reduction="none")


def page_of(outcomes: dict[str, str]) -> str:
    by_outcome = defaultdict(list)
    for architecture, found in outcomes.items():
        by_outcome[found].append(f"`{architecture}`")
    return "".join(f"| {found} | {', '.join(names)} |\n" for found, names in sorted(by_outcome.items()))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("llama", "cache"), ("gpt2", "cache"), ("gemma4_text", "cache"), ("mamba", "plain"), ("bart", "plain")]
    + [("deepseek_v32", "plain"), ("qwen3_next", "cache"), ("xlm", "refused: bidirectional")],
)
def test_some_architectures(architecture, expected):
    assert outcome(architecture) == expected


@pytest.mark.slow
def test_the_page_has_every_architecture_and_the_outcome_of_a_sixth():
    """`python tests/test_architectures.py` prints the outcomes of all."""
    rows = re.findall(r"^\| (\S[^|]*) \| (`[^|]*) \|$", PAGE.read_text(), re.MULTILINE)
    found = {name: outcome for outcome, names in rows for name in re.findall(r"`([^`]+)`", names)}
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sorted(set(found) - {"model_type"}) == names  # the head of the table
    sixth = names[::6]
    assert {name: outcome(name) for name in sixth} == {name: found[name] for name in sixth}


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(page_of({name: outcome(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}))
