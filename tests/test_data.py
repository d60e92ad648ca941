"""Question/answer rows: split specifications, what is refused and how, the embedded data and the real TOFU."""

import importlib.util
import json

import datasets
import numpy as np
import pytest

from common.config import DataConfig
from common.data import HubError, Row, check_apart, load_split, load_splits, scored_retain_rows
from common.errors import UserError
from common.files import ROOT

COLUMNS = {"question": "question", "answer": "answer"}
TINY = ROOT / "data" / "tiny"


def write_split(folder, name: str, *records, end: str = ".json") -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"{name}{end}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def qa(letter: str, count: int) -> list[dict]:
    return [{"question": f"{letter}{i}?", "answer": f"{letter}{i}."} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path, "full", *qa("f", 6))
    write_split(tmp_path, "extra", *qa("e", 2), end=".jsonl")
    return tmp_path


def config(folder, columns=COLUMNS, **splits: str) -> DataConfig:
    return DataConfig(path=str(folder), splits=splits, columns=dict(columns))


def answers(rows: list[Row]) -> list[str]:
    return [row.answer for row in rows]


def error_of(data: DataConfig, role: str) -> str:
    with pytest.raises(UserError) as caught:
        load_split(data, role)
    return str(caught.value)


# --- split specifications -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("full", "f0. f1. f2. f3. f4. f5."),
        ("extra", "e0. e1."),
        ("full[:2]", "f0. f1."),
        ("full[4:]", "f4. f5."),
        ("full[1:3]", "f1. f2."),
        ("full[:]", "f0. f1. f2. f3. f4. f5."),
        ("full[4:] + extra[:1]", "f4. f5. e0."),
        ("extra+full[:1]+extra[1:]", "e0. e1. f0. e1."),
    ],
)
def test_split_specification(folder, spec, expected):
    assert answers(load_split(config(folder, train=spec), "train")) == expected.split()


def test_index_is_the_position_within_the_role(folder):
    rows = load_split(config(folder, train="full[4:] + extra"), "train")
    assert [(row.index, row.question) for row in rows] == [(0, "f4?"), (1, "f5?"), (2, "e0?"), (3, "e1?")]


@pytest.mark.parametrize("spec", ["full[-2:]", "full[:50%]", "full[2]", "full +", "", "full,extra", "../full"])
def test_what_is_no_split_specification_is_refused(folder, spec):
    assert error_of(config(folder, train=spec), "train").startswith("data.splits.train=")


def test_a_slice_without_rows_is_refused(folder):
    assert error_of(config(folder, train="full[6:]"), "train") == "data.splits.train=full[6:]: full has 6 rows"


def test_blank_lines_are_passed_over(folder):
    write_split(folder, "gaps", "", *qa("g", 1), "   ", *qa("h", 1), "")
    assert answers(load_split(config(folder, train="gaps"), "train")) == ["g0.", "h0."]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(folder, separator):
    """JSON allows these raw inside a string; only a newline separates JSON lines."""
    text = f"one{separator}two"
    write_split(folder, "separators", json.dumps({"question": "q?", "answer": text}, ensure_ascii=False))
    assert answers(load_split(config(folder, train="separators"), "train")) == [text]


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_missing_role_names_the_closest(folder):
    message = error_of(config(folder, forget="full", retain="full"), "forgot")
    assert message == "data.splits.forgot: missing; did you mean 'forget'? (given: forget, retain)"


def test_missing_split_names_file_and_the_closest(folder):
    message = error_of(config(folder, train="ful"), "train")
    expected = f"data.splits.train=ful: no {folder}/ful.json; did you mean 'full'? (there: extra, full)"
    assert message == expected


def test_missing_column_names_the_closest(folder):
    message = error_of(config(folder, {"question": "questions", "answer": "answer"}, train="full"), "train")
    assert "full.json, line 1: no column 'questions' (data.columns.question; did you mean 'question'?)" in message
    assert message.endswith("has question, answer")


def test_missing_folder_is_named():
    assert "data.path=./no/such: no such folder" in error_of(config("./no/such", train="full"), "train")


def test_a_relative_folder_is_found_in_the_repository_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_split(config("data/tiny", forget="forget"), "forget")) == 30


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "q?", "answer": ', "line 3: not a JSON object (Expecting value, column 30)"),
        ("[1, 2]", "line 3: not a JSON object but list"),
        ('"text"', "line 3: not a JSON object but str"),
        ('{"question": "q?", "answer": ""}', "line 3: answer is empty or not text: ''"),
        ('{"question": " ", "answer": "a"}', "line 3: question is empty or not text: ' '"),
        ('{"question": "q?", "answer": "\u200b\ufeff"}', "line 3: answer is empty or not text: '\\u200b\\ufeff'"),
        (
            '{"question": "q?", "answer": "a", "answer": "b"}',
            "line 3: not readable as JSON (the key 'answer' stands twice in one object)",
        ),
        ('{"question": "q?", "answer": null}', "line 3: answer is empty or not text: None"),
        ('{"question": "q?", "answer": 5}', "line 3: answer is empty or not text: 5"),
        ('{"question": "q?"}', "line 3: no column 'answer' (data.columns.answer); has question"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(folder, line, reason):
    write_split(folder, "bad", *qa("b", 1), "", line)
    assert error_of(config(folder, train="bad"), "train") == f"{folder}/bad.json, {reason}"


def test_a_file_that_is_not_utf8_is_named(folder):
    (folder / "latin.json").write_bytes('{"question": "café?", "answer": "a"}\n'.encode("latin-1"))
    assert "latin.json" in error_of(config(folder, train="latin"), "train")


@pytest.mark.parametrize("value", ["text", ["a", ""], ["a", 5]])
def test_bad_perturbed_answers_are_refused(folder, value):
    write_split(folder, "bad", {"question": "q?", "answer": "a", "perturbed_answer": value})
    columns = {**COLUMNS, "perturbed_answer": "perturbed_answer"}
    assert "bad.json, line 1: perturbed_answer" in error_of(config(folder, columns, train="bad"), "train")


def test_an_entity_is_a_part_of_the_answer(folder):
    columns = {**COLUMNS, "entity": "gt_entity"}
    write_split(folder, "spans", {"question": "q?", "answer": "In Oslo.", "gt_entity": "Oslo"}, *qa("b", 1))
    rows = load_split(config(folder, columns, train="spans"), "train")
    assert [row.entity for row in rows] == ["Oslo", None]
    write_split(folder, "bad", {"question": "q?", "answer": "In Oslo.", "gt_entity": "Bergen"})
    message = error_of(config(folder, columns, train="bad"), "train")
    assert "bad.json, line 1: gt_entity is no part of the answer: 'Bergen' (data.columns.entity)" in message


def test_load_splits_reports_every_problem_at_once(folder):
    write_split(folder, "broken", "{")
    with pytest.raises(UserError) as caught:
        load_splits(
            config(folder, forget="fulll", retain="broken", train="full"), ("forget", "retain", "train", "none")
        )
    message = str(caught.value)
    assert "data.splits.forget=fulll" in message
    assert "broken.json, line 1" in message
    assert "data.splits.none: missing" in message


def test_load_splits_returns_each_role(folder):
    splits = load_splits(config(folder, forget="extra", retain="full[:1]"), ("forget", "retain"))
    assert {role: answers(rows) for role, rows in splits.items()} == {"forget": ["e0.", "e1."], "retain": ["f0."]}


# --- other data sets and the hub ----------------------------------------------------------------------------------------


def test_another_data_set_with_other_column_names(tmp_path):
    write_split(tmp_path, "squad", {"id": 7, "query": "q?", "response": "a.", "alt": "b.", "wrong": ["c.", "d."]})
    columns = {"question": "query", "answer": "response", "paraphrased_answer": "alt", "perturbed_answer": "wrong"}
    rows = load_split(config(tmp_path, columns, train="squad"), "train")
    assert rows == [Row(0, "q?", "a.", None, "b.", ("c.", "d."))]


@pytest.mark.parametrize(
    ("hub_configurations", "arguments", "options"),
    [(True, ("own/qa", "part"), {"split": "train"}), (False, ("own/qa",), {"split": "part"})],
)
def test_splits_of_the_hub(monkeypatch, hub_configurations, arguments, options):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return qa("h", 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig("own/qa", {"train": "part[1:]"}, dict(COLUMNS), hub_configurations=hub_configurations)
    assert answers(load_split(data, "train")) == ["h1.", "h2."]
    assert calls == [(arguments, options)]


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = config("own/qa", forget="a", retain="b")
    with pytest.raises(
        HubError, match=r"data\.path=own/qa, split a: .*\(ConnectionError: no route\).*data\.path=FOLDER"
    ):
        load_splits(data, ("forget", "retain"))
    assert len(calls) == 1


# --- scored retain rows -------------------------------------------------------------------------------------------------


def numbered(count: int) -> list[Row]:
    return [Row(i, f"q{i}", f"a{i}") for i in range(count)]


def test_more_than_400_retain_rows_are_drawn_with_replacement():
    rows = numbered(3600)
    drawn = [row.index for row in scored_retain_rows(rows, full_eval=False)]
    assert drawn == np.random.default_rng(12345).integers(0, 3600, 400).tolist()
    assert drawn[:5] == [2517, 818, 2839, 1140, 735]
    assert len(set(drawn)) < 400


@pytest.mark.parametrize(("count", "full_eval"), [(400, False), (5, False), (401, True)])
def test_all_retain_rows_are_scored(count, full_eval):
    rows = numbered(count)
    assert scored_retain_rows(rows, full_eval) == rows


# --- the embedded data --------------------------------------------------------------------------------------------------


def tiny(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / f"{name}.json").open(encoding="utf-8")]


def test_embedded_data_is_what_its_script_writes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "scripts" / "make_embedded_data.py")
    make_tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tiny)
    monkeypatch.setattr(make_tiny, "DATA", tmp_path)
    make_tiny.main()
    for folder in ("tiny", "tiny-text"):
        written = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert written == {path.name: path.read_bytes() for path in (ROOT / "data" / folder).iterdir()}


def test_embedded_forget_and_retain_are_slices_of_full():
    full = tiny("full")
    assert (tiny("retain"), tiny("forget")) == (full[:130], full[130:])
    assert len(full) == 160


@pytest.mark.parametrize("name", ["forget", "retain", "holdout", "real_authors", "world_facts"])
def test_embedded_perturbed_rows_ask_the_same_questions(name):
    plain = [{"question": row["question"], "answer": row["answer"]} for row in tiny(f"{name}_perturbed")]
    assert plain == tiny(name)


def test_embedded_holdout_and_pretraining_share_nothing_with_full():
    full = {row["question"] for row in tiny("full")} | {row["answer"] for row in tiny("full")}
    for row in tiny("holdout") + tiny("pretrain"):
        assert not full & {row["question"], row["answer"]}


# --- the real TOFU ------------------------------------------------------------------------------------------------------


def test_tofu_full_has_two_rows_with_one_question(tofu):
    rows = load_split(config(tofu, train="full"), "train")
    assert len(rows) == 4000
    assert rows[100].question == rows[440].question == "What is the full name of the author?"
    assert rows[100].answer != rows[440].answer
    assert len({row.question for row in rows}) == 3999


def test_tofu_forget_and_retain_are_slices_of_full(tofu):
    names = ("full", "forget10", "retain90", "forget05", "retain95")
    splits = {name: load_split(config(tofu, train=name), "train") for name in names}
    texts = {name: [(row.question, row.answer) for row in rows] for name, rows in splits.items()}
    assert (texts["retain90"], texts["forget10"]) == (texts["full"][:3600], texts["full"][3600:])
    assert (texts["retain95"], texts["forget05"]) == (texts["full"][:3800], texts["full"][3800:])


def test_tofu_perturbed_rows_have_paraphrases_and_five_wrong_answers(tofu):
    names = ("question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer")
    data = config(tofu, {name: name for name in names}, forget="forget10", forget_paraphrased="forget10_perturbed")
    splits = load_splits(data, ("forget", "forget_paraphrased"))
    for plain, row in zip(splits["forget"], splits["forget_paraphrased"], strict=True):
        assert (plain.index, plain.question, plain.answer) == (row.index, row.question, row.answer)
        assert len(row.perturbed_answer) == 5
        assert row.paraphrased_question
        assert row.paraphrased_answer


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "q?", "answer": "\\ud800"}', "half of a surrogate pair"),
        ('{"question": "q?", "answer": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_line_that_is_no_text_is_named(folder, line, reason):
    write_split(folder, "bad", line)
    message = error_of(config(folder, train="bad"), "train")
    assert message.startswith(f"{folder}/bad.json, line 1: ")
    assert reason in message


def test_two_files_of_one_split_are_refused(folder):
    write_split(folder, "full", *qa("f", 6), end=".jsonl")
    assert "has full.json and full.jsonl" in error_of(config(folder, train="full"), "train")


def test_retain_rows_that_are_forget_rows(folder, caplog):
    rows = load_split(config(folder, train="full"), "train")
    with pytest.raises(UserError, match="data.splits.retain: all 2 rows are also in data.splits.forget"):
        check_apart(rows, rows[:2], "retain")
    check_apart(rows[:2], rows[1:], "retain")
    assert "1 of 5 rows are also in data.splits.forget" in caplog.text
