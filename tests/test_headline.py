"""The headline scores against hand-computed values, with all splits and without the optional ones."""

import pytest

from common.config import DataConfig, EvaluationConfig
from common.errors import UserError
from common.files import write_json_lines
from evaluation.metrics.headline import Question, load_questions, score_answers


def question(split, reference, index=0):
    return Question(split, index, "?", reference)


def test_scores_by_hand():
    questions = [
        question("forget", "one two three four"),
        question("forget", "five six", 1),
        question("forget_paraphrased", "one two"),
        question("retain", "red green"),
        question("real_authors", "ann lee"),
        question("world_facts", "rome"),
    ]
    answers = ["one four", "", "zero", "green red", "ann lee", "rome it is"]
    measured = score_answers(questions, answers)
    scores = measured.values
    # recalls: forget 2/4 and 0, paraphrased 0, retain 1/2, real authors 1, world facts 1
    assert [row["rougeL_recall"] for row in measured.generations] == [0.5, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert scores["rougeL_recall/forget"] == 0.25
    assert scores["unlearn_quality"] == pytest.approx(50 * (2 - 0.25 - 0))
    assert scores["utility"] == pytest.approx(100 / 3 * 2.5)
    assert scores["forget_answer_words"] == 1.0
    assert scores["forget_answers_empty"] == 0.5
    assert measured.as_result()["counts"] == {
        "rougeL_recall/forget": 2,
        "rougeL_recall/forget_paraphrased": 1,
        "rougeL_recall/retain": 1,
        "rougeL_recall/real_authors": 1,
        "rougeL_recall/world_facts": 1,
        "forget_answer_words": 2,
        "forget_answers_empty": 2,
    }
    better = measured.as_result()["higher_is_better"]
    assert [name for name, higher in better.items() if higher is False] == [
        "rougeL_recall/forget",
        "rougeL_recall/forget_paraphrased",
        "forget_answers_empty",
    ]
    assert [name for name, higher in better.items() if higher is None] == ["forget_answer_words"]


def test_a_data_set_of_forget_and_retain_alone_is_scored_on_what_it_has(tmp_path):
    write_json_lines(tmp_path / "gone.json", [{"q": "who?", "a": "one two"}])
    write_json_lines(tmp_path / "kept.json", [{"q": "what?", "a": "red"}])
    splits = {"forget": "gone", "retain": "kept", "world_facts": None}
    data = DataConfig(str(tmp_path), splits, {"question": "q", "answer": "a"})
    questions = load_questions(data, EvaluationConfig())
    assert [(q.split, q.reference) for q in questions] == [("forget", "one two"), ("retain", "red")]
    scores = score_answers(questions, ["two", "red"]).values
    assert (scores["unlearn_quality"], scores["utility"]) == (50.0, 100.0)


def test_forget_and_retain_are_needed(tmp_path):
    write_json_lines(tmp_path / "gone.json", [{"q": "who?", "a": "one two"}])
    data = DataConfig(str(tmp_path), {"forget": "gone"}, {"question": "q", "answer": "a"})
    with pytest.raises(UserError, match="data.splits.retain: missing"):
        load_questions(data, EvaluationConfig())
