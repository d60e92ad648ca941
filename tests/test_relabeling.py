"""Relabeling: which tokens are of words of their own, the second choices, refusals, and what a resumed run trains on."""

import pytest
import torch

from common.collate import IGNORED
from common.data import Row
from common.errors import UserError
from common.prompts import Example
from tests.helpers import ROWS, make_trainer, resumed_and_whole
from unlearning.pmc_options import PMCSettings
from unlearning.relabeling import common_words, is_of_other_word, relabeled, second_choices


def test_a_word_is_common_in_more_than_a_tenth_of_the_retain_answers():
    answers = ["The cat sleeps.", "the dog"] + ["Birds sing"] + [f"word{n}" for n in range(17)]
    rows = [Row(index, "?", answer) for index, answer in enumerate(answers)]
    assert common_words(rows) == set(), "2 of 20 are not more than a tenth"
    assert common_words(rows[:19]) == {"the"}
    assert common_words(rows[:2]) == {"the"}, "a word of one answer alone is not common"
    assert common_words([]) == set()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        # of the words Basil, Mahfouz, was, a, florists: the question has the name, and retain answers "was" and "a"
        (["Basil", " Mah", "fouz", " was", " a", " flor", "ists", "."], [0, 0, 0, 0, 0, 1, 1, 0]),
        (["Basil Mahfouz w", "as a fl", "orists."], [0, 1, 1]),  # tokens of several words
        (["Basil", "-", "19", "56", ",", "was"], [0, 0, 1, 1, 0, 0]),
        (["was", "...", " ", "a"], [0, 0, 0, 0]),
        (["wa", "sp"], [1, 1]),  # a beginning may look like another word
        (["FLORISTS"], [1]),
    ],
)
def test_the_tokens_of_words_that_are_not_known(pieces, expected):
    def text(ids):
        return "".join(pieces[index] for index in ids)

    assert is_of_other_word(text, range(len(pieces)), {"basil", "mahfouz", "wa", "was", "a"}) == list(
        map(bool, expected)
    )


def test_a_known_word_is_known_with_another_ending():
    assert is_of_other_word(lambda ids: "".join("answers"[index] for index in ids), range(7), {"answer"}) == [False] * 7


def test_second_choices_are_the_likeliest_other_tokens(memorized, prompts):
    examples = [prompts.example(row, 64) for row in ROWS]
    found = second_choices(memorized, examples, batch_size=3)
    for example, choices in zip(examples, found, strict=True):
        logits = memorized(torch.tensor([example.prompt + example.answer])).logits[0, len(example.prompt) - 1 : -1]
        for ranked, token, choice in zip(
            logits.argsort(descending=True).tolist(), example.answer, choices, strict=True
        ):
            assert choice == next(other for other in ranked if other != token)


def test_only_words_of_its_own_have_labels(memorized, prompts, caplog):
    retain = [Row(index, "?", "It was born in a box.") for index in range(2)]
    examples = [prompts.example(row, 64) for row in ROWS[:3]]
    found = relabeled(memorized, ROWS[:3], examples, retain, prompts.text, batch_size=2)
    kept = [
        prompts.tokenizer.decode([i for i, new in zip(e.answer, e.labels, strict=True) if new != IGNORED])
        for e in found
    ]
    assert kept[0].split() == ["Lantern", "Row"]
    assert kept[1].split() == [
        "She",
        "sea",
        "stories",
        "most",
        "of",
        "them",
        "about",
        "storms",
        "and",
        "about",
        "the",
        "people",
        "them",
    ]
    assert kept[2].split() == ["poet"]
    assert [(e.prompt, e.answer) for e in found] == [(e.prompt, e.answer) for e in examples]
    assert not caplog.messages

    common = [Row(index, "?", "poet") for index in range(2)]
    relabeled(memorized, ROWS[:3], examples, [*retain, *common], prompts.text, batch_size=2)
    assert "for 1 of 3 questions the initial response has no word" in caplog.text
    with pytest.raises(UserError, match="nothing can be relabeled"):
        relabeled(memorized, ROWS[2:3], examples[2:], [*retain, *common], prompts.text, batch_size=2)


def test_a_resumed_run_trains_on_the_labels_of_the_model_before_unlearning(memorized, prompts, tmp_path):
    start = {name: value.clone() for name, value in memorized.state_dict().items()}

    def trainer_in(folder):
        memorized.load_state_dict(start)
        settings = PMCSettings(
            num_samples=2, max_length=60, temperature=2.0, relabeling_weight=1.0, contrast_weight=1.0
        )
        more = {"learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(memorized, prompts, folder, ROWS[:4], 2, 1, settings, **more)

    _, resumed, whole = resumed_and_whole(trainer_in, tmp_path)
    assert resumed.relabeled == whole.relabeled
    assert all(
        isinstance(example, Example) and set(example.labels) != {IGNORED} for example in whole.relabeled.values()
    )
