"""Outputs that metrics share: equal to those of known logits, computed once, the same for every batch size."""

import math

import numpy as np
import pytest
import torch

from common import collate
from common.collate import batches_by_length
from common.config import EvaluationConfig, PromptConfig
from common.errors import UserError
from common.prompts import Example, PromptFormat
from evaluation import model_outputs
from evaluation.model_outputs import ModelOutputs, _of_logits
from generation.token_sampling import SamplingSettings
from tests.helpers import ROWS, bigram_outputs, outputs_of, random_table

PAIRS = [(row.question, row.answer) for row in ROWS]


def test_tokens_of_known_probabilities():
    table = random_table()
    outputs, _ = bigram_outputs(table)
    (found,) = outputs.tokens_of_answers([("a", "bc")])  # 1 -> 2, 2 -> 3, 3 -> end
    log = np.log(table)
    steps = [(1, 2), (2, 3), (3, 0)]
    assert found.log_probs == pytest.approx([log[step] for step in steps], abs=1e-6)
    assert found.is_argmax.tolist() == [table[row].argmax() == column for row, column in steps]
    expected = [(table[row] * log[row]).sum() for row, _ in steps]
    assert found.logp_mean == pytest.approx(expected, abs=1e-6)
    deviations = [
        math.sqrt((table[row] * (log[row] - mean) ** 2).sum()) for (row, _), mean in zip(steps, expected, strict=True)
    ]
    assert found.logp_std == pytest.approx(deviations, abs=1e-6)
    assert found.has_eos
    assert found.mean_log_prob == pytest.approx(np.mean([log[step] for step in steps]), abs=1e-6)
    words = found.without_eos()
    assert words.log_probs.tolist() == found.log_probs[:2].tolist() and words.logp_std[1] == found.logp_std[1]
    assert not words.has_eos and words.without_eos() is words


def test_log_probabilities_are_float32_whatever_the_model_s_type():
    table = random_table()
    found = [bigram_outputs(table, dtype=dtype)[0].tokens_of_answers([("a", "bcd")])[0] for dtype in _DTYPES]
    assert all(tokens.log_probs.dtype == np.float32 for tokens in found)
    # The bfloat16 model's logits, read exactly: normalizing them in bfloat16 would be off by a hundredth.
    logits = torch.tensor(table).log().bfloat16().double().log_softmax(-1).numpy()
    assert found[1].log_probs == pytest.approx([logits[1, 2], logits[2, 3], logits[3, 4], logits[4, 0]], abs=1e-6)


_DTYPES = (torch.float32, torch.bfloat16)


def test_a_token_that_cannot_come_leaves_no_nan():
    table = np.full((8, 8), 1 / 7)
    table[:, 3] = 0
    (found,) = bigram_outputs(table)[0].tokens_of_answers([("a", "bc")])
    assert found.log_probs[1] < -1000
    assert np.isfinite(found.logp_mean).all() and found.logp_std == pytest.approx([0, 0, 0], abs=1e-3)


def test_an_answer_without_room_has_no_token():
    outputs, _ = bigram_outputs(random_table(), max_length=3)
    empty, cut, whole = outputs.tokens_of_answers([("abc", "d"), ("ab", "cd"), ("a", "b")])
    assert len(empty.log_probs) == 0 and empty.mean_log_prob is None and empty.without_eos() is empty
    assert len(cut.log_probs) == 1 and not cut.has_eos
    assert len(whole.log_probs) == 2 and whole.has_eos
    assert outputs.tokens([Example([1, 2, 3], [])])[0].mean_log_prob is None, "a batch of such rows alone"


def test_answers_that_are_cut_are_warned_of_once(model, prompts, caplog):
    outputs = ModelOutputs(lambda: model, prompts, EvaluationConfig(max_length=60), max_length=24)
    pairs = [(row.question, row.answer) for row in ROWS]
    outputs.tokens_of_answers([pairs[2]])
    assert not caplog.messages
    outputs.tokens_of_answers(pairs)
    outputs.tokens_of_answers(pairs[:2])
    outputs.with_weights(model).tokens_of_answers(pairs)
    (message,) = caplog.messages
    assert message.startswith("data.max_length=24: ") and "of 8 rows" in message and "no EOS token" in message


def test_every_answer_goes_through_the_model_once():
    outputs, model = bigram_outputs(random_table())
    first = outputs.tokens_of_answers([("a", "b"), ("a", "c"), ("a", "b")])
    assert model.passes == 2 and first[0] is first[2]
    second = outputs.tokens_of_answers([("a", "c"), ("b", "c")])
    assert model.passes == 3 and second[0] is first[1]


def test_neither_batch_size_nor_order_changes_a_token_s_probability(model, prompts, monkeypatch):
    alone = outputs_of(model, prompts, batch_size=1).tokens_of_answers(PAIRS)
    for size in (None, 3):
        together = outputs_of(model, prompts, batch_size=size).tokens_of_answers(PAIRS[::-1])[::-1]
        for one, other in zip(alone, together, strict=True):
            assert other.log_probs == pytest.approx(one.log_probs, abs=1e-5)
            assert other.logp_std == pytest.approx(one.logp_std, abs=1e-5)
    monkeypatch.setattr(collate, "MAX_BATCH_TOKENS", 64)
    narrow = outputs_of(model, prompts).tokens_of_answers(PAIRS)
    assert narrow[3].log_probs == pytest.approx(alone[3].log_probs, abs=1e-5)


def test_token_probabilities_are_those_of_a_plain_forward_pass(model, prompts):
    outputs = outputs_of(model, prompts)
    for pair, found in zip(PAIRS, outputs.tokens_of_answers(PAIRS), strict=True):
        prompt, answer = prompts.prompt(pair[0]), prompts.answer(pair[1])
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        plain = [log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
        assert found.log_probs == pytest.approx(plain, abs=1e-5)


def test_chunks_of_the_vocabulary_change_nothing(model, prompts, monkeypatch):
    whole = outputs_of(model, prompts).tokens_of_answers(PAIRS)
    monkeypatch.setattr(model_outputs, "VOCABULARY_CHUNK", 5)
    for one, other in zip(whole, outputs_of(model, prompts).tokens_of_answers(PAIRS), strict=True):
        assert other.log_probs == pytest.approx(one.log_probs, abs=1e-6)
        assert other.is_argmax.tolist() == one.is_argmax.tolist()
        assert other.logp_mean == pytest.approx(one.logp_mean, abs=1e-6)


def test_batches_hold_rows_of_like_length():
    assert batches_by_length([4000, 3, 2000, 2000], None) == [[1, 2], [3], [0]]
    assert batches_by_length([5, 1, 3], 2) == [[1, 2], [0]]
    assert batches_by_length([9000], None) == [[0]]
    assert batches_by_length([], None) == []


def test_greedy_answers_are_given_once_and_prefills_are_other_questions(model, prompts, monkeypatch):
    outputs = outputs_of(model, prompts)
    asked = []
    real = model_outputs.generate
    monkeypatch.setattr(model_outputs, "generate", lambda m, ids, *a, **k: asked.append(ids) or real(m, ids, *a, **k))
    questions = [row.question for row in ROWS[:3]]
    first = outputs.answers([*questions, questions[0]])
    assert [len(ids) for ids in asked] == [3] and first[0] == first[3]
    assert outputs.answers(questions) == first[:3] and len(asked) == 1
    outputs.answers(questions[:1], beginning="The answer is:")
    assert asked[1:] == [[prompts.prompt(questions[0]) + prompts.tokenizer(" The answer is:")["input_ids"]]]


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_size(model, prompts):
    questions = [row.question for row in ROWS]
    found = [
        outputs_of(model, prompts).samples(questions, SamplingSettings(60, 3, 1.0, batch_size=size), seed=1)
        for size in (1, 7)
    ]
    assert found[0] == found[1] and all(len(samples) == 3 for samples in found[0])
    other = outputs_of(model, prompts).samples(questions, SamplingSettings(60, 3, 1.0), seed=2)
    assert other != found[0]


def test_the_time_of_each_kind_of_output_is_kept(model, prompts):
    outputs = outputs_of(model, prompts)
    outputs.answers([ROWS[0].question])
    outputs.tokens_of_answers(PAIRS[:2])
    assert set(outputs.seconds) == {"greedy answers", "token probabilities"}
    assert all(value > 0 for value in outputs.seconds.values())


def test_a_bfloat16_copy_answers_and_the_model_stays_as_it_is(model, prompts):
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    questions = [row.question for row in ROWS]
    settings = {"max_length": 60}
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        ModelOutputs(lambda: model, prompts, EvaluationConfig(bf16=bf16, **settings), 256).answers(questions)
        assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_without_finite_logits_has_no_probabilities():
    outputs, model = bigram_outputs(random_table())
    with torch.no_grad():
        model.logits.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        outputs.tokens_of_answers([("a", "b")])


def test_the_tag_of_an_answer_counts_on_request(model, tokenizer):
    prompts = PromptFormat(tokenizer, PromptConfig("plain", answer="Answer: {answer}"))
    outputs, pairs = outputs_of(model, prompts), PAIRS[:3]
    for whole, alone in zip(
        outputs.tokens_of_answers(pairs, with_tag=True), outputs.tokens_of_answers(pairs), strict=True
    ):
        tag = len(whole.log_probs) - len(alone.log_probs)
        assert tag > 0 and whole.log_probs[tag:] == pytest.approx(alone.log_probs, abs=1e-5)


def test_of_tokens_that_are_equally_likely_one_is_the_most_likely():
    logits = torch.tensor([[2.0, 2.0, 1.0]]).repeat(3, 1)
    assert _of_logits(logits, torch.tensor([0, 1, 2]))[1].tolist() == [True, False, False]
