"""The shared passes: what is read off known logits, once, whatever the batch."""

import math

import numpy as np
import pytest
import torch

from common.config import EvaluationConfig
from common.prompts import Example
from common.sampling import SamplingSettings
from evaluation import passes
from evaluation.passes import Subject, batches_by_length
from tests.conftest import ROWS
from tests.stubs import bigram_subject, random_table

PAIRS = [(row.question, row.answer) for row in ROWS]


def test_tokens_of_known_probabilities():
    table = random_table()
    subject, _ = bigram_subject(table)
    (found,) = subject.tokens_of_answers([("a", "bc")])  # 1 -> 2, 2 -> 3, 3 -> end
    log = np.log(table)
    steps = [(1, 2), (2, 3), (3, 0)]
    assert found.log_probs == pytest.approx([log[step] for step in steps], abs=1e-6)
    assert found.is_likeliest.tolist() == [table[row].argmax() == column for row, column in steps]
    expected = [(table[row] * log[row]).sum() for row, _ in steps]
    assert found.expected == pytest.approx(expected, abs=1e-6)
    deviations = [
        math.sqrt((table[row] * (log[row] - mean) ** 2).sum()) for (row, _), mean in zip(steps, expected, strict=True)
    ]
    assert found.deviation == pytest.approx(deviations, abs=1e-6)
    assert found.ends
    assert found.mean_log_prob == pytest.approx(np.mean([log[step] for step in steps]), abs=1e-6)
    words = found.words()
    assert words.log_probs.tolist() == found.log_probs[:2].tolist() and words.deviation[1] == found.deviation[1]
    assert not words.ends and words.words() is words


def test_log_probabilities_are_float32_whatever_the_model_s_type():
    table = random_table()
    found = [bigram_subject(table, dtype=dtype)[0].tokens_of_answers([("a", "bcd")])[0] for dtype in _DTYPES]
    assert all(tokens.log_probs.dtype == np.float32 for tokens in found)
    # The bfloat16 model's logits, read exactly: normalising them in bfloat16 would be off by a hundredth.
    logits = torch.tensor(table).log().bfloat16().double().log_softmax(-1).numpy()
    assert found[1].log_probs == pytest.approx([logits[1, 2], logits[2, 3], logits[3, 4], logits[4, 0]], abs=1e-6)


_DTYPES = (torch.float32, torch.bfloat16)


def test_a_token_that_cannot_come_leaves_no_nan():
    table = np.full((8, 8), 1 / 7)
    table[:, 3] = 0
    (found,) = bigram_subject(table)[0].tokens_of_answers([("a", "bc")])
    assert found.log_probs[1] < -1000
    assert np.isfinite(found.expected).all() and found.deviation == pytest.approx([0, 0, 0], abs=1e-3)


def test_an_answer_without_room_has_no_token():
    subject, _ = bigram_subject(random_table(), max_length=3)
    empty, cut, whole = subject.tokens_of_answers([("abc", "d"), ("ab", "cd"), ("a", "b")])
    assert len(empty.log_probs) == 0 and empty.mean_log_prob is None and empty.words() is empty
    assert len(cut.log_probs) == 1 and not cut.ends
    assert len(whole.log_probs) == 2 and whole.ends
    assert subject.tokens([Example([1, 2, 3], [])])[0].mean_log_prob is None, "a batch of such rows alone"


def test_every_answer_goes_through_the_model_once():
    subject, model = bigram_subject(random_table())
    first = subject.tokens_of_answers([("a", "b"), ("a", "c"), ("a", "b")])
    assert model.passes == 2 and first[0] is first[2]
    second = subject.tokens_of_answers([("a", "c"), ("b", "c")])
    assert model.passes == 3 and second[0] is first[1]


def subject_of(model, prompts, **evaluation):
    return Subject(lambda: model, prompts, EvaluationConfig(**{"max_length": 60, **evaluation}), 256)


def test_neither_batch_size_nor_order_changes_a_token_s_probability(model, prompts, monkeypatch):
    alone = subject_of(model, prompts, batch_size=1).tokens_of_answers(PAIRS)
    for size in (None, 3):
        together = subject_of(model, prompts, batch_size=size).tokens_of_answers(PAIRS[::-1])[::-1]
        for one, other in zip(alone, together, strict=True):
            assert other.log_probs == pytest.approx(one.log_probs, abs=1e-5)
            assert other.deviation == pytest.approx(one.deviation, abs=1e-5)
    monkeypatch.setattr(passes, "TOKENS_A_PASS", 64)
    narrow = subject_of(model, prompts).tokens_of_answers(PAIRS)
    assert narrow[3].log_probs == pytest.approx(alone[3].log_probs, abs=1e-5)


def test_token_probabilities_are_those_of_a_plain_forward_pass(model, prompts):
    subject = subject_of(model, prompts)
    for pair, found in zip(PAIRS, subject.tokens_of_answers(PAIRS), strict=True):
        prompt, answer = prompts.prompt(pair[0]), prompts.answer(pair[1])
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        plain = [log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
        assert found.log_probs == pytest.approx(plain, abs=1e-5)


def test_the_parts_of_a_pass_change_nothing(model, prompts, monkeypatch):
    whole = subject_of(model, prompts).tokens_of_answers(PAIRS)
    monkeypatch.setattr(passes, "TOKENS_A_PART", 5)
    for one, other in zip(whole, subject_of(model, prompts).tokens_of_answers(PAIRS), strict=True):
        assert other.log_probs == pytest.approx(one.log_probs, abs=1e-6)
        assert other.is_likeliest.tolist() == one.is_likeliest.tolist()
        assert other.expected == pytest.approx(one.expected, abs=1e-6)


def test_batches_hold_rows_of_like_length():
    assert batches_by_length([4000, 3, 2000, 2000], None) == [[1, 2], [3], [0]]
    assert batches_by_length([5, 1, 3], 2) == [[1, 2], [0]]
    assert batches_by_length([9000], None) == [[0]]
    assert batches_by_length([], None) == []


def test_greedy_answers_are_given_once_and_prefills_are_other_questions(model, prompts, monkeypatch):
    subject = subject_of(model, prompts)
    asked = []
    real = passes.generate
    monkeypatch.setattr(passes, "generate", lambda m, ids, *a, **k: asked.append(ids) or real(m, ids, *a, **k))
    questions = [row.question for row in ROWS[:3]]
    first = subject.answers([*questions, questions[0]])
    assert [len(ids) for ids in asked] == [3] and first[0] == first[3]
    assert subject.answers(questions) == first[:3] and len(asked) == 1
    subject.answers(questions[:1], beginning="The answer is:")
    assert asked[1:] == [[prompts.prompt(questions[0]) + prompts.tokenizer(" The answer is:")["input_ids"]]]


def test_samples_do_not_depend_on_the_batch_size(model, prompts):
    questions = [row.question for row in ROWS]
    found = [
        subject_of(model, prompts).samples(questions, SamplingSettings(60, 3, 1.0, batch_size=size), seed=1)
        for size in (1, 7)
    ]
    assert found[0] == found[1] and all(len(samples) == 3 for samples in found[0])
    other = subject_of(model, prompts).samples(questions, SamplingSettings(60, 3, 1.0), seed=2)
    assert other != found[0]


def test_the_time_of_each_kind_of_pass_is_kept(model, prompts):
    subject = subject_of(model, prompts)
    subject.answers([ROWS[0].question])
    subject.tokens_of_answers(PAIRS[:2])
    assert set(subject.seconds) == {"greedy answers", "token probabilities"}
    assert all(value > 0 for value in subject.seconds.values())


def test_a_bfloat16_copy_answers_and_the_model_stays_as_it_is(model, prompts):
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    questions = [row.question for row in ROWS]
    settings = {"max_length": 60}
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        Subject(lambda: model, prompts, EvaluationConfig(bf16=bf16, **settings), 256).answers(questions)
        assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
