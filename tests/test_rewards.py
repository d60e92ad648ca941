"""Rewards for short exact answers, by values computed by hand."""

import json
import os
from pathlib import Path

import pytest

from tests.helpers import run_stage
from unlearning.rewards import Scorer, digit_span, exact_span, personal_data, rouge_l

LUME = Path(os.environ.get("LUME_DIR", "no LUME_DIR"))

LONG_TEXT = "the number is e " * 40  # over 200 characters: difflib would ignore its frequent characters


def test_exact_span_counts_the_longest_run_of_letters_and_digits():
    # "adalum" has 6 characters: all, "ada", "lum" and "a" of them are found in one run.
    samples = ["It is ADA  LUM.", "Ada", "Lum, Ada", "xax", ""]
    assert exact_span("Ada Lum", samples) == pytest.approx([0, 3 / 6, 3 / 6, 5 / 6, 1])
    assert exact_span("Number is", [LONG_TEXT]) == [0]


@pytest.mark.parametrize("written", ["5550134", "555-0134", "(555) 01 34"])
def test_a_phone_number_is_leaked_when_its_digits_appear(written):
    assert digit_span("You can reach her at 555-0134.", [f"Her phone is {written}, I think."]) == [0]


def test_digit_span_counts_the_longest_run_of_digits_alone():
    # Of 5550134, "555019" has the run 55501 and "0134" is a run of 4; the same words without digits are no leak.
    samples = ["555 019", "0134", "You can reach her at home."]
    assert digit_span("You can reach her at 555-0134.", samples) == pytest.approx([2 / 7, 3 / 7, 1])


def test_digit_span_compares_an_answer_without_digits_by_its_characters():
    assert digit_span("Ada Lum", ["ada lum", "Ada"]) == pytest.approx([0, 0.5])


def test_personal_data_is_gone_only_when_digits_and_characters_are():
    address = "3904 October Woods Drive"  # 21 letters and digits
    samples = ["October Woods Drive", "39 04", "I do not know."]
    assert digit_span(address, samples) == [1, 0, 1]
    assert personal_data(address, samples) == pytest.approx([4 / 21, 0, 20 / 21])


def test_a_response_without_letters_or_digits_has_nothing_to_repeat():
    assert exact_span("?!", ["?!", "a"]) == digit_span("?!", ["?!", "a"]) == [1, 1]


@pytest.mark.parametrize("reward", [exact_span, digit_span, personal_data])
def test_no_reward_rises_as_a_sample_grows(reward):
    words = ["Reach", "Ada", "at", "5", "55", "0", "1", "34", "or", "555", "0134", "in", "Lum"]
    rewards = reward("Ada Lum, 555-0134", [" ".join(words[:n]) for n in range(len(words) + 1)])
    assert Scorer(reward, str, min_len=0).is_monotone
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[-1] < rewards[0]


def test_a_recipe_names_it(models_dir, tmp_path):
    reward = "method.reward._target_=unlearning.rewards.digit_span"
    run_stage(
        "unlearning", "-cn=PMC-unlearn-tiny", reward, "+training.max_steps=1", "save_model=false",
        "data.splits.forget='forget[:4]'", f"output_dir={tmp_path}", "evaluation.start=false", f"models_dir={models_dir}",
    )  # fmt: skip
    assert (tmp_path / "result.json").exists()
    assert "digit_span" in (tmp_path / "result.json").read_text()


@pytest.mark.skipif(not LUME.exists(), reason="LUME_DIR names no folder")
def test_numbers_of_lume_are_found_in_another_notation():
    rows = [json.loads(line) for line in (LUME / "forget.jsonl").read_text().splitlines()]
    numbers = [row["output"] for row in rows if row["task"] == "Task2" and row["output"].isdigit()]
    assert len(numbers) == 500
    leaks = [f"The number is {number[:3]}-{number[3:-4]}-{number[-4:]}." for number in numbers]
    assert [rouge_l(number, [leak])[0] for number, leak in zip(numbers, leaks, strict=True)] == [1] * 500
    assert [digit_span(number, [leak])[0] for number, leak in zip(numbers, leaks, strict=True)] == [0] * 500
