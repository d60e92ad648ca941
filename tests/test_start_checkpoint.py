"""Where unlearning starts: a checkpoint named by its path, which must fit the data, base model and prompt of the run."""

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from common.command import command_that_makes
from common.config import read_config
from common.errors import UserError
from common.files import CONFIGS, ROOT, read_json, write_json
from common.run_names import run_name
from common.runs import comparable_config
from unlearning.main import method_class
from unlearning.start_checkpoint import start_checkpoint, warn_unless_unlearned

FOREIGN = "name the folder of a finetuned model, or a hub id"


@pytest.fixture(autouse=True)
def configs():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        yield


def start(models_dir: Path, *overrides: str):
    cfg = compose("PMC-unlearn-tiny", [f"models_dir={models_dir}", *overrides])
    return start_checkpoint(read_config(cfg, method_class(cfg).Settings, also=("finetuned",)), cfg.finetuned)


def error_of(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        start(*arguments)
    return str(caught.value)


def finetuned(models_dir: Path, name: str = "seed-0", *overrides: str) -> Path:
    """A finetuned run's folder, with what start_checkpoint reads of it."""
    folder = models_dir / "finetuned" / "tiny" / name
    folder.mkdir(parents=True)
    cfg = compose("tiny", [f"models_dir={models_dir}", *overrides])
    write_json(folder / "result.json", {"config": comparable_config(cfg)})
    return folder


def test_the_recipe_s_path_names_the_checkpoint(tmp_path):
    folder = finetuned(tmp_path)
    found = start(tmp_path)
    assert found.path == str(folder)
    assert found.made_by == f"python finetuning/main.py -cd=configs -cn=tiny seed=0 models_dir={tmp_path}"


def test_a_missing_folder_names_the_command_and_the_folders_beside_it(tmp_path):
    assert "there:" not in error_of(tmp_path)
    finetuned(tmp_path, "seed-0+data.path-x")
    message = error_of(tmp_path)
    assert message.startswith(
        f"finetuned={tmp_path}/finetuned/tiny/seed-0: no such folder; make it with: python finetuning/"
    )
    assert message.endswith("(there: seed-0+data.path-x; name one with finetuned=FOLDER)")


@pytest.mark.parametrize("word", ["tinny/x/y", "./tiny", "models/finetuned/none/seed-0", "finetuned/tiny/seed-0+x"])
def test_a_missing_folder_that_no_recipe_writes_has_no_command(tmp_path, word):
    assert error_of(tmp_path, f"finetuned={word}").startswith(f"finetuned={word}: no such folder; {FOREIGN}")


def test_a_folder_of_runs_is_no_checkpoint(tmp_path):
    finetuned(tmp_path)
    message = error_of(tmp_path, f"finetuned={tmp_path}/finetuned")
    assert (
        message == f"finetuned={tmp_path}/finetuned: no checkpoint is in this folder; name a run's folder (there: tiny)"
    )


def test_a_hub_id_is_left_to_the_hub(tmp_path):
    assert start(tmp_path, "finetuned=owner/name").path == "owner/name"


def test_the_revision_is_that_of_a_hub_id_but_not_of_a_folder(tmp_path):
    assert start(tmp_path, "finetuned=owner/name", "++model.revision=v2").revision == "v2"
    folder = finetuned(tmp_path, "seed-0", "++model.revision=v2")
    assert start(tmp_path, f"finetuned={folder}", "++model.revision=v2").revision is None


def test_a_checkpoint_of_other_columns_is_warned_of(tmp_path, caplog):
    finetuned(tmp_path)
    start(tmp_path, "data.columns.answer=paraphrased_answer")
    assert "data.columns={'question': 'question', 'answer': 'answer', 'text': None} there" in caplog.text


def test_a_data_set_without_a_maximum_length_has_the_default(tmp_path, caplog):
    folder = finetuned(tmp_path)
    stored = read_json(folder / "result.json")
    del stored["config"]["data"]["max_length"]
    write_json(folder / "result.json", stored)
    start(tmp_path)
    assert not caplog.messages
    start(tmp_path, "data.max_length=100")
    assert "data.max_length=256 there, 100 here" in caplog.text


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("models/finetuned/tiny/seed-2", "finetuning/main.py -cd=configs -cn=tiny seed=2"),
        (f"{ROOT}/models/finetuned/phi/seed-0/", "finetuning/main.py -cd=configs -cn=phi seed=0"),
        ("/mine/finetuned/phi/seed-0", "finetuning/main.py -cd=configs -cn=phi seed=0 models_dir=/mine"),
        ("models/unlearned/PMC-unlearn-tiny/seed-1", "unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny seed=1"),
        ("models/unlearned/tiny/seed-0", None),
        ("models/finetuned/tiny/seed-0+a-1", None),
    ],
)
def test_the_command_that_makes_a_path(path, command):
    assert command_that_makes(path) == (command and f"python {command}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/elsewhere", "data.path=./data/tiny there, /elsewhere here"),
        ("model.path=some/other", "model.path=models/finetuned/pretrain-tiny/seed-0 there, some/other here"),
        ("model.prompt.style=chat", "model.prompt.style=plain there, chat here"),
        ("+model.prompt.system=S", "model.prompt.system=None there, S here"),
        ("+model.prompt.template_options.x=1", "model.prompt.template_options={} there, {'x': 1} here"),
    ],
)
def test_a_checkpoint_of_other_data_model_or_prompt_is_refused(tmp_path, override, message):
    folder = finetuned(tmp_path)
    assert error_of(tmp_path, override).startswith(
        f"finetuned={folder}: was finetuned with other settings than this run has: {message}"
    )
    mine = finetuned(tmp_path, "mine", override)
    assert start(tmp_path, override, f"finetuned={mine}").path == str(mine)
    assert "here" in error_of(tmp_path, f"finetuned={mine}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=4"],
        [f"data.path={os.path.relpath(ROOT)}/data/tiny"],
        ["data.splits.forget=retain"],
        ["model.dtype=float16"],
        ["model.lora={r:4}"],
        ["+model.prompt.date_string=null"],
    ],
)
def test_what_may_differ_is_accepted(tmp_path, overrides):
    """Seeds, spellings of a path, splits of this stage, the number type, an adapter."""
    folder = finetuned(tmp_path)
    assert start(tmp_path, *overrides, f"finetuned={folder}").path == str(folder)


def test_a_checkpoint_made_elsewhere_is_not_compared(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").touch()
    assert start(tmp_path, f"finetuned={tmp_path}/theirs", "data.path=/elsewhere").path == f"{tmp_path}/theirs"


def test_a_local_copy_of_a_hub_data_set_is_warned_about(tmp_path, caplog):
    """It cannot be told from another data set, and finetuning on the hub's and unlearning on a copy is common."""
    folder = finetuned(tmp_path, "seed-0", "data.path=locuslab/TOFU")
    assert start(tmp_path, f"data.path={tmp_path}").path == str(folder)
    assert f"data.path=locuslab/TOFU there, {tmp_path} here" in caplog.text
    assert "data.path=locuslab/TOFU there, other/DATA here" in error_of(tmp_path, "data.path=other/DATA")


def on_the_command_line(monkeypatch, *words: str) -> tuple[str, ...]:
    """As if the stage were started with these overrides."""
    monkeypatch.setattr("unlearning.start_checkpoint.typed_overrides", lambda: list(words))
    return words


def test_the_command_for_a_missing_folder_has_the_overrides_that_finetuning_shares(tmp_path, monkeypatch):
    words = on_the_command_line(
        monkeypatch, "model.path=some/other", "data.splits.forget=retain", "seed=9", "method.num_samples=2"
    )
    message = error_of(tmp_path, *words)
    assert f"-cn=tiny seed=9 models_dir={tmp_path} model.path=some/other and name its folder with " in message
    folder = tmp_path / "finetuned/tiny" / run_name(9, ["model.path=some/other"])
    assert message.endswith(f"finetuned={folder}"), "the folder that this command writes"


def test_another_training_split_is_refused(tmp_path, monkeypatch):
    """Unlearning reads no such split: the checkpoint would be the one that was trained on the default."""
    finetuned(tmp_path)
    words = on_the_command_line(monkeypatch, "data.splits.train=retain")
    assert error_of(tmp_path, *words).startswith("data.splits.train: unlearning does not read it; name a checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("override", ["model.lora={r:4}", "data.max_length=99"])
def test_an_adapter_or_another_length_is_warned_about_with_the_folders_beside(tmp_path, caplog, override):
    folder = finetuned(tmp_path)
    assert start(tmp_path, override).path == str(folder)
    key = override.partition("=")[0]
    assert f"finetuning had other settings: {key}=" in caplog.text
    finetuned(tmp_path, "seed-0+mine", override)
    caplog.clear()
    start(tmp_path, override)
    assert "there: seed-0+mine; name one with finetuned=FOLDER" in caplog.text
    caplog.clear()
    start(tmp_path, override, f"finetuned={tmp_path}/finetuned/tiny/seed-0+mine")
    assert not caplog.text


def test_a_recipe_s_name_is_answered_with_the_folder_that_it_writes(tmp_path):
    assert "such as finetuned=models/finetuned/tiny/seed-0" in error_of(tmp_path, "finetuned=tiny")


def test_a_model_path_beside_a_checkpoint_without_a_record_is_refused(tmp_path, monkeypatch):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").touch()
    assert start(tmp_path, f"finetuned={foreign}").path == str(foreign)
    words = on_the_command_line(monkeypatch, "model.path=some/other", f"finetuned={foreign}")
    message = error_of(tmp_path, *words)
    assert message.startswith(f"model.path: unlearning starts from finetuned={foreign}, which has no record")


def test_another_tokenizer_than_that_of_finetuning_is_refused(tmp_path):
    finetuned(tmp_path)
    assert "model.tokenizer=None there, other/one here" in error_of(tmp_path, "++model.tokenizer=other/one")


def test_a_start_that_was_not_unlearned_is_warned_of(tmp_path, caplog):
    known = finetuned(tmp_path)
    warn_unless_unlearned(str(known))
    assert f"finetuned={known}: has not been unlearned" in caplog.text
    caplog.clear()
    warn_unless_unlearned("owner/name")
    record = read_json(known / "result.json")
    record["config"]["method"] = {}
    write_json(known / "result.json", record)
    warn_unless_unlearned(str(known))
    assert not caplog.text
