"""The headline scores against hand-computed values, with all splits and without the optional ones."""

from dataclasses import replace

import pytest

from common.config import DataConfig, EvaluationConfig
from common.data import Row
from common.errors import UserError
from common.files import ROOT, write_json_lines
from common.rouge import use_words
from evaluation.metrics.headline import Question, check_words, load_questions, score_answers
from tests.helpers import ROWS, write_rows


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


def test_a_reference_without_words_is_refused(tmp_path):
    write_rows(tmp_path, "rows", [*ROWS[:2], Row(2, "Где родилась Ада?", "В Риге.")])
    columns = {"question": "question", "answer": "answer"}
    write_rows(tmp_path, "others", ROWS[2:5])
    data = DataConfig(path=str(tmp_path), splits={"forget": "rows", "retain": "others"}, columns=columns)
    message = r"^data\.splits\.forget, row 2: the answer 'В Риге\.' has no word .*; set data\.words=unicode$"
    with pytest.raises(UserError, match=message):
        load_questions(data, EvaluationConfig())
    assert len(load_questions(replace(data, words="unicode"), EvaluationConfig())) == 6


def test_references_whose_only_latin_words_are_numbers_are_warned_of(caplog):
    check_words([Question("forget", 0, "?", "В Риге, 1987."), Question("forget", 1, "?", "Zoë's café")], "latin")
    assert caplog.messages[0].startswith("1 of 2 answers are mostly of another script")


def test_scores_of_answers_in_another_script_are_not_zero(tmp_path):
    questions = [Question("forget", 0, "?", "Ада родилась в Риге."), Question("retain", 0, "?", "她住在里加")]
    answers = ["Ада родилась в Москве.", "她住在里加"]
    with use_words("unicode"):
        scores = score_answers(questions, answers)
    assert scores.values["unlearn_quality"] == pytest.approx(25)
    assert scores.values["utility"] == 100
    assert scores.values["forget_answer_words"] == 4


def test_retain_rows_that_are_all_to_be_forgotten_are_refused(tmp_path):
    write_rows(tmp_path, "rows", ROWS[:2])
    columns = {"question": "question", "answer": "answer"}
    data = DataConfig(path=str(tmp_path), splits={"forget": "rows", "retain": "rows[:1]"}, columns=columns)
    with pytest.raises(UserError, match=r"^data\.splits\.retain: all 1 rows are also in data\.splits\.forget"):
        load_questions(data, EvaluationConfig())


@pytest.mark.parametrize(
    ("forget", "paraphrased", "shown"),
    [
        ("forget", "forget_perturbed", None),
        ("forget[5:9]", "forget_perturbed[5:9] + forget_perturbed[5:9]", None),
        ("forget[:5]", "forget_perturbed", "30 rows, of which 5 are of these, and 5 rows to be forgotten"),
        ("forget[:5]", "forget_perturbed[5:10]", "5 rows, of which 0 are of these, and 5 rows to be forgotten"),
        ("forget", "forget_perturbed[:20]", "20 rows, of which 20 are of these, and 30 rows to be forgotten"),
    ],
)
def test_paraphrases_of_other_rows_than_those_to_be_forgotten_are_warned_of(caplog, forget, paraphrased, shown):
    columns = {name: name for name in ("question", "answer", "paraphrased_question", "paraphrased_answer")}
    splits = {"forget": forget, "forget_paraphrased": paraphrased, "retain": "retain"}
    load_questions(DataConfig(str(ROOT / "data/tiny"), splits, columns), EvaluationConfig())
    found = [message for message in caplog.messages if message.startswith("data.splits.forget_paraphrased=")]
    assert len(found) == (shown is not None)
    if shown:
        assert f"={paraphrased} is not the paraphrase of data.splits.forget={forget}: {shown}" in found[0]


def test_paraphrases_without_the_original_questions_are_compared_by_number(caplog, tmp_path):
    rows = [Row(row.index, row.question.replace("?", ", say?"), row.answer) for row in ROWS[:3]]
    splits = {"forget": write_rows(tmp_path, "gone", ROWS[:3]), "retain": write_rows(tmp_path, "kept", ROWS[3:])}
    splits["forget_paraphrased"] = write_rows(tmp_path, "said", rows)
    columns = {"question": "question", "answer": "answer"}
    columns |= {"paraphrased_question": "question", "paraphrased_answer": "answer"}
    data = DataConfig(str(tmp_path), splits, columns)
    load_questions(data, EvaluationConfig())
    assert not caplog.messages
    load_questions(replace(data, splits=splits | {"forget": "gone[:2]"}), EvaluationConfig())
    assert "3 rows, and 2 rows to be forgotten" in caplog.text
