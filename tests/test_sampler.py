"""The generation engine against Hugging Face's `generate`: the same greedy answers, the same distribution of samples.

Weights are scaled up, so that the models prefer some tokens clearly.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.config import PromptConfig
from common.prompts import PromptFormat
from generation import decoder, sampler
from generation.decoder import Decoder
from generation.kv_cache import PreallocatedLayer, compact_indices
from generation.prepacked_linear import prepacked_linears
from generation.replica import Replica
from generation.sampler import generate
from generation.token_sampling import SamplingSettings, draw_tokens, random_numbers, top_tokens
from tests.helpers import ARCHITECTURES, ROWS, SAMPLED, SMALL, random_model, random_prompts, sampled
from unlearning.trainer import UnlearningTrainer


def hugging_face_greedy(model, prompt: list[int], max_length: int, ends: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_length": max_length, "eos_token_id": ends, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


# --- greedy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_equal_hugging_faces(architecture):
    model, prompts = random_model(architecture), random_prompts((3, 14, 7, 5, 11))
    ends = [5, 6]
    answers = generate(model, prompts, SamplingSettings(max_length=30), ends)
    assert [answer[0] for answer in answers] == [hugging_face_greedy(model, prompt, 30, ends) for prompt in prompts]
    assert len({len(answer[0]) for answer in answers}) > 2  # they leave the batch at different times


def test_greedy_answers_to_chat_prompts_equal_hugging_faces(chat_tokenizer):
    model = random_model(vocab_size=len(chat_tokenizer))
    form = PromptFormat(chat_tokenizer, PromptConfig(style="chat", system="Be brief."))
    prompts = [form.prompt(row.question) for row in ROWS]
    assert len({len(prompt) for prompt in prompts}) > 4
    longest = max(map(len, prompts)) + 8
    answers = generate(model, prompts, SamplingSettings(longest), [form.eos_token_id])
    expected = [hugging_face_greedy(model, prompt, longest, [form.eos_token_id]) for prompt in prompts]
    assert [answer[0] for answer in answers] == expected


def test_an_answer_ends_with_its_end_token_or_at_max_length():
    prompts, ends = random_prompts((3, 20, 7, 12, 9)), [7, 8]
    answers = sampled(random_model(), prompts, [(0, i) for i in range(5)], ends, num_samples=20, top_p=1.0)
    rows = [(prompt, answer) for prompt, some in zip(prompts, answers, strict=True) for answer in some]
    ended = [answer[-1] in ends for _, answer in rows]
    assert 10 < sum(ended) < 95
    for (prompt, answer), has_end in zip(rows, ended, strict=True):
        assert not set(answer[:-1]) & set(ends)
        assert has_end or len(prompt) + len(answer) == 30
        assert len(prompt) + len(answer) <= 30


def test_a_prompt_one_token_short_of_max_length_gets_one_token():
    answers = generate(random_model(), random_prompts((9, 4)), SamplingSettings(max_length=10), [])
    assert [len(answer[0]) for answer in answers] == [1, 6]


def test_no_prompts_give_no_answers():
    assert generate(random_model(), [], SamplingSettings(max_length=10), [7]) == []


# --- one draw -----------------------------------------------------------------------------------------------------------


def hugging_face_probabilities(logits, temperature, top_k, top_p) -> torch.Tensor:
    """What `generate(do_sample=True)` draws the next token from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, logits.clone()).softmax(-1)


def drawn(probabilities: list[float], uniforms: list[float], **options) -> list[int]:
    logits = torch.tensor(probabilities).log().expand(len(uniforms), -1)
    settings = SamplingSettings(max_length=1, **{"temperature": 1.0, **options})
    return draw_tokens(logits, settings, torch.tensor(uniforms)[:, None].repeat(1, 2)).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_temperature_near_0_takes_the_likeliest_token(options):
    assert drawn([0.1, 0.5, 0.15, 0.25], [0.0, 0.5, 0.999999], temperature=1e-39, **options) == [1, 1, 1]


def test_tokens_are_picked_by_the_cumulative_distribution():
    """In the order of the vocabulary, with top_k the likeliest first."""
    uniforms = [0.0, 0.09, 0.11, 0.59, 0.61, 0.74, 0.76, 0.999999]
    assert drawn([0.1, 0.5, 0.15, 0.25], uniforms) == [0, 0, 1, 1, 2, 2, 3, 3]
    uniforms = [0.0, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.999999]
    assert drawn([0.1, 0.5, 0.15, 0.25, 0.0], uniforms, top_k=4) == [1, 1, 3, 3, 2, 2, 2, 0]


def test_temperature_zero_takes_the_likeliest_token():
    assert drawn([0.3, 0.3001, 0.3999], [0.0, 0.5, 0.99], temperature=0) == [2, 2, 2]


def test_temperature_divides_the_logits():
    """At temperature 0.5 probabilities are squared: 0.64 : 0.04, so the first has 16/17 = 0.941."""
    assert drawn([0.8, 0.2], [0.79, 0.81, 0.93, 0.95]) == [0, 1, 1, 1]
    assert drawn([0.8, 0.2], [0.79, 0.81, 0.93, 0.95], temperature=0.5) == [0, 0, 0, 1]


def test_top_k_keeps_the_k_likeliest():
    """Of 0.4, 0.3, 0.2, 0.1 the first two have 4/7 = 0.571 and 3/7."""
    assert drawn([0.1, 0.4, 0.2, 0.3], [0.57, 0.58, 0.999], top_k=2) == [1, 3, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    """0.4 + 0.3 reaches 0.6 and 0.4 alone does not: they have 4/7 = 0.571 and 3/7."""
    assert drawn([0.4, 0.3, 0.2, 0.1], [0.57, 0.58, 0.999], top_k=3, top_p=0.6) == [0, 1, 1]
    assert drawn([0.4, 0.3, 0.2, 0.1], [0.39, 0.41, 0.69, 0.999], top_p=0.6) == [0, 1, 1, 1]
    assert drawn([0.4, 0.3, 0.2, 0.1], [0.999], top_p=0.01) == [0]


def test_top_p_applies_to_what_top_k_left():
    """After top_k = 2 the first token has 0.571 > 0.5 and stands alone; top_p first would keep two."""
    assert drawn([0.4, 0.3, 0.2, 0.1], [0.0, 0.999], top_k=2, top_p=0.5) == [0, 0]
    assert drawn([0.4, 0.3, 0.2, 0.1], [0.0, 0.999], top_p=0.5) == [0, 1]


def test_a_tie_at_the_last_place_keeps_k_tokens():
    tokens = drawn([0.4, 0.2, 0.2, 0.2], np.linspace(0, 0.999, 100).tolist(), top_k=2)
    assert len(set(tokens)) == 2


def frequencies(logits: torch.Tensor, draws: int, **options) -> torch.Tensor:
    """How often each token is drawn for uniforms that fill the cube evenly (a Kronecker sequence), without chance."""
    steps = torch.tensor([1 / draws, *(prime**0.5 for prime in (2, 3, 5, 7, 11, 13, 17))], dtype=torch.float64)
    uniforms = ((torch.arange(draws)[:, None] + 0.5) * steps).frac().float()
    settings = SamplingSettings(max_length=1, **options)
    tokens = draw_tokens(logits.expand(draws, -1), settings, uniforms)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


GRID = [(t, k, p) for t in (0.7, 1.0, 1.5) for k in (0, 1, 5, 50) for p in (0.3, 0.9, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), GRID)
def test_probabilities_equal_hugging_faces(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found, expected = frequencies(logits, 8000, **options), hugging_face_probabilities(logits, **options)[0]
    # Where draws are rejected, the numbers of several draws decide together, and the cube is not filled that evenly.
    assert torch.allclose(found, expected, atol=2.5 / 8000 if top_k or top_p == 1 else 0.006)
    assert (found[expected == 0] == 0).all()


@pytest.mark.parametrize("vocabulary", [40, 800, 803, 2000, 2007])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_largest_logits_are_those_of_topk(vocabulary, k):
    """Also where the largest lie side by side, at the end of the vocabulary, or are equal."""
    k = min(k, vocabulary)
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[1], logits[2] = logits[1].sort().values, logits[2].sort(descending=True).values
    logits[3], logits[4] = logits[3].round(), 0.0
    logits[5, k:] = -torch.inf
    for typed in (logits, logits.bfloat16()):
        values, tokens = top_tokens(typed, k)
        assert torch.equal(values, typed.topk(k).values)
        assert torch.equal(typed.gather(1, tokens), values)
        assert all(len(set(row)) == k for row in tokens.tolist())


# --- the distribution of whole answers ----------------------------------------------------------------------------------

VOCABULARY, DRAWS = 12, 6000
PROMPT = [3, 9, 4]
OTHERS = [{"top_p": 0.9}, {"top_p": 0.75}, {"top_k": 5}, {"top_k": 7, "top_p": 0.97}, {"temperature": 1.5}]


@pytest.fixture(scope="module")
def small_model():
    return random_model(vocab_size=VOCABULARY, seed=1, scale=9.0)


@pytest.fixture(scope="module")
def our_pairs(small_model) -> np.ndarray:
    return count_pairs(our_samples(small_model))


def our_samples(model, **options) -> list[list[int]]:
    """First two tokens of many answers, none of which ends early."""
    return sampled(model, [PROMPT], [(0, 5)], (), len(PROMPT) + 2, DRAWS, batch_size=DRAWS, **options)[0]


def count_pairs(answers) -> np.ndarray:
    """How often each first token is followed by each second one; shape (vocabulary, vocabulary)."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, tuple(np.array(answers).T), 1)
    return counts


@torch.no_grad()
def exact_pairs(model, **options) -> np.ndarray:
    """The exact probability of each pair."""
    options = {**SAMPLED, **options}
    first = hugging_face_probabilities(model(torch.tensor([PROMPT])).logits[:, -1], **options)
    after = torch.tensor([[*PROMPT, token] for token in range(VOCABULARY)])
    second = hugging_face_probabilities(model(after).logits[:, -1], **options)
    return (first.T * second).double().numpy()


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-squared goodness of fit; cells that are expected fewer than five times are pooled."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = counts.sum() * probabilities / probabilities.sum()
    often = expected >= 5
    observed, expected = ([*cells[often], cells[~often].sum()] for cells in (counts, expected))
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue


def test_first_tokens_have_the_exact_distribution(small_model, our_pairs):
    first = exact_pairs(small_model).sum(1)
    assert (first > 0).sum() >= 4
    assert p_value(our_pairs.sum(1), first) > 0.01


def test_second_tokens_have_the_exact_distribution_given_the_first(small_model, our_pairs):
    exact = exact_pairs(small_model)
    p_values = [p_value(counts, row) for counts, row in zip(our_pairs, exact, strict=True) if counts.sum() >= 300]
    assert len(p_values) >= 4
    assert min(p_values) > 0.01 / len(p_values)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_the_exact_distribution_of_other_settings_is_told_apart(small_model, our_pairs, other):
    assert p_value(our_pairs, exact_pairs(small_model)) > 0.01
    assert p_value(our_pairs, exact_pairs(small_model, **other)) < 1e-9


def same_distribution(counts: np.ndarray, others: np.ndarray) -> float:
    """P-value of the chi-squared test that two samples come from one distribution; rare cells are pooled."""
    often = counts + others >= 10
    table = [[*sample[often], sample[~often].sum()] for sample in (counts, others)]
    return chi2_contingency([column for column in zip(*table, strict=True) if sum(column)]).pvalue


def test_samples_have_the_distribution_of_hugging_faces_samples(small_model, our_pairs):
    torch.manual_seed(0)
    ids = torch.tensor([PROMPT])
    options = {"num_return_sequences": DRAWS, "max_new_tokens": 2, "pad_token_id": 0, "do_sample": True, **SAMPLED}
    theirs = count_pairs(small_model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, len(PROMPT) :])
    assert same_distribution(our_pairs, theirs) > 0.01
    for other in OTHERS:
        assert same_distribution(count_pairs(our_samples(small_model, **other)), theirs) < 1e-6, other


def test_samples_of_one_prompt_are_independent_of_each_other(small_model):
    """Neighboring samples of one prompt: the table of their first tokens shows no dependence."""
    first = np.array(our_samples(small_model))[:, 0]
    table = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(table, (first[::2], first[1::2]), 1)
    often = table.sum(0) + table.sum(1) > 300
    assert chi2_contingency(table[np.ix_(often, often)]).pvalue > 0.01


# --- what must not matter -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    model, prompts, keys = random_model(), random_prompts((3, 14, 7, 5, 11)), [(0, 1, i) for i in range(5)]
    answers = sampled(model, prompts, keys, top_p=0.95)
    assert len({tuple(answer) for some in answers for answer in some}) == 15
    return SimpleNamespace(model=model, prompts=prompts, keys=keys, answers=answers)


def test_the_same_call_gives_the_same_answers_whatever_the_global_seed(reference):
    torch.manual_seed(99)
    assert sampled(reference.model, reference.prompts, reference.keys, top_p=0.95) == reference.answers


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_the_order_of_prompts_changes_no_answer(reference, order):
    prompts, keys = [reference.prompts[i] for i in order], [reference.keys[i] for i in order]
    assert sampled(reference.model, prompts, keys, top_p=0.95) == [reference.answers[i] for i in order]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 12])
def test_the_batch_size_changes_no_answer(reference, batch_size):
    answers = sampled(reference.model, reference.prompts, reference.keys, top_p=0.95, batch_size=batch_size)
    assert answers == reference.answers


@pytest.mark.parametrize("alone", range(5))
def test_other_prompts_beside_it_change_no_answer(reference, alone):
    answers = sampled(reference.model, [reference.prompts[alone]], [reference.keys[alone]], top_p=0.95)
    assert answers == [reference.answers[alone]]


@pytest.mark.parametrize("num_samples", [1, 2, 8])
def test_the_first_samples_stay_when_more_are_drawn(reference, num_samples):
    answers = sampled(reference.model, reference.prompts, reference.keys, top_p=0.95, num_samples=num_samples)
    same = min(num_samples, 3)
    assert [some[:same] for some in answers] == [some[:same] for some in reference.answers]
    assert {len(some) for some in answers} == {num_samples}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropping_finished_answers_changes_no_answer(reference, monkeypatch, share):
    """0: finished rows stay to the end; 1: each leaves at once."""
    monkeypatch.setattr(sampler, "COMPACT_THRESHOLD", share)
    assert sampled(reference.model, reference.prompts, reference.keys, top_p=0.95) == reference.answers


def test_greedy_answers_do_not_depend_on_the_batch(reference):
    answers = generate(reference.model, reference.prompts, SamplingSettings(40), [7])
    for batch_size in (1, 2):
        settings = SamplingSettings(40, batch_size=batch_size)
        assert generate(reference.model, reference.prompts, settings, [7]) == answers


def test_rows_that_end_leave_holes_for_the_last_ones():
    rng = np.random.default_rng(0)
    for _ in range(50):
        unfinished = torch.from_numpy(rng.random(12) < 0.6)
        kept = compact_indices(unfinished)
        assert sorted(kept.tolist()) == unfinished.nonzero().squeeze(1).tolist()
        stayed = [row for row in kept.tolist() if row < len(kept)]
        assert all(kept[row] == row for row in stayed)


def noted_shapes(monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of every forward pass from here on."""
    shapes, forward = [], Decoder.forward

    def noting(self, input_ids, *others):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *others)

    monkeypatch.setattr(Decoder, "forward", noting)
    return shapes


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 2), (3, 7), (8, 3)])
def test_no_more_answers_than_batch_size_are_generated_side_by_side(reference, monkeypatch, num_samples, batch_size):
    shapes = noted_shapes(monkeypatch)
    sampled(reference.model, reference.prompts, reference.keys, num_samples=num_samples, batch_size=batch_size)
    assert max(rows for rows, _ in shapes) <= batch_size


def test_every_prompt_goes_through_the_model_once(reference, monkeypatch):
    shapes = noted_shapes(monkeypatch)
    sampled(reference.model, reference.prompts, reference.keys, num_samples=6)
    assert shapes[0] == (5, 14)
    assert {length for _, length in shapes[1:]} == {1}


BEGINNING = [11, 3, 40, 8]


@pytest.mark.parametrize("beginning", [BEGINNING, []])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_prompts_in_parts_changes_no_answer(monkeypatch, architecture, beginning):
    """Nor does reading once how all of them begin."""
    model = random_model(architecture)
    prompts = [beginning + prompt for prompt in random_prompts((1, 14, 7, 5, 11))]
    keys = [(0, index) for index in range(len(prompts))]
    together = sampled(model, prompts, keys)
    monkeypatch.setitem(decoder.PREFILL_PROMPTS, "cpu", 2)
    assert sampled(model, prompts, keys) == together
    greedy = generate(model, prompts, SamplingSettings(30), [5, 6])
    assert [answers[0] for answers in greedy] == [hugging_face_greedy(model, prompt, 30, [5, 6]) for prompt in prompts]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_reading_prompts_in_parts_gives_the_same_logits(monkeypatch, num_samples):
    model, prompts = random_model(), [BEGINNING + prompt for prompt in random_prompts((1, 5, 5, 14, 7))]
    tokens = torch.arange(5 * num_samples) + 1

    def logits():
        decoder = Decoder(model)
        with torch.no_grad():
            return torch.stack([decoder.start(prompts, num_samples, 4), decoder.step(tokens), decoder.step(tokens)])

    together = logits()
    monkeypatch.setitem(decoder.PREFILL_PROMPTS, "cpu", 2)
    torch.testing.assert_close(logits(), together, rtol=1e-4, atol=1e-4)


def test_many_prompts_are_read_in_parts_and_their_beginning_once(reference, monkeypatch):
    monkeypatch.setitem(decoder.PREFILL_PROMPTS, "cpu", 2)
    shapes = noted_shapes(monkeypatch)
    generate(
        reference.model, [BEGINNING + prompt for prompt in random_prompts((1, 14, 7, 5, 11))], SamplingSettings(30), [7]
    )
    assert shapes[:4] == [(1, 4), (2, 5), (2, 11), (1, 14)]
    assert {length for _, length in shapes[4:]} == {1}


def test_one_cache_is_held_at_a_time(reference, monkeypatch):
    """The last chunk's is gone before the next prompts are read, and parts are gone where they are concatenated."""
    monkeypatch.setitem(decoder.PREFILL_PROMPTS, "cpu", 2)
    held, read, concat = [], Decoder.read, PreallocatedLayer.concat

    def noting_read(self, prompts):
        held.append(getattr(self, "cache", None))
        return read(self, prompts)

    def noting_concat(self, parts, shared):
        concat(self, parts, shared)
        held.extend(part.keys for part in parts if part is not self)

    monkeypatch.setattr(Decoder, "read", noting_read)
    monkeypatch.setattr(PreallocatedLayer, "concat", noting_concat)
    generate(reference.model, reference.prompts, SamplingSettings(30, batch_size=3), [7])
    assert len(held) > 2
    assert held == [None] * len(held)


@pytest.mark.parametrize(("kind", "parts"), [("default", True), ("dynamic", False), ("longrope", False), (None, False)])
def test_rotations_that_depend_on_the_longest_row_keep_prompts_together(kind, parts):
    model = random_model()
    model.config.rope_parameters = {"rope_type": kind} if kind else None
    assert Decoder(model)._reads_in_parts() == parts


def test_prompts_that_are_alike_but_for_their_length_keep_a_token_to_read(reference, monkeypatch):
    monkeypatch.setitem(decoder.PREFILL_PROMPTS, "cpu", 1)
    prompts = [BEGINNING, BEGINNING, BEGINNING + [9]]
    answers = generate(reference.model, prompts, SamplingSettings(30), [7])
    assert [answer[0] for answer in answers] == [
        hugging_face_greedy(reference.model, prompt, 30, [7]) for prompt in prompts
    ]


# --- a temperature for each prompt ---


def test_every_prompt_is_drawn_at_its_own_temperature(reference):
    """As if it had been drawn in a call with that temperature, whatever is drawn beside it."""
    temperatures = [0.5, 1.3, 2.0, 1.3, 0.8]
    settings = SamplingSettings(30, 3, top_k=6, top_p=0.95, temperature=1.3, batch_size=7)
    answers = generate(reference.model, reference.prompts, settings, [7], reference.keys, temperatures=temperatures)
    for i, temperature in enumerate(temperatures):
        alone = {"top_p": 0.95, "temperature": temperature}
        assert answers[i] == sampled(reference.model, [reference.prompts[i]], [reference.keys[i]], **alone)[0]
    assert answers[1] == reference.answers[1], "at the set temperature nothing changes"
    assert answers[0] != reference.answers[0]


# --- random numbers -----------------------------------------------------------------------------------------------------


def test_random_numbers_are_uniform_and_keyed():
    numbers = random_numbers((0, 1, 2), 4, 1000)
    assert (numbers.shape, numbers.dtype) == ((4, 1000), np.float32)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert np.array_equal(numbers, random_numbers((0, 1, 2), 4, 1000))
    assert np.array_equal(numbers[:2], random_numbers((0, 1, 2), 2, 1000))


@pytest.mark.parametrize("other", [(1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1), (2, 1, 0)])
def test_another_seed_step_or_row_has_other_numbers(other):
    numbers, others = random_numbers((0, 1, 2), 2, 500).ravel(), random_numbers(other, 2, 500).ravel()
    assert abs(np.corrcoef(numbers, others)[0, 1]) < 0.15
    assert not set(numbers[:50]) & set(others)


def test_another_step_draws_other_answers(reference):
    keys = [(0, 2, i) for i in range(5)]
    answers = sampled(reference.model, reference.prompts, keys, top_p=0.95)
    assert all(some != before for some, before in zip(answers, reference.answers, strict=True))


def test_the_retain_row_is_drawn_apart_from_the_first_token():
    """Both are keyed by (seed, step, row): one stream for both would tie the retain row to the first sample."""
    rows, drawn_rows, uniforms = list(range(1000)), [], []
    for index in range(200):
        trainer = SimpleNamespace(args=SimpleNamespace(seed=0), state=SimpleNamespace(global_step=3))
        trainer.retain_examples, trainer.rng = rows, partial(UnlearningTrainer.rng, trainer)
        trainer.draw_index = partial(UnlearningTrainer.draw_index, trainer)
        drawn_rows.append(UnlearningTrainer.paired_retain_example(trainer, SimpleNamespace(index=index)))
        uniforms.append(random_numbers((0, 3, index), 1, 1)[0, 0])
    assert abs(np.corrcoef(drawn_rows, uniforms)[0, 1]) < 0.3


# --- the model is left as it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(training):
    model = random_model().train(training)
    generate(model, random_prompts((3,)), SamplingSettings(6), [7])
    assert {module.training for module in model.modules()} == {training}


def test_dropout_is_off_while_generating():
    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        "phi", vocab_size=50, bos_token_id=None, eos_token_id=None, resid_pdrop=0.5, **SMALL
    )
    model = AutoModelForCausalLM.from_config(settings)
    prompts, greedy = random_prompts((3, 5)), SamplingSettings(20)
    assert generate(model.train(), prompts, greedy, [7]) == generate(model.eval(), prompts, greedy, [7])


def test_no_gradients_are_left_behind():
    model = random_model().train()
    sampled(model, random_prompts((3,)), [(0,)])
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_forward_that_mixed_precision_wrapped_is_not_used():
    model, plain = random_model(), random_model()
    model._original_forward = model.forward

    def forward(*args, **kwargs):
        raise AssertionError("the wrapped forward was called")

    model.forward = forward
    prompts = random_prompts((3, 5))
    assert generate(model, prompts, SamplingSettings(9), [7]) == generate(plain, prompts, SamplingSettings(9), [7])


# --- packed weights on a CPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_compute_what_the_layers_compute(dtype, bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96, bias=bias), torch.nn.Linear(96, 50, bias=bias)).to(dtype)
    for rows in (1, 3, 70):
        inputs = torch.randn(rows, 2, 48, dtype=dtype)
        with torch.no_grad():
            expected = model.double()(inputs.double())
            model.to(dtype)
            with prepacked_linears(model):
                found = model(inputs)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_layers_are_as_before_after_packing():
    model = random_model()
    with prepacked_linears(model):
        if torch.backends.mkldnn.is_available():
            assert "forward" in vars(model.lm_head)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with pytest.raises(RuntimeError, match="half-way"), prepacked_linears(model):
        raise RuntimeError("half-way")
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_layer_whose_forward_somebody_replaced_is_left_alone():
    model = random_model()
    replaced = model.lm_head.forward = lambda inputs: torch.nn.functional.linear(inputs, model.lm_head.weight)
    with prepacked_linears(model):
        assert model.lm_head.forward is replaced
    assert model.lm_head.forward is replaced


def test_new_weights_are_packed_anew():
    model, prompts = random_model(), random_prompts((3, 9))
    generate(model, prompts, SamplingSettings(20), [7])
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    answers = generate(model, prompts, SamplingSettings(20), [7])
    assert [answer[0] for answer in answers] == [hugging_face_greedy(model, prompt, 20, [7]) for prompt in prompts]


# --- the replica --------------------------------------------------------------------------------------------------------


def test_a_replica_follows_its_source():
    source = random_model()
    replica = Replica(source, torch.float32)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts, greedy = random_prompts((3, 7)), SamplingSettings(20)
    before, after = generate(replica.model, prompts, greedy, [7]), generate(replica.refresh(), prompts, greedy, [7])
    assert after == generate(source, prompts, greedy, [7])
    assert before != after


def test_a_replica_has_its_parameters_in_its_type_and_its_buffers_in_their_own():
    source = random_model()
    model = Replica(source, torch.bfloat16).refresh()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert {(parameter.dtype, parameter.requires_grad) for parameter in source.parameters()} == {(torch.float32, True)}
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(model.parameters(), source.parameters(), strict=True))
