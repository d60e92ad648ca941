"""Early stopping stops samples while they are drawn and changes nothing that is selected."""

import random
from unittest.mock import Mock

import pytest
import torch

from generation.sampler import PartialSample
from tests.helpers import ROWS, make_trainer
from unlearning import pmc
from unlearning.early_stopping import EarlyStopping
from unlearning.pmc_options import PMCSettings
from unlearning.rewards import Scorer, complete_words, rouge_l
from unlearning.selection import Candidate, select

WORDS = ["sea", "sailing", "sail", "storms", "in", "the", "book", "1987", "a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("the sailing", "the"), ("the ", "the"), ("the", ""), ("", ""), ("a\nb\tc", "a\nb"), ("one\u3000two", "one")],
)
def test_the_last_word_is_left_out_of_a_bound(text, expected):
    """It may go on: `sail` is a word of `the sail`, but not of `the sailor`."""
    assert complete_words(text) == expected


def drawn_half_way(early_stopping: EarlyStopping, texts: list[list[str]]) -> list[list[str]]:
    """Show the early_stopping samples of one question as they grow; returns them as far as they were drawn."""
    running, length = set(range(len(texts))), 0
    while running:
        length += early_stopping.every
        ended = [i for i in sorted(running) if len(texts[i]) <= length]
        running -= set(ended)
        going_on = sorted(running)
        stop = early_stopping.check(
            [PartialSample(0, i, texts[i]) for i in ended], [PartialSample(0, i, texts[i][:length]) for i in going_on]
        )
        for i, stops in zip(going_on, stop, strict=True):
            if stops:
                texts[i] = texts[i][:length]
                running.discard(i)
    return texts


@pytest.mark.parametrize("min_len", [0, 12])
def test_the_selected_sample_is_that_of_complete_samples(min_len):
    """1000 random questions against a selection that sees all of every sample; letters stand for tokens."""
    rng, stopped = random.Random(0), 0
    for _ in range(1000):
        reference = " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))
        samples = [list(" ".join(rng.choices(WORDS, k=rng.randint(0, 14)))) for _ in range(rng.randint(1, 6))]
        best = Candidate(rng.choice([0.9, 0.75, 0.5, 0.0]), ["best"]) if rng.random() < 0.5 else None
        scorer = Scorer(rouge_l, "".join, min_len)
        complete = [Candidate(*pair) for pair in zip(scorer.rewards(reference, samples), samples, strict=True)]
        scorer.rewards = Mock(wraps=scorer.rewards)
        early_stopping = EarlyStopping([best.reward if best else -float("inf")], [reference], scorer)
        drawn = drawn_half_way(early_stopping, [list(sample) for sample in samples])
        scored = scorer.rewards.call_count
        assert scored == len(samples) - len(early_stopping.stopped), "every complete sample is scored once"
        partial = [Candidate(*pair) for pair in zip(early_stopping.rewards_of([drawn])[0], drawn, strict=True)]
        assert select(best, partial) == select(best, complete)
        assert all(after.reward >= before.reward for after, before in zip(partial, complete, strict=True))
        stopped += len(early_stopping.stopped)
    assert stopped > 500


def three_epochs(model, prompts, folder):
    """A function that runs them with its options, always from the same weights."""
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run(**options):
        model.load_state_dict(start)
        settings = PMCSettings(**{"num_samples": 6, "max_length": 60, "temperature": 0.7, **options})
        trainer = make_trainer(model, prompts, folder, settings=settings, learning_rate=3e-4, max_steps=3)
        trainer.train()
        return trainer.best, [p.clone() for p in model.parameters()], trainer.history

    return run


@pytest.fixture
def runs(model, prompts, tmp_path):
    return three_epochs(model, prompts, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"fluency_weight": 0.02}, {"contrast_weight": 1.0, "relabeling_weight": 1.0}],
    ids=str,
)
def test_pruning_changes_neither_the_picks_nor_the_trained_weights(memorized, prompts, tmp_path, monkeypatch, options):
    """With penalties, too, where the stored pick alone can be said to win."""
    monkeypatch.setattr(EarlyStopping, "every", 4)
    runs = three_epochs(memorized, prompts, tmp_path)
    (best, weights, history), (plain_best, plain_weights, plain_history) = (
        runs(**options, temperature=2.0, early_stopping=early_stopping) for early_stopping in (True, False)
    )
    assert sum(record.get("stopped_early", 0) for record in history) > 0.2
    assert best == plain_best
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    for record, plain in zip(history, plain_history, strict=True):
        assert record["selected_reward"] == plain["selected_reward"]
        assert ("stopped_early" in record) == ("sample_reward" in plain), "neither once every question is solved"
        if "stopped_early" not in record:
            continue
        assert record["sample_reward_upper_bound"] >= plain["sample_reward"], "an upper bound, and called so"
        assert record["sample_tokens"] <= plain["sample_tokens"]
        assert "sample_reward" not in record
        assert "stopped_early" not in plain


def test_a_reward_that_does_not_promise_never_to_rise_is_not_stopped_early(model, prompts, tmp_path):
    settings = PMCSettings(num_samples=2, max_length=48, reward={"_target_": "tests.helpers.shouting"})
    assert not make_trainer(model, prompts, tmp_path, settings=settings).stops_early


def test_the_text_of_a_beginning_is_the_beginning_of_the_text(prompts):
    """Which the bound rests on, but for the word that a beginning breaks off in."""
    rng = random.Random(0)
    ids = [prompts.tokenizer(row.answer)["input_ids"] for row in ROWS]
    ids += [rng.choices(range(len(prompts.tokenizer)), k=30) for _ in range(50)]
    for answer in ids:
        whole = prompts.text(answer)
        for end in range(len(answer)):
            assert whole.startswith(complete_words(prompts.text(answer[:end])))


@pytest.mark.slow
def test_the_stopping_criteria_get_every_sample_of_a_window_split_into_chunks(runs):
    assert runs(early_stopping=True)[0] == runs(early_stopping=True, sampling_batch_size=4)[0]
    assert pmc.EarlyStopping is EarlyStopping
