"""generation.engine=vllm, with a stand-in for vLLM that records what it is given and has a model of the weights it got."""

import random
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

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
        self.loses_weights = self.is_shut_down = False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        self.checked = []
        StandIn.made.append(self)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def shutdown(self):
        self.is_shut_down = True

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
            self.checked.append([request["prompt_token_ids"] for request in requests])
            return [self.first_logprobs(prompt, p.logprobs) for prompt, p in zip(self.checked[-1], params, strict=True)]
        self.requests, self.params = requests, params
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(9, EOS))] * p.n) for p in params]

    def first_logprobs(self, prompt, number):
        logits = self.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        logprobs = {int(i): SimpleNamespace(logprob=float(logits[i])) for i in logits.topk(number).indices}
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[int(logits.argmax())], logprobs=[logprobs])])


class StandInArgs:
    """What the engine uses of vllm.EngineArgs."""

    borrowed = False

    def __init__(self, model, **options):
        pass

    def create_model_config(self):
        return SimpleNamespace(using_transformers_backend=lambda: StandInArgs.borrowed)


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in is installed and chosen; yields the list of the engines that were made."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = StandIn, lambda **options: SimpleNamespace(**options)
    module.EngineArgs = StandInArgs
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


def test_the_check_compares_several_tokens_of_several_prompts(vllm, monkeypatch):
    prompts = [[i, 3] for i in range(20, 30)]
    model = random_model()
    generate(model, prompts, SamplingSettings(20), [EOS])
    assert vllm[0].checked == [[[20, 3], [23, 3], [26, 3], [29, 3]]]
    of_stand_in = StandIn.first_logprobs

    def differs(place, change):
        def first_logprobs(self, prompt, number):
            output = of_stand_in(self, prompt, number)
            (logprobs,) = output.outputs[0].logprobs
            if prompt == prompts[-1]:
                list(logprobs.values())[place].logprob += change
            return output

        monkeypatch.setattr(StandIn, "first_logprobs", first_logprobs)

    for change in (0.002, float("nan"), -float("inf")):
        differs(19, change)
        with pytest.raises(UserError, match="vLLM computes another model"):
            generate(model, prompts, SamplingSettings(20), [EOS])
    differs(19, 0.0005)
    generate(model, prompts, SamplingSettings(20), [EOS])


def test_a_diverged_model_is_named_as_that(vllm):
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        generate(model, PROMPTS, SETTINGS, [EOS], KEYS)


def test_making_an_engine_keeps_the_random_states(vllm):
    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    model = random_model()
    for seed in (5, 6):
        set_seed(seed)
        expected = drawn()
        set_seed(seed)
        vllm_engine._engine = None
        generate(model, PROMPTS, SETTINGS, [EOS], KEYS)
        assert drawn() == expected
    assert len(vllm) == 2


def test_an_engine_is_shut_down_before_the_next_one(vllm):
    generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)
    generate(random_model(), PROMPTS, SamplingSettings(30), [EOS])
    assert [engine.is_shut_down for engine in vllm] == [True, False]


def test_with_torchrun_a_freed_engine_leaves_the_process_group(vllm, monkeypatch):
    """vLLM ends the process group in the core's shutdown, which also runs when the core is deleted."""
    generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)
    (engine,) = vllm
    freed = []
    engine.llm_engine.model_executor = SimpleNamespace(shutdown=lambda: freed.append(True))
    monkeypatch.setattr(vllm_engine, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(vllm_engine, "_kept_cores", [])
    vllm_engine._free(engine)
    assert (freed, engine.is_shut_down) == ([True], False)
    assert vllm_engine._kept_cores == [engine.llm_engine.engine_core]


def test_a_model_that_vllm_computes_by_transformers_is_refused(vllm, monkeypatch):
    monkeypatch.setattr(StandInArgs, "borrowed", True)
    with pytest.raises(UserError, match=r"vLLM has no \w+ of its own.*generation.vllm_server"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)
    assert vllm == []


@pytest.mark.parametrize("method", ["__init__", "collective_rpc"])
def test_errors_of_vllm_name_the_setting(vllm, monkeypatch, method):
    def fail(self, *args, **options):
        raise ValueError("free memory is less than desired")

    monkeypatch.setattr(StandIn, method, fail)
    message = r"generation.engine=vllm: .*free memory is less than desired.*generation.vllm_memory_fraction \(now 0.4\)"
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(UserError, match="raises a temperature of 0.009 to 0.01"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS, temperatures=[0.5, 0.009])
    generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS, temperatures=[0.0, 0.01])
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
