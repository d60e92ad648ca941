"""CUDA graphs of the decode step draw what the step itself draws.

Without one, a step that is recorded as a function stands for a graph: it reads and writes the same memory.
"""

import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from generation import cuda_graphs, sampler
from generation.cuda_graphs import GraphDecoder, decoder_with_cache, use_cuda_graphs
from generation.decoder import Decoder
from tests.helpers import random_model, random_prompts, sampled

pytestmark = pytest.mark.slow  # nearly all draw hundreds of tokens
PROMPTS, KEYS = random_prompts((3, 14, 7, 5, 11)), [(0, 1, i) for i in range(5)]
draw = partial(sampled, prompts=PROMPTS, keys=KEYS, top_p=0.95, max_length=90)


def stand_in(step):
    """What `record` returns, without CUDA: a replay calls the step."""
    result = step().clone()
    return lambda: result.copy_(step()), result


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Graphs are switched on there; on a CPU with stand-ins, checked as often as on a GPU."""
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graphs, "record", stand_in)
        monkeypatch.setattr(cuda_graphs, "decoder_with_cache", GraphDecoder)
        monkeypatch.setattr(sampler, "decoder_of", lambda model, _: GraphDecoder(model))
        monkeypatch.setitem(sampler.CHECK_INTERVAL, "cpu", 8)
    use_cuda_graphs("auto")
    yield request.param
    use_cuda_graphs(False)


@pytest.fixture
def steps(monkeypatch):
    """How often a decoder has taken a step itself, and how often a graph was replayed."""
    counts = {"plain": 0, "replayed": 0}

    def counting(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(Decoder, "next_logits", counting("plain", Decoder.next_logits))
    monkeypatch.setattr(GraphDecoder, "_replay", counting("replayed", GraphDecoder._replay))
    return counts


def without_graphs(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "decoder_of", lambda model, _: Decoder(model))
        return function()


def graphs_of(model):
    return cuda_graphs._of_model.get(model, "untried")


def test_graphs_are_off_unless_switched_on():
    model = random_model()
    assert type(decoder_with_cache(model)) is Decoder
    on_cuda = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(_attn_implementation="sdpa"))
    eager = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(_attn_implementation="eager"))
    assert type(decoder_with_cache(on_cuda)) is Decoder
    try:
        use_cuda_graphs("auto")
        assert [type(decoder_with_cache(some)) for some in (on_cuda, eager, model)] == [GraphDecoder, Decoder, Decoder]
    finally:
        use_cuda_graphs(False)
    assert type(decoder_with_cache(on_cuda)) is Decoder


@pytest.mark.parametrize("batch_size", [None, 4])
def test_graphs_draw_the_same_tokens_in_shrinking_batches(device, steps, monkeypatch, batch_size):
    """Through several row counts and blocks of columns; a second call captures nothing."""
    model = random_model().to(device)
    draw_once = partial(draw, model, batch_size=batch_size)
    expected = without_graphs(monkeypatch, draw_once)
    steps["plain"] = 0
    assert draw_once() == expected
    captured = graphs_of(model).replays
    assert len({rows for rows, _ in captured}) > 1
    assert {columns for _, columns in captured} == {64, 128}
    assert steps["plain"] == len(captured) < steps["replayed"]
    assert draw_once() == expected
    assert steps["plain"] == len(captured)


def test_graphs_follow_the_weights(device, monkeypatch):
    """Updated in place they are read anew; put elsewhere, the graphs are captured anew."""
    model = random_model().to(device)
    before, first = draw(model), graphs_of(model)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = draw(model)
    assert after == without_graphs(monkeypatch, lambda: draw(model)) != before
    assert graphs_of(model) is first
    model.lm_head.weight.data = model.lm_head.weight.flip(0).contiguous()
    assert draw(model) == before
    assert graphs_of(model) is not first


def test_two_models_take_turns(device, monkeypatch):
    models = [random_model(seed=seed).to(device) for seed in (0, 1)]
    expected = [without_graphs(monkeypatch, lambda model=model: draw(model)) for model in models]
    assert expected[0] != expected[1]
    for _ in range(2):
        assert [draw(model) for model in models] == expected
    assert graphs_of(models[0]) is not graphs_of(models[1])


def test_larger_batches_get_larger_buffers(device, monkeypatch):
    model = random_model().to(device)
    for prompts, max_length in ((2, 40), (5, 90), (3, 40), (5, 200)):
        options = {"prompts": PROMPTS[:prompts], "keys": KEYS[:prompts], "max_length": max_length}
        assert draw(model, **options) == without_graphs(monkeypatch, lambda options=options: draw(model, **options))
    assert graphs_of(model).seq_len == 256


def test_layers_with_windows_go_without_graphs(device, steps):
    model = random_model("gemma3_text").to(device)
    draw(model)
    assert (steps["replayed"], graphs_of(model)) == (0, "untried")


def raising(step):
    raise RuntimeError("no capture here")


def wrong(step):
    result = step() + 9
    return lambda: None, result


@pytest.mark.parametrize(
    ("broken", "why"), [(raising, "no capture here"), (wrong, "differ from those of the step without a graph")]
)
def test_graphs_that_do_not_work_are_given_up(device, steps, monkeypatch, caplog, broken, why):
    model = random_model().to(device)
    expected = without_graphs(monkeypatch, lambda: draw(model))
    monkeypatch.setattr(cuda_graphs, "record", broken)
    assert draw(model) == expected
    assert draw(model) == expected
    assert steps["replayed"] == 1, "they are tried once"
    assert graphs_of(model) is None
    assert [why in record.getMessage() for record in caplog.records if "graph" in record.getMessage()] == [True]


@pytest.mark.gpu
def test_graphs_do_not_keep_a_model():
    use_cuda_graphs("auto")
    try:
        model = random_model().cuda()
        draw(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
    finally:
        use_cuda_graphs(False)
