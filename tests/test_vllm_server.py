"""generation.vllm_server, with a stand-in for the server that has a model of the weights it got."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.config import GenerationConfig
from common.errors import UserError
from common.files import ROOT
from generation.sampler import generate, use_engine
from generation.token_sampling import SamplingSettings
from tests.helpers import random_model
from tests.test_processes import QUICK, assert_equal_histories, assert_equal_weights, run
from tests.vllm_stub import VLLMStub

EOS = 7
PROMPTS = [[3, 4, 5], [6, 8]]
KEYS = [(0, 1, 5), (0, 1, 6)]
SETTINGS = SamplingSettings(max_length=20, num_samples=2, temperature=0.8, top_k=6, top_p=0.9)


@pytest.fixture
def server():
    stub = VLLMStub(random_model(seed=1))
    yield stub
    stub.shutdown()
    stub.server_close()
    use_engine(GenerationConfig())


def connect(server, **settings):
    use_engine(GenerationConfig(engine="vllm", vllm_server=server.address, **settings))


def test_settings_of_sampling_are_sent_to_the_server(server):
    connect(server)
    assert generate(random_model(), PROMPTS, SETTINGS, [EOS, 11], KEYS, temperatures=[0.5, 1.5]) == [[[9, EOS]] * 2] * 2
    found = sorted(server.requests, key=lambda request: -len(request[0]))
    assert [prompt for prompt, _ in found] == PROMPTS
    for (_, params), room, temperature in zip(found, (17, 18), (0.5, 1.5), strict=True):
        assert (params["n"], params["temperature"], params["top_k"], params["top_p"]) == (2, temperature, 6, 0.9)
        assert (params["max_tokens"], params["stop_token_ids"], params["ignore_eos"]) == (room, [EOS, 11], True)
    seeds = [params["seed"] for _, params in found]
    generate(random_model(), PROMPTS, SamplingSettings(20), [EOS])
    assert len(set(seeds)) == 2
    assert [(params["temperature"], params["seed"]) for _, params in server.requests[2:]] == [(0.0, None)] * 2


def test_each_call_sends_the_current_weights_and_leaves_no_file(server, tmp_path):
    connect(server, vllm_weights_dir=str(tmp_path))
    model = random_model()
    for _ in range(2):
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
        generate(model, PROMPTS, SETTINGS, [EOS], KEYS)
        assert torch.equal(server.model.lm_head.weight, model.lm_head.weight)
    assert server.resets == 2
    assert len(set(server.versions)) == 3
    assert list(tmp_path.iterdir()) == []


def test_answers_of_other_weights_are_refused(server):
    connect(server)
    server.keeps_weights = True
    with pytest.raises(UserError, match="vLLM computes another model; start the server with --dtype float32"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)


def test_weights_that_another_run_sends_are_noticed(server, monkeypatch):
    connect(server)
    own = server.choices

    def choices(prompt, params):
        if "logprobs" not in params:
            server.versions.append("of another run")
        return own(prompt, params)

    monkeypatch.setattr(server, "choices", choices)
    with pytest.raises(UserError, match="weights that another run passed; each run needs a server of its own"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)


@pytest.mark.parametrize("answer", [[9], [9, 9]])
def test_answers_that_are_cut_are_refused(server, answer):
    connect(server)
    server.answer_of = lambda prompt, params: answer
    with pytest.raises(UserError, match="fewer or shorter answers than were asked for"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)


def test_a_server_that_cannot_be_used_is_refused_with_what_to_do(server, monkeypatch):
    def refused(message, **failures):
        server.failures = failures
        with pytest.raises(UserError, match=message) as caught:
            connect(server)
        assert "s3cret" not in str(caught.value)

    for key in ("s3cret\r\nX-Other: 1", "s3cr\u00e9t", "s3cret\x7f"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        refused("VLLM_API_KEY: the key has characters")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret\r\n")
    refused("without VLLM_SERVER_DEV_MODE=1", **{"/weight_info": (404, "{}")})
    refused("without --tokens-only", **{"/inference/v1/generate": (403, "{}")})
    refused("VLLM_API_KEY", **{"/v1/models": (401, '{"error": "Unauthorized"}')})
    refused("so it is not vLLM's", **{"/version": (200, "<html>")})
    refused("so it is not vLLM's", **{"/version": (404, "")})
    refused(
        "names no version, so it is not vLLM's; the address may be wrong", **{"/version": (200, '{"version": null}')}
    )
    refused("does not serve one model", **{"/v1/models": (200, '{"data": []}')})
    refused(
        "the server's own words",
        **{"/inference/v1/generate": (400, '{"error": {"message": "the server\'s own words"}}')},
    )
    refused("gives answers of another form", **{"/inference/v1/generate": (200, '{"choices": [{"index": 0}]}')})
    server.vllm_version = "0.31.2"
    refused("runs vLLM 0.31.2; 0.32 or later is needed")
    server.vllm_version, server.failures = "0.33.0", {}
    connect(server)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}


def test_an_address_without_a_server_is_refused():
    for address, message in (
        ("http://127.0.0.1:9", "does not answer .*VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER"),
        ("127.0.0.1:8000", "expected an address such as"),
        ("http://ann:s3cret@127.0.0.1:8000", "expected an address such as"),
        ("file:///etc", "expected an address such as"),
        ("http://[::1:8000", "expected an address such as"),
        ("http://127.0.0.1:80000", "expected an address such as"),
        ("http://127.0.0.1:abc", "expected an address such as"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            use_engine(GenerationConfig(engine="vllm", vllm_server=address))
        assert "s3cret" not in str(caught.value)
    use_engine(GenerationConfig())


def test_a_key_is_not_sent_to_another_address(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    other = VLLMStub(None)
    monkeypatch.setattr(
        "tests.vllm_stub._Handler.end_headers",
        lambda handler: (
            handler.send_header("Location", f"{other.address}/version") if handler.server is server else None,
            super(type(handler), handler).end_headers(),
        ),
    )
    server.failures = {"/version": (302, "")}
    with pytest.raises(UserError, match="302"):
        connect(server)
    assert other.headers == []
    other.shutdown()


def test_no_proxy_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    connect(server)


def test_a_generation_config_that_cannot_be_saved_is_not(server):
    connect(server)
    model = random_model()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    own = model.generation_config
    generate(model, PROMPTS, SETTINGS, [EOS], KEYS)
    assert torch.equal(server.model.lm_head.weight, model.lm_head.weight)
    assert model.generation_config is own


def test_weights_that_the_server_cannot_load_are_explained(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"generation.vllm_weights_dir: there is no folder"):
        connect(server, vllm_weights_dir=str(tmp_path / "missing"))
    connect(server, vllm_weights_dir=str(tmp_path))
    server.failures = {"/collective_rpc": (500, "")}
    with pytest.raises(UserError, match="It serves /models/m: start it with a folder of the same model"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)
    server.failures = {"/reset_prefix_cache": (200, '{"success": false}')}
    with pytest.raises(UserError, match="answers requests of others"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)
    with pytest.raises(UserError, match="cuts answers at 64 tokens; start it with --max-model-len 65"):
        generate(random_model(), PROMPTS, SamplingSettings(65), [EOS])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"generation.vllm_weights_dir: the weights need .* GB"):
        generate(random_model(), PROMPTS, SETTINGS, [EOS], KEYS)


@pytest.mark.slow
def test_two_processes_have_the_answers_that_one_has(server):
    """Each process has other questions; the second has none in the second call. The server is asked once for each."""
    server.answer_of = lambda prompt, params: [prompt[-1], 10 + (params["seed"] or 0) % 10, EOS]
    script = ROOT / "tests" / "vllm_ranks.py"
    found = {}
    for processes in (1, 2):
        server.requests.clear()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *(launcher if processes > 1 else []), str(script), server.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        found[processes] = done.stdout.splitlines()[-1]
        assert len(server.requests) == 10
    assert found[1] == found[2]


def test_pmc_in_two_processes_trains_as_in_one(server, models_dir, tmp_path):
    """All questions but one are solved in the first step, so later one of the two processes has nothing to sample."""
    greedy = []

    def answer(prompt, params):
        if params["temperature"] == 0:
            greedy.append(prompt)
            return [300, 301, *params["stop_token_ids"]]
        unsolved = prompt == min(greedy[:30])  # the first ones are those of the initial responses
        return [*((300, 301) if unsolved else (400, 401)), *params["stop_token_ids"]]

    server.max_model_len, server.answer_of = 512, answer
    words = (
        "-cn=PMC-unlearn-tiny",
        "method.min_len=0",
        "generation.engine=vllm",
        f"generation.vllm_server={server.address}",
        *QUICK,
    )
    histories = [run(processes, tmp_path / str(processes), models_dir, *words) for processes in (1, 2)]
    assert [record["solved"] for record in histories[0]] == [pytest.approx(29 / 30)] * 3
    assert_equal_histories(*histories)
    assert_equal_weights(tmp_path / "1", tmp_path / "2")
