"""Relabeling: which tokens are of words of their own, the second choices, refusals, and what a resumed run trains on."""

from dataclasses import replace

import pytest
import torch

from common.collate import IGNORED
from common.data import Row
from common.errors import UserError
from common.prompts import Example
from common.rouge import use_words
from tests.helpers import ROWS, arguments, gradients_of_one_step, make_trainer, resumed_and_whole
from unlearning import relabeling
from unlearning.pmc import PMC
from unlearning.pmc_options import PMCSettings
from unlearning.relabeling import common_words, in_distinctive_words, relabel, second_choice, second_choices
from unlearning.trainer import UnlearningData


def test_a_word_is_common_in_more_than_a_tenth_of_the_retain_answers():
    answers = ["The cat sleeps.", "the dog"] + ["Birds sing"] + [f"word{n}" for n in range(17)]
    rows = [Row(index, "?", answer) for index, answer in enumerate(answers)]
    assert common_words(rows) == set(), "2 of 20 are not more than a tenth"
    assert common_words(rows[:19]) == {"the"}
    assert common_words(rows[:2]) == {"the"}, "a word of one answer alone is not common"
    assert common_words([]) == set()


def text_of_labels(prompts, example: Example) -> str:
    """The tokens of the answer that have a label."""
    return prompts.tokenizer.decode(
        [i for i, new in zip(example.answer, example.labels, strict=True) if new != IGNORED]
    )


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

    assert in_distinctive_words(text, range(len(pieces)), {"basil", "mahfouz", "wa", "was", "a"}) == list(
        map(bool, expected)
    )


def test_the_first_bytes_of_a_character_belong_to_its_word():
    """As byte-level tokenizers split letters of other scripts and letters with accents."""
    answer = "Zoë, 台北".encode()

    def text(ids):
        return bytes(ids).decode(errors="replace")

    with use_words("unicode"):
        flags = in_distinctive_words(text, answer, {"zoë"})
    assert flags == [False] * len("Zoë, ".encode()) + [True] * len("台北".encode())


def test_a_known_word_is_known_with_another_ending():
    assert (
        in_distinctive_words(lambda ids: "".join("answers"[index] for index in ids), range(7), {"answer"})
        == [False] * 7
    )


def everything(examples):
    return [[True] * len(example.answer) for example in examples]


def test_second_choices_are_the_likeliest_tokens_that_spell_another_word(memorized, prompts):
    examples = [prompts.example(row, 64) for row in ROWS]
    wanted = [[position % 3 != 1 for position in range(len(example.answer))] for example in examples]
    found = second_choices(memorized, examples, wanted, prompts.text, batch_size=3)
    for example, flags, choices in zip(examples, wanted, found, strict=True):
        logits = memorized(torch.tensor([example.prompt + example.answer])).logits[0, len(example.prompt) - 1 : -1]
        ranked = logits.argsort(descending=True).tolist()
        for position, choice in enumerate(choices):
            expected = second_choice(prompts.text, example.answer, position, ranked[position])
            assert choice == (expected if flags[position] else IGNORED)
            assert choice not in (example.answer[position], prompts.eos_token_id)


ANSWER = ["Born", " in", " Ku", "wait", " City", "<eos>"]
PIECES = [*ANSWER, " ku", "Kuwait", " Kuwaiti", " K", " ", " Kabul", "waiting", "ait", " citizens"]


@pytest.mark.parametrize(
    ("position", "same"),
    [
        (2, [" Ku", " ku", "Kuwait", " Kuwaiti", " K", " ", "<eos>"]),
        (3, ["wait", "waiting", " ", "<eos>"]),
        (4, [" City", " ", "<eos>"]),
    ],
)
def test_other_spellings_and_longer_forms_are_the_same_word(position, same):
    def text(ids):
        return "".join(PIECES[index] for index in ids).replace("<eos>", "").strip()

    tokens = range(len(PIECES))
    found = [PIECES[i] for i in tokens if second_choice(text, range(len(ANSWER)), position, [i]) == IGNORED]
    assert found == sorted(same, key=PIECES.index)


@pytest.mark.parametrize(
    ("word", "token", "is_same"),
    [
        ("Müller", "Muller", True),
        ("Müller", "mu\u0308l", True),
        ("1956", "\uff11", True),  # full width
        ("Kuwait", '"Ku', True),
        ("Kuwait", "(", False),
        ("Müller", "Miller", False),
        ("(Kuwait)", "Kuwait", True),
        ("...", "...", True),
        ("...", "Kuwait", False),
    ],
)
def test_accents_width_and_punctuation_do_not_make_another_word(word, token, is_same):
    with use_words("unicode"):
        found = second_choice(lambda ids: "".join([word, token][index] for index in ids), [0], 0, [1])
    assert (found == IGNORED) == is_same


def test_the_first_bytes_of_a_character_spell_no_other_word():
    def text(ids):
        return bytes(ids).decode(errors="replace")

    answer = list("台北".encode())
    assert all(second_choice(text, answer, position, [ord("A")]) == IGNORED for position in (1, 2, 4, 5)), (
        "cannot follow"
    )
    firsts = ["北".encode()[0], "京".encode()[0]]
    assert second_choice(text, answer, 3, [*firsts, ord("A")]) == ord("A")
    last = "匘".encode()[-1]
    assert second_choice(text, answer, 5, [last]) == last, "it completes another character"


def test_a_token_whose_likeliest_others_spell_the_same_word_has_no_label(memorized, prompts, monkeypatch):
    monkeypatch.setattr(relabeling, "NUM_CANDIDATES", 1)
    example = prompts.example(ROWS[0], 64)  # known by heart: the likeliest tokens are the answer's own
    (labels,) = second_choices(memorized, [example], everything([example]), prompts.text, batch_size=1)
    assert set(labels) == {IGNORED}
    with pytest.raises(UserError, match="or has no second choice, so there is nothing to relabel"):
        relabel(memorized, ROWS[:1], [example], [], prompts.text, batch_size=1)


def test_only_words_of_its_own_have_labels(memorized, prompts, caplog):
    retain = [Row(index, "?", "It was born in a box.") for index in range(2)]
    examples = [prompts.example(row, 64) for row in ROWS[:3]]
    found = relabel(memorized, ROWS[:3], examples, retain, prompts.text, batch_size=2)
    kept = [text_of_labels(prompts, example) for example in found]
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
    relabel(memorized, ROWS[:3], examples, [*retain, *common], prompts.text, batch_size=2)
    assert "for 1 of 3 questions every word of the initial response" in caplog.text
    with pytest.raises(UserError, match="nothing to relabel"):
        relabel(memorized, ROWS[2:3], examples[2:], [*retain, *common], prompts.text, batch_size=2)


def test_the_trainer_tells_common_words_by_its_retain_rows(memorized, prompts, tmp_path):
    retain = [Row(index, "?", "She was born and won in the small town.") for index in range(2)]
    settings = PMCSettings(num_samples=2, max_length=60, relabeling_weight=1.0)
    trainer = PMC(memorized, arguments(tmp_path, 4, 1), UnlearningData(ROWS, retain, prompts, max_length=64), settings)
    trainer.before_training()
    text = {index: text_of_labels(prompts, example) for index, example in trainer.relabeled.items()}
    assert text[0].split() == ["Lantern", "Row"]
    assert text[3].split() == ["Copper", "Quill", "1987", "for", "his", "second", "book"]


def test_a_step_without_labels_trains_on_the_selected_samples_alone(memorized, prompts, tmp_path):
    settings = PMCSettings(num_samples=2, max_length=60, lambda_unlearning=0.0, relabeling_weight=1.0)
    trainer = make_trainer(memorized, prompts, tmp_path, ROWS[:2], 2, 1, settings)
    trainer.relabeled = {
        index: replace(example, labels=[IGNORED] * len(example.answer)) for index, example in trainer.relabeled.items()
    }
    assert all(gradient.isfinite().all() for gradient in gradients_of_one_step(trainer).values())
    (record,) = trainer.history
    assert record["relabeling_loss"] == 0.0 < record["collapse_loss"]


def test_dropout_does_not_change_second_choices(memorized, prompts):
    examples = [prompts.example(row, 64) for row in ROWS]
    expected = second_choices(memorized, examples, everything(examples), prompts.text, batch_size=3)
    memorized.config.attention_dropout = 0.5
    for layer in memorized.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert second_choices(memorized.train(), examples, everything(examples), prompts.text, batch_size=3) == expected
    assert memorized.training


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
