"""What needs an NVIDIA GPU: the bfloat16 replica, bitsandbytes, flash attention, and the CPU's greedy answers there."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common.config import ModelConfig, PromptConfig
from common.model import load_model
from evaluation.metrics.quantization import load_with_bitsandbytes
from generation import cuda_graphs
from generation.decoder import Decoder
from generation.replica import Replica
from generation.sampler import generate
from generation.token_sampling import SamplingSettings
from tests.helpers import random_model, random_prompts, sampled

pytestmark = pytest.mark.gpu

PROMPT = PromptConfig(style="plain")
PROMPTS, KEYS = random_prompts((3, 14, 7, 5, 11)), [(0, 1, i) for i in range(5)]
sampled_answers = partial(sampled, prompts=PROMPTS, keys=KEYS, top_p=0.95, max_length=90)


def test_a_bfloat16_replica_is_sampled_on_a_gpu():
    source = random_model().cuda()
    replica = Replica(source, torch.bfloat16)
    before = sampled_answers(replica.refresh())
    assert sampled_answers(Replica(copy.deepcopy(source), torch.bfloat16).model) == before
    with torch.no_grad():
        source.lm_head.weight.copy_(source.lm_head.weight.flip(0))
    assert sampled_answers(replica.refresh()) != before


def test_greedy_answers_on_a_gpu_are_those_of_the_cpu():
    model = random_model()
    settings = SamplingSettings(60)
    expected = generate(model, PROMPTS, settings, [7])
    assert generate(model.cuda(), PROMPTS, settings, [7]) == expected


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_bitsandbytes_loads_and_answers(checkpoint, bits, kind):
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(path=checkpoint, prompt=PROMPT, dtype="bfloat16")
    context = SimpleNamespace(model=SimpleNamespace(config=config), loader=SimpleNamespace(clear=lambda: None))
    copy_ = load_with_bitsandbytes(context, bits)
    assert type(copy_.model.layers[0].mlp.up_proj).__name__ == kind
    assert generate(copy_, PROMPTS, SamplingSettings(30), [7])


def test_flash_attention_gives_the_logits_of_sdpa(checkpoint, tokenizer):
    pytest.importorskip("flash_attn")
    logits, settings = [], SamplingSettings(30)
    for kernel in ("sdpa", "flash_attention_2"):
        config = ModelConfig(path=checkpoint, prompt=PROMPT, dtype="bfloat16", attn_implementation=kernel)
        model = load_model(config, tokenizer, trainable=False).cuda().eval()
        answers = generate(model, PROMPTS, settings, [])
        assert [len(prompt) + len(ids) for prompt, (ids,) in zip(PROMPTS, answers, strict=True)] == [30] * 5
        decoder, tokens = Decoder(model), torch.arange(1, 6, device="cuda")
        with torch.no_grad():
            logits.append(torch.stack([decoder.start(PROMPTS, 1, 3), decoder.step(tokens), decoder.step(tokens)]))
    assert cuda_graphs.alike(*logits)
