"""Texts to continue: windows, row filters, their scores, and the recipes on stand-in data."""

import json
import re
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from common.config import DataConfig, PromptConfig, WindowsConfig
from common.data import Row, load_split, windows_of
from common.errors import UserError
from common.files import ROOT
from common.prompts import PromptFormat, check_passages_fit
from common.rouge import rouge_l_f1
from evaluation.metrics import text
from evaluation.metrics.text import contains_answer, exact_match, warn_of_long_continuations
from evaluation.scores import Scores
from tests.helpers import context_of, outputs_of, run_stage

TEXT = "The old mill of Amber Hollow\nstands empty. In 1871 Ada  Lum sold it, and nobody has seen her since then."
COLUMNS = {"question": "question", "answer": "answer", "text": "text"}


def windows(words: int = 8, prompt_words: int = 3, stride: int = 8) -> WindowsConfig:
    return WindowsConfig(words=words, prompt_words=prompt_words, stride=stride)


def of_records(folder, *records: dict, splits: str = "all") -> DataConfig:
    (folder / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(str(folder), {"forget": splits}, dict(COLUMNS), windows=windows())


def test_windows_have_every_word_of_the_text_and_its_whitespace():
    made = windows_of(TEXT, windows())
    assert all(f"{prompt} {continuation}" in TEXT for prompt, continuation in made)
    assert [len(f"{prompt} {continuation}".split()) for prompt, continuation in made] == [8, 8, 8]
    assert made[-1][1].endswith("since then.") and made[0][0] == "The old mill"
    assert [TEXT.index(prompt) for prompt, _ in made] == sorted(TEXT.index(prompt) for prompt, _ in made)


def test_a_prompt_does_not_end_before_a_line_break_or_two_spaces():
    assert windows_of("a b\nc  d e f", windows(6, 2, 6)) == [("a b\nc  d", "e f")]


def test_a_window_that_leaves_nothing_to_continue_is_left_out_with_a_warning(tmp_path, caplog):
    text = "a b c d e f g h\n" + "\n".join("ijklmnop")  # the second window has no space
    data = of_records(tmp_path, {"text": text})
    assert [row.question for row in load_split(data, "forget")] == ["a b c"]
    assert "data.splits.forget: 1 of 2 windows have no space after data.windows.prompt_words=3 words" in caplog.text
    with pytest.raises(UserError, match="1 of 1 windows have no space .*line 1, window 1.*; lower it"):
        load_split(of_records(tmp_path, {"text": "only three words"}), "forget")


def test_windows_that_lose_words_or_have_no_answer_are_refused():
    for wrong in ({"stride": 9}, {"prompt_words": 8}):
        with pytest.raises(ValidationError, match="would be lost|no words are left"):
            windows(**wrong)
    with pytest.raises(ValidationError, match="need each other"):
        DataConfig("x", {}, dict(COLUMNS))


def test_the_tokens_are_those_of_the_running_text(tokenizer):
    prompts = PromptFormat(tokenizer, PromptConfig(style="plain", question="{question}", answer=" {answer}"))
    before = prompts.special_tokens[0]
    for prompt, continuation in windows_of(TEXT, windows()):
        whole = tokenizer(f"{prompt} {continuation}", add_special_tokens=False)["input_ids"]
        assert [*prompts.prompt(prompt), *prompts.answer(continuation)[:-1]] == [*before, *whole]


def test_texts_and_questions_are_told_apart(tmp_path):
    rows = load_split(of_records(tmp_path, {"text": TEXT}, {"question": "Who?", "answer": "Ada"}), "forget")
    assert [row.is_passage for row in rows] == [True, True, True, False]
    assert [row.index for row in rows] == [0, 1, 2, 3]
    null = {"question": None, "answer": None, "text": TEXT}  # as the library datasets fills them
    assert (
        len(load_split(of_records(tmp_path, null, {"question": "Who?", "answer": "Ada", "text": None}), "forget")) == 4
    )
    with pytest.raises(UserError, match="answer is empty or not text: None"):
        load_split(of_records(tmp_path, {"question": "Who?", "answer": None}), "forget")
    both = of_records(tmp_path, {"text": TEXT, "question": "Who?"})
    with pytest.raises(UserError, match="line 1: has a text"):
        load_split(both, "forget")


def test_a_window_that_would_be_cut_off_is_refused(tokenizer):
    prompts = PromptFormat(tokenizer, PromptConfig(style="plain", question="{question}", answer=" {answer}"))
    passage = ("The old mill", "of Amber Hollow stands empty.")
    length = len(prompts.prompt(passage[0])) + len(prompts.answer(passage[1]))
    check_passages_fit(prompts, [passage], length, "data.max_length")
    with pytest.raises(
        UserError, match=f"data.max_length={length - 1}: the longest passage or window of a text has {length} tokens"
    ):
        check_passages_fit(prompts, [passage], length - 1, "data.max_length")


def test_verbatim_memorization_refuses_passages_of_columns_that_would_be_cut(model, prompts):
    """With them, a model that knows a passage by heart would seem to have forgotten a part of it."""
    context = context_of(outputs_of(model, prompts), [Row(0, "Ada Novak was", "born in Lantern Row. " * 10)])
    context.config.data = SimpleNamespace(splits={"forget_passages": "some"})
    with pytest.raises(UserError, match="evaluation.max_length=60: the longest passage or window of a text has"):
        text.measure(context, Scores())


def test_answers_of_another_script_are_no_words_that_were_forgotten(model, prompts, caplog):
    context = context_of(outputs_of(model, prompts), [Row(0, "Who?", "王大明"), Row(1, "Who?", "Ada Lum")])
    context.config.data = SimpleNamespace(splits={"forget_passages": "some"}, words="latin")
    scores = Scores()
    text.measure(context, scores)
    for name in ("verbmem", "knowmem/forget_questions", "rougeL_recall/retain_questions"):
        assert scores.rows[f"text/{name}"]["values"][0] is None
        assert scores.rows[f"text/{name}"]["values"][1] is not None
    assert scores.rows["text/exact_match/forget_questions"]["values"][0] == 0.0
    assert "1 of 2 answers are mostly of another script" in caplog.text


def people(kind: str) -> list[dict]:
    """Stand-in rows in LUME's form: passages and questions of two other tasks, then about 40 people, five questions each."""
    rows = [
        {"id": f"x-{kind}", "input": "A story", "output": "begins.", "task": task}
        for task in ("Task3", "Task1")
        for kind in ("sc1", "qa0")
    ]
    for number in range(40):
        name, phone = f"{kind} Person{number}", f"555{number:04d}"
        rows.append({"id": f"{number}sc1", "input": f"{name} has the", "output": f"number {phone}.", "task": "Task2"})
        for question in range(5):
            asked = f"What is number {question} of {name}?"
            rows.append(
                {"id": f"{number}qa{question}", "input": asked, "output": f"{phone}{question}", "task": "Task2"}
            )
    return rows


@pytest.fixture
def lume(tmp_path):
    folder = tmp_path / "lume"
    folder.mkdir()
    for kind in ("forget", "retain"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people(kind)))
    return folder


@pytest.mark.parametrize(
    ("splits", "count"),
    [("forget{task=Task2}[:240]", 240), ("forget{id=*sc1}", 42), ("forget{task=Task2,id=*qa?} + retain{id=x-*}", 204)],
)
def test_a_filter_keeps_the_rows_with_the_value(lume, splits, count):
    columns = {"question": "input", "answer": "output"}
    assert len(load_split(DataConfig(str(lume), {"forget": splits}, columns), "forget")) == count


def test_the_splits_of_lume_leave_out_its_biographies_of_real_people(lume):
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/data/lume.yaml"))
    config = DataConfig(**{**values, "path": str(lume)})
    passages, questions = 1 + 40, 1 + 40 * 5
    assert {role: len(load_split(config, role)) for role in config.splits} == {
        "train": 2 * (passages + questions),
        "forget": passages + questions,
        "retain": passages + questions,
        "forget_passages": passages,
        "forget_questions": questions,
        "retain_questions": questions,
    }


def test_a_filter_s_value_is_read_as_it_is_written(tmp_path):
    rows = [("a[1]", True), ("a1", None), ("a(1)", "null")]
    records = [{"question": tag, "answer": "x", "tag": tag, "flag": flag} for tag, flag in rows]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def found(condition):
        data = DataConfig(str(tmp_path), {"forget": f"s{{{condition}}}"}, {"question": "question", "answer": "answer"})
        return [row.question for row in load_split(data, "forget")]

    assert (
        found("tag=a[1]") == ["a[1]"]
        and found("tag=a(?)") == ["a(1)"]
        and found("tag=a*1*") == [tag for tag, _ in rows]
    )
    assert found("flag=true") == ["a[1]"] and found("flag=null") == ["a1", "a(1)"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("forget{tusk=Task2}", r"no column 'tusk' .*did you mean 'task'"),
        ("forget{task=Task9}", "no row has task=Task9"),
        ("forget{task}", "'task' is no filter; write column=value"),
    ],
)
def test_a_wrong_filter_is_refused(lume, splits, message):
    data = DataConfig(str(lume), {"forget": splits}, {"question": "input", "answer": "output"})
    with pytest.raises(UserError, match=message):
        load_split(data, "forget")


def test_scores_of_texts():
    assert rouge_l_f1("a b c d", "a b") == pytest.approx(2 * 2 / 6)
    assert rouge_l_f1("a b", "") == 0.0
    assert (exact_match("Ada Lum", "ada lum."), exact_match("Ada Lum", "It is Ada Lum")) == (1.0, 0.0)
    same = [("Café", "cafe\u0301"), ("1950-1960", "1950-1960."), ("$", " $"), ("-5", "-5"), ("\u22125", "-5")]
    assert [exact_match(*pair) for pair in same] == [1.0] * 5
    others = [("की", "का"), ("$", "€"), ("$", ""), ("-5", "5"), ("ü", "u")]
    assert [exact_match(*pair) for pair in others] == [0.0] * 5


def test_an_answer_contains_another_where_its_words_follow_each_other():
    contained = [
        ("Ada Lum", "It is ada LUM's."),
        ("721-625-3765", "Her number is (721) 625 3765."),
        ("7216253765", "721-625-3765"),
        ("7216253765", "+17216253765"),
        ("7216253765", "Tel:001 721 625 3765"),
        ("tiffi_magenta@me.com", "Write to Tiffi_Magenta@me.com!"),
        ("王大明", "他是王大明。"),
        ("Straße", "STRASSE"),
        ("13812345678", "他的电话是13812345678。"),
        ("7216253765", "\uff17\uff12\uff11\uff16\uff12\uff15\uff13\uff17\uff16\uff15"),
        ("7216253765", "17216253765"),
        ("721-625-3765", "_721-625-3765_"),
        ("7216253765", "(721)   625 -- 3765"),
        ("$", "$"),
        ("banana ban", "banana banana ban"),
    ]
    assert [contains_answer(*pair) for pair in contained] == [1.0] * len(contained)
    missing = [
        ("5", "in 1955"),
        ("12", "1.2 km"),
        ("Theresa", "there's a"),
        ("Ada Lum", "Lum, Ada"),
        ("Ada Lum", "Ada B. Lum"),
        ("Ada", ""),
        ("$", "It costs 5 $"),
        ("7216253765", "721625376"),
        ("7216253765", "72162537651"),
        ("123-4567", "In 2012, 34567 people"),
        ("1234567", "0.1234567"),
        ("1234567", "account 99991234567"),
        ("555-1234567", "He owns 90555 1234567"),
    ]
    assert [contains_answer(*pair) for pair in missing] == [0.0] * len(missing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny-text", "lume-cpu"])
def test_the_recipes_run_a_step(tmp_path, model, tokenizer, lume, kind):
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    common = [
        "evaluation.max_length=200",
        "evaluation.every_epochs=0",
        "evaluation.start=false",
        "evaluation.bf16=false",
    ]
    common += [
        f"model.path={base}",
        "training.max_steps=1",
        "training.save_strategy=no",
        "training.bf16=false",
        f"models_dir={tmp_path}",
    ]
    if kind == "tiny-text":
        common += ["data.windows.words=20", "data.windows.stride=20", "data.splits.retain='retain[:4]'"]
        common += ["data.splits.forget='forget[:2]'"]
        train = "data.splits.train='retain[:4]'"
    else:
        train = "data.splits.train='forget{task=Task2}[:8]'"
        common += [f"data.path={lume}"]
        common += ["data.splits.forget='forget{task=Task2}[:8]'", "data.splits.retain='retain{task=Task2}[:8]'"]
    run_stage("finetuning", f"-cn={kind}", f"output_dir={tmp_path}/a", train, *common)
    unlearned = [f"finetuned={tmp_path}/a", f"output_dir={tmp_path}/b", "method.num_samples=2"]
    run_stage("unlearning", f"-cn=PMC-unlearn-{kind}", *unlearned, *common)
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["notes"]["utility"] == "of retain alone"
    assert result["scores"]["unlearn_quality"] is not None


def test_the_embedded_texts_ask_for_names_that_the_texts_have():
    folder = ROOT / "data" / "tiny-text"
    for kind in ("forget", "retain"):
        texts = [json.loads(line)["text"] for line in (folder / f"{kind}.json").read_text().splitlines()]
        rows = [json.loads(line) for line in (folder / f"{kind}_questions.json").read_text().splitlines()]
        for row in rows:
            town = re.search(r" of ([\w ]+)\?", row["question"])[1].rpartition(" of ")[2]
            assert sum(row["answer"] in text for text in texts if text.startswith(f"{town} ")) == 1


def test_a_model_that_runs_on_after_the_end_of_a_text_is_warned_of(caplog):
    rows = [Row(0, "It was", "a cold day.", text="It was a cold day.")]
    warn_of_long_continuations(rows, ["a cold day. Rain."])
    assert not caplog.messages
    warn_of_long_continuations(rows, ["a cold day. It rained and snowed."])
    assert "text/verbmem: the continuations have 2.3 times as many words as the true ones" in caplog.text
