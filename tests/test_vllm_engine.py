"""generation.engine=vllm, with a stand-in for vLLM that records what it is given and has a model of the weights it got."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.config import GenerationConfig
from common.errors import UserError
from generation import vllm_engine
from generation.sampler import generate, use_engine
from generation.token_sampling import SamplingSettings
from tests.helpers import random_model

EOS = 7
PROMPTS = [[3, 4, 5], [6, 8]]
KEYS = [(0, 1, 5), (0, 1, 6)]


class StandIn:
    """What the engine uses of vllm.LLM. All answers are [9, EOS]."""

    def __init__(self, model, **options):
        self.model, self.options = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)), options
        self.requests, self.params, self.syncs, self.resets = [], [], 0, 0
        self.loses_weights = False
        StandIn.made.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        weights = {name: torch.zeros_like(w) if self.loses_weights else w for name, w in kwargs["weights_iterator"]}
        self.syncs += self.model.load_state_dict(weights, strict=False).unexpected_keys == []

    def apply_model(self, function):
        pass

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, requests, params, use_tqdm):
        if hasattr(params[0], "logprobs"):  # the check of the weights
            logits = self.model(torch.tensor([requests[0]["prompt_token_ids"]])).logits[0, -1].log_softmax(-1)
            token = int(logits.argmax())
            logprobs = [{token: SimpleNamespace(logprob=float(logits[token]))}]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=logprobs)])]
        self.requests, self.params = requests, params
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(9, EOS))] * p.n) for p in params]


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in is installed and chosen; yields the list of the engines that were made."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = StandIn, lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_engine, "_engine", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")  # restored afterwards
    StandIn.made = []
    use_engine(GenerationConfig(engine="vllm", vllm_memory_fraction=0.4))
    yield StandIn.made
    use_engine(GenerationConfig())


SETTINGS = SamplingSettings(max_length=20, num_samples=2, temperature=0.8, top_k=6, top_p=0.9)


def test_settings_of_sampling_are_passed_to_vllm(vllm):
    answers = generate(random_model(), PROMPTS, SETTINGS, [EOS, 11], KEYS)
    assert answers == [[[9, EOS]] * 2] * 2
    (engine,) = vllm
    assert [request["prompt_token_ids"] for request in engine.requests] == PROMPTS
    for params, room in zip(engine.params, (17, 18), strict=True):
        assert (params.n, params.temperature, params.top_k, params.top_p) == (2, 0.8, 6, 0.9)
        assert (params.max_tokens, params.stop_token_ids) == (room, [EOS, 11])
    assert engine.options["gpu_memory_utilization"] == 0.4
    assert engine.options["max_model_len"] == 20
    assert engine.options["trust_remote_code"] is False


def test_seeds_follow_the_rng_keys_and_temperatures_the_prompts(vllm):
    seeds = []
    for keys in (KEYS, KEYS[::-1], [(0, 2, 5), (0, 2, 6)]):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], keys, temperatures=[0.5, 1.5])
        seeds.append([params.seed for params in vllm[0].params])
    assert seeds[0] == seeds[1][::-1]
    assert len({seed for both in seeds for seed in both}) == 4
    assert [params.temperature for params in vllm[0].params] == [0.5, 1.5]
    generate(random_model(), PROMPTS, SamplingSettings(20), [EOS])
    assert [(params.temperature, params.seed) for params in vllm[0].params] == [(0.0, None)] * 2


def test_each_call_has_the_current_weights_in_the_same_engine(vllm):
    model = random_model()
    generate(model, PROMPTS, SETTINGS, [EOS], KEYS)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    generate(model, PROMPTS, SETTINGS, [EOS], KEYS)
    (engine,) = vllm
    assert torch.equal(engine.model.lm_head.weight, model.lm_head.weight)
    assert engine.syncs == engine.resets == 2
    generate(random_model("phi"), PROMPTS, SETTINGS, [EOS], KEYS)
    assert len(vllm) == 2


def test_answers_of_other_weights_are_refused(vllm):
    generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)
    vllm[0].loses_weights = True
    with pytest.raises(UserError, match="vLLM computes another model"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)


def test_criteria_score_all_answers_and_stop_none(vllm):
    checked = []

    class Criteria:
        every = 8

        def check(self, finished, running):
            checked.append(([(*partial,) for partial in finished], running))
            return []

    generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS, stopping_criteria=Criteria())
    assert checked == [([(i, j, [9, EOS]) for i in range(2) for j in range(2)], [])]


def test_what_vllm_cannot_do_is_refused(vllm):
    with pytest.raises(UserError, match="sampling_batch_size"):
        generate(random_model(), PROMPTS, SamplingSettings(20, batch_size=4), [EOS])
    adapted = random_model()
    adapted.peft_config = {}
    with pytest.raises(UserError, match="LoRA"):
        generate(adapted, PROMPTS, SamplingSettings(20), [EOS])
    with pytest.raises(UserError, match="used with generation.engine=vllm only"):
        use_engine(GenerationConfig(vllm_server="http://127.0.0.1:8000"))


def test_equal_prompts_are_answered_once(vllm):
    answers = generate(random_model(), [*PROMPTS, PROMPTS[0]], SamplingSettings(20), [EOS])
    assert len(vllm[0].requests) == 2
    assert answers == [[[9, EOS]]] * 3
    answers[0][0].append(1)
    assert answers[2] == [[9, EOS]]


def test_vllm_must_be_installed(monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    try:
        with pytest.raises(UserError, match=r"pip install -r requirements-vllm.txt"):
            use_engine(GenerationConfig(engine="vllm"))
    finally:
        use_engine(GenerationConfig())
