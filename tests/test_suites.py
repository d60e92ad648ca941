"""MUSE, WMDP and RWKU: their structure on the hub as stand-in data, the data/*.yaml that read it, and the recipes of MUSE."""

import json
import logging

import datasets
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.config import DataConfig, PromptConfig, WindowsConfig
from common.data import HubError, load_split, load_splits
from common.errors import UserError
from common.files import CONFIGS
from common.prompts import PromptFormat, check_passages_fit, warn_if_cut
from evaluation.inputs import fill_from_run, read_evaluation
from evaluation.metrics.registry import check_inputs
from tests.helpers import run_stage

TEXT, QA, PASSAGE = ("text",), ("question", "answer"), ("prompt", "gt")
KNOWMEM = dict.fromkeys(("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"), QA)
MUSE = {
    "raw": dict.fromkeys(("forget", "retain1", "retain2", "holdout"), TEXT),
    "train": dict.fromkeys(("forget", "retain1", "retain2"), TEXT),
    "verbmem": {"forget": PASSAGE},
    "knowmem": KNOWMEM,
    "privleak": dict.fromkeys(("forget", "retain", "holdout"), TEXT),
}
PROBE = {"test": ("query", "answer", "level", "type", "subject")}
# hub id -> configuration -> split -> columns, as in the data sets' READMEs on the hub
PUBLISHED = {
    "muse-bench/MUSE-News": MUSE,
    "muse-bench/MUSE-Books": MUSE,
    "cais/wmdp-corpora": {
        name: {"train": TEXT} for name in ("bio-retain-corpus", "cyber-forget-corpus", "cyber-retain-corpus")
    },
    "jinzhuoran/RWKU": {
        f"{kind}_level{level}": PROBE for kind, levels in (("forget", "123"), ("neighbor", "12")) for level in levels
    },
}
ROWS = 3


def stand_in(configuration: str, split: str, columns: tuple[str, ...]) -> list[dict]:
    """Rows with these columns; each value says where it is. A text has 450 words."""

    def value(column: str, row: int) -> str:
        words = f"{configuration} {split} {column} {row}".replace("_", " ")
        if column == "subject":
            return "Stephen King" if row else "Confucius"
        return " ".join([words] * 75) if column == "text" else words

    return [{column: value(column, row) for column in columns} for row in range(ROWS)]


def write_hub(folder, structure) -> None:
    """A data set as on the hub: Parquet files, and a README that names the configurations with their splits."""
    configs = []
    for configuration, splits in structure.items():
        (folder / configuration).mkdir(parents=True)
        files = []
        for split, columns in splits.items():
            path = f"{configuration}/{split}-00000-of-00001.parquet"
            datasets.Dataset.from_list(stand_in(configuration, split, columns)).to_parquet(folder / path)
            files.append({"split": split, "path": f"{configuration}/{split}-*"})
        configs.append({"config_name": configuration, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def write_folder(folder, structure, as_array=False) -> None:
    """The same as a local folder: FOLDER/configuration/split.json in JSON lines, or with one array in each file."""
    for configuration, splits in structure.items():
        (folder / configuration).mkdir(parents=True)
        for split, columns in splits.items():
            rows = stand_in(configuration, split, columns)
            text = json.dumps(rows, indent=1) if as_array else "".join(json.dumps(row) + "\n" for row in rows)
            (folder / configuration / f"{split}.json").write_text(text)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's library reads stand-ins of the published data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for hub_id, structure in PUBLISHED.items():
        write_hub(tmp_path / hub_id, structure)
    for name in ("load_dataset", "get_dataset_config_names", "get_dataset_split_names"):
        real = getattr(datasets, name)
        monkeypatch.setattr(
            datasets, name, lambda path, *args, real=real, **more: real(str(tmp_path / path), *args, **more)
        )
    return tmp_path


def data_of(name: str, **changes) -> DataConfig:
    """The section of configs/data/<name>.yaml."""
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "data" / f"{name}.yaml"))
    if values.get("windows"):
        values["windows"] = WindowsConfig(**values["windows"])
    return DataConfig(**{**values, **changes})


@pytest.mark.parametrize("name", ["muse-news", "muse-books", "wmdp", "rwku"])
@pytest.mark.parametrize("where", ["hub", "lines", "arrays"])
def test_every_role_is_read_from_the_published_structure(hub, tmp_path, name, where):
    data = data_of(name)
    if where != "hub":
        write_folder(tmp_path / "local", PUBLISHED[data.path], as_array=where == "arrays")
        data = data_of(name, path=str(tmp_path / "local"))
    for role, rows in load_splits(data, tuple(data.splits)).items():
        assert rows, role
        expected = {word for part in data.splits[role].split("+") for word in part.partition("{")[0].strip().split("/")}
        said = {word for row in rows for word in row.answer.split()} | {"test"}
        assert {word.replace("_", " ").split()[0] for word in expected} <= said, role
        assert all(row.is_passage for row in rows) == (
            role in ("train", "forget", "retain", "holdout") and name != "rwku"
        )


def test_a_role_has_the_columns_of_its_own_split(hub):
    data = data_of("muse-news")
    (passage, *_), (question, *_) = (load_split(data, role) for role in ("forget_passages", "forget_questions"))
    assert (passage.question, passage.answer) == ("verbmem forget prompt 0", "verbmem forget gt 0")
    assert (question.question, question.answer) == ("knowmem forget qa question 0", "knowmem forget qa answer 0")
    text = load_split(data, "holdout_texts")[1]
    assert text.question == "" and text.answer == " ".join(["privleak holdout text 1"] * 75)
    assert [row.index for row in load_split(data, "forget_texts")] == [0, 1, 2]


def test_rwku_is_filtered_by_its_person(hub):
    rows = load_split(data_of("rwku"), "retain")
    assert len(rows) == 2 * (ROWS - 1)
    assert rows[0].question == "neighbor level1 test query 1"


def test_configurations_have_slices_and_sums(hub):
    data = data_of("muse-news", splits={"forget": "knowmem/forget_qa[:2] + verbmem/forget{prompt=*2}"})
    assert [row.answer for row in load_split(data, "forget")] == [
        "knowmem forget qa answer 0",
        "knowmem forget qa answer 1",
        "verbmem forget gt 2",
    ]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "row/forget",
            r"no configuration 'row'; did you mean 'raw'\? \(there: raw, train, verbmem, knowmem, privleak\)",
        ),
        (
            "knowmem/forget_qaa",
            r"no split 'forget_qaa' in knowmem; did you mean 'forget_qa'\? \(there: .*retain_qa_icl",
        ),
        ("raw", "no split 'train' in raw.*there: forget"),
    ],
)
def test_wrong_names_of_the_hub_are_refused_with_those_that_exist(hub, split, message):
    with pytest.raises(UserError, match=message) as error:
        load_split(data_of("muse-news", splits={"forget": split}), "forget")
    assert not isinstance(error.value, HubError)
    assert f"data.splits.forget={split}: muse-bench/MUSE-News" in str(error.value)


@pytest.mark.parametrize("split", ["raw/forgot", "rwa/forget", "forget"])
def test_wrong_names_of_a_folder_are_refused_with_those_that_exist(tmp_path, split):
    write_folder(tmp_path, MUSE)
    hint = r"; did you mean 'raw/forget'\?"
    with pytest.raises(
        UserError, match=rf"forget={split}: no .*{split}\.json{hint} \(there: knowmem/forget_qa, .*train/"
    ):
        load_split(data_of("muse-news", path=str(tmp_path), splits={"forget": split}), "forget")


def of_rows(folder, *rows: dict, **changes) -> DataConfig:
    (folder / "all.json").write_text(json.dumps(list(rows)))
    return data_of("muse-news", path=str(folder), splits={"forget": "all", "forget_texts": "all"}, **changes)


def test_a_row_with_two_of_the_alternative_columns_is_refused(tmp_path):
    data = of_rows(tmp_path, {"question": "a", "answer": "b"}, {"question": "a", "prompt": "b", "answer": "c"})
    with pytest.raises(UserError, match=r"row 1: has question and prompt; which is meant\? \(data.columns.question\)"):
        load_split(data, "forget")


def test_a_row_with_none_of_the_alternative_columns_is_refused(tmp_path):
    data = of_rows(tmp_path, {"promt": "a", "answer": "b"})
    with pytest.raises(
        UserError, match=r"no column 'question' or 'prompt' .*did you mean 'prompt'|did you mean 'promt'"
    ):
        load_split(data, "forget")


def test_a_role_of_whole_texts_needs_texts(tmp_path):
    with pytest.raises(UserError, match=r"row 0: no text \(data.columns.text=text\); has question, answer"):
        load_split(of_rows(tmp_path, {"question": "a", "answer": "b"}), "forget_texts")


def test_an_array_is_read_with_the_same_care_as_lines(tmp_path):
    data = of_rows(tmp_path)
    for text, message in (
        ('[{"question": "a"},\n3]', "row 1: not a JSON object but int"),
        ("[{\n,]", "line 2, column 1"),
    ):
        (tmp_path / "all.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_split(data, "forget")


def test_texts_too_short_for_a_window_are_left_out_with_a_warning(tmp_path, caplog):
    short, long = {"text": "three short words"}, {"text": " ".join(["word"] * 120)}
    rows = load_split(of_rows(tmp_path, short, long), "forget")
    assert [row.index for row in rows] == [0] and len(rows[0].answer.split()) == 70
    assert "data.splits.forget: 1 of 2 windows have no space" in caplog.text and "row 0, window 1" in caplog.text
    with pytest.raises(UserError, match="1 of 1 windows have no space .*row 0, window 1"):
        load_split(of_rows(tmp_path, short), "forget")


# --- lengths and tokens -------------------------------------------------------------------------------------------------


def test_true_answers_that_are_cut_are_warned_of(tokenizer, caplog):
    prompts = PromptFormat(tokenizer, PromptConfig(style="plain"))
    pair = ("Who?", "Ada Novak was born in Lantern Row.")
    length = len(prompts.prompt(pair[0])) + len(prompts.answer(pair[1])) - 1
    warn_if_cut(prompts, [pair], length, "evaluation.max_length")
    assert not caplog.records
    warn_if_cut(prompts, [pair, ("Who?", "x")], length - 1, "evaluation.max_length")
    assert f"evaluation.max_length={length - 1}: 1 of 2 questions" in caplog.text and f"up to {length})" in caplog.text


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, as that of Llama 2."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", "\u2581ab", "\u2581cd"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("made", "right", "wrong"), [("byte", " {answer}", "{answer}"), ("space", "{answer}", " {answer}")]
)
def test_tokens_that_are_not_those_of_the_running_text_are_warned_of(tokenizer, caplog, made, right, wrong):
    chosen = sentencepiece_like() if made == "space" else tokenizer
    for answer, warns in ((right, False), (wrong, True)):
        caplog.clear()
        prompts = PromptFormat(chosen, PromptConfig(style="plain", question="{question}", answer=answer))
        check_passages_fit(prompts, [("ab cd", "cd ab")], 20, "data.max_length")
        assert bool(caplog.records) == warns, caplog.text
    assert f"is '{right}' better for this tokenizer?" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


# --- the recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_of_muse_runs_a_step_and_metrics_muse_measures_it(tmp_path, model, tokenizer):
    """From a checkpoint without a tokenizer, as MUSE's are; the retain-only model has none either."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_folder(tmp_path / "data", MUSE)
    common = [
        f"data.path={tmp_path}/data",
        *("data.windows.words=20", "data.windows.prompt_words=8", "data.windows.stride=20", "data.max_length=200"),
        *("evaluation.max_length=200", "evaluation.bf16=false", f"models_dir={tmp_path}/models"),
    ]
    tokenizer_too = [f"model.tokenizer={tmp_path}/tokenizer", "model.prompt.answer=' {answer}'"]
    run_stage(
        "unlearning",
        "-cn=PMC-unlearn-muse-news",
        f"finetuned={tmp_path}/base",
        f"output_dir={tmp_path}/run",
        *("training.max_steps=1", "training.save_strategy=no", "training.bf16=false", "method.num_samples=2"),
        *("method.max_length=200", "data.splits.forget='raw/forget[:1]'", "data.splits.retain='raw/retain1[:1]'"),
        *common,
        *tokenizer_too,
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["unlearn_quality"] is not None
    compared = [f"model.path={tmp_path}/run", f"retain_model.path={tmp_path}/base", f"output_dir={tmp_path}/compared"]
    run_stage(
        "evaluation", "-cn=evaluate", "metrics=muse", *compared, f"models_dir={tmp_path}"
    )  # base has no tokenizer
    base = [f"model.path={tmp_path}/base", f"retain_model.path={tmp_path}/base", f"output_dir={tmp_path}/measured"]
    of_config = ["model=llama2", "data=muse-news", "metrics=[muse,text]", "data.splits.forget='raw/forget[:1]'"]
    run_stage("evaluation", "-cn=evaluate", *of_config, *base, *common, *tokenizer_too)
    (file,) = (path for path in (tmp_path / "measured").rglob("result.json"))
    measured = json.loads(file.read_text())
    scores = measured["scores"]
    assert scores["muse/privleak"] == 0.0 or "below 1" in measured["notes"]["muse/privleak"]  # three texts a side
    named = {
        "muse/verbmem_f",
        "muse/knowmem_f",
        "muse/knowmem_r",
        "text/verbmem",
        "text/rougeL_recall/forget_questions",
    }
    assert named <= scores.keys() and all(scores[name] is not None for name in named)


@pytest.mark.parametrize("choice", ["muse-books", "wmdp"])
def test_the_recipes_of_muse_take_other_texts(choice, monkeypatch):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("PMC-unlearn-muse-news", [f"data={choice}", "finetuned=some/model"])
    assert cfg.data.windows.words < cfg.method.max_length


@pytest.mark.parametrize(
    ("role", "split"), [("holdout_texts", "privleak/forget"), ("retain_questions_icl", "knowmem/retain_qa")]
)
def test_rows_that_must_not_be_shared_are_refused(role, split, tmp_path):
    write_folder(tmp_path, MUSE)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        overrides = ["model=llama2", "model.path=x", "data=muse-news", f"data.path={tmp_path}", "metrics=muse"]
        overrides += ["data.windows.words=20", "data.windows.prompt_words=8", "data.windows.stride=20"]
        cfg = compose("evaluate", [*overrides, f"data.splits.{role}={split}"])
    fill_from_run(cfg, None)
    with pytest.raises(UserError, match=f"data.splits.{role}: all 3 rows are also in data.splits"):
        check_inputs(read_evaluation(cfg), ["muse"])


def test_a_text_with_half_a_surrogate_pair_is_refused(tmp_path):
    columns = {"question": "question", "answer": "answer", "text": "text"}
    (tmp_path / "all.jsonl").write_text('{"text": "one \\ud800 two"}\n')
    with pytest.raises(UserError, match="text has half of a surrogate pair"):
        load_split(
            DataConfig(str(tmp_path), {"forget_texts": "all"}, columns, windows=WindowsConfig(8, 3, 8)), "forget_texts"
        )
