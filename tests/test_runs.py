"""A run's folder: where it is, what it depends on, and that results appear whole or not at all."""

import contextlib
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from common import job as job_of_hydra
from common import runs
from common.config import RunConfig
from common.errors import UserError
from common.files import ROOT, write_json
from common.results import checkpoint_id, differing_inputs, evaluation_inputs, result_of
from common.runs import (
    RunFolder,
    changed_keys,
    comparable_config,
    differing_keys,
    digests_of_files,
    has_result_of,
    run_folder,
)
from tests.helpers import TOKEN

# --- places -------------------------------------------------------------------------------------------------------------


def run_config(**values) -> RunConfig:
    empty = dict.fromkeys(("model", "data", "evaluation", "training"))
    flags = dict.fromkeys(("save_model", "overwrite", "keep_checkpoints"), False)
    return RunConfig(**{"seed": 4, "output_dir": None, "models_dir": "/models", **empty, **flags, **values})


@pytest.fixture
def as_hydra(monkeypatch):
    """Pretend to be a job that Hydra started."""

    def pretend(*overrides: str, mode=RunMode.RUN):
        job = SimpleNamespace(config_name="recipe")
        config = SimpleNamespace(overrides=SimpleNamespace(task=list(overrides)), mode=mode, job=job)
        hydra = SimpleNamespace(initialized=lambda: True, get=lambda: config)
        for module in (runs, job_of_hydra):
            monkeypatch.setattr(module, "HydraConfig", hydra)

    return pretend


def test_a_run_lies_under_stage_recipe_and_name(as_hydra):
    as_hydra("seed=4", "a=1")
    assert run_folder("unlearned", run_config()) == Path("/models/unlearned/recipe/seed-4+a-1")


def test_output_dir_is_the_runs_folder(as_hydra):
    as_hydra("a=1")
    assert run_folder("unlearned", run_config(output_dir="/mine")) == Path("/mine")


def test_every_job_of_a_sweep_has_a_folder_below_output_dir(as_hydra):
    as_hydra("a=1", mode=RunMode.MULTIRUN)
    assert run_folder("unlearned", run_config(output_dir="/mine")) == Path("/mine/seed-4+a-1")


# --- what a result depends on -------------------------------------------------------------------------------------------


def configuration(**values):
    base = {"seed": 0, "models_dir": "/m", "overwrite": False, "keep_checkpoints": False, "output_dir": None}
    return OmegaConf.create({**base, "method": {"top_p": 0.9}, **values})


def test_the_compared_configuration_leaves_out_how_to_run():
    changed = configuration(models_dir="/other", overwrite=True, keep_checkpoints=True, output_dir="/x")
    assert comparable_config(changed) == comparable_config(configuration()) == {"seed": 0, "method": {"top_p": 0.9}}


def test_secrets_are_masked_in_the_recorded_configuration():
    found = comparable_config(configuration(method={"api_key": "abc"}, path=TOKEN))
    assert (found["method"]["api_key"], found["path"]) == ("***", "***")


def test_the_compared_configuration_resolves_interpolations_and_takes_the_start_in():
    assert comparable_config(configuration(double="${seed}"), start_id="abc") == {
        "seed": 0,
        "method": {"top_p": 0.9},
        "double": 0,
        "start": "abc",
    }


def test_the_compared_configuration_does_not_depend_on_where_repository_and_runs_lie():
    found = comparable_config(configuration(models_dir="/m/runs", path="/m/runs/tiny/seed-0", data=f"{ROOT}/data/tiny"))
    assert (found["path"], found["data"]) == ("models/tiny/seed-0", "./data/tiny")


def test_data_in_the_folder_of_runs_keeps_its_path():
    """An evaluation with another models_dir must not look for it there, nor find other data."""
    found = comparable_config(configuration(models_dir="/m/runs", data={"path": "/m/runs/rows"}))
    assert found["data"] == {"path": "/m/runs/rows"}
    found = comparable_config(configuration(models_dir=f"{ROOT}/models", data={"path": f"{ROOT}/models/rows"}))
    assert found["data"] == {"path": "models/rows"}


@pytest.mark.parametrize(("edited", "key"), [("data/forget.json", "forget"), ("refusals", "method.refusals")])
def test_a_file_that_is_edited_makes_the_result_stale(tmp_path, edited, key):
    (tmp_path / "data").mkdir()
    for name in ("data/forget.json", "data/retain.jsonl", "data/other.json", "data/holdout.json", "refusals"):
        (tmp_path / name).write_text("{}")
    data = {
        "path": str(tmp_path / "data"),
        "splits": {"forget": "forget[:5]", "retain": "retain + more", "holdout": "holdout"},
    }
    cfg = configuration(method={"refusals": str(tmp_path / "refusals")}, data=data)
    before = comparable_config(cfg)
    assert set(before["files"]) == {"forget", "retain", "method.refusals"}
    assert set(comparable_config(OmegaConf.merge(cfg, {"metrics": "full"}))["files"]) - set(before["files"]) == {
        "holdout"
    }
    (tmp_path / "data/other.json").write_text("not read")
    assert comparable_config(cfg) == before
    (tmp_path / edited).write_text("changed")
    (change,) = differing_keys(before, comparable_config(cfg))
    assert change.startswith(f"files.{key}: ")


def test_a_reward_function_that_is_edited_makes_the_result_stale(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for file in ("their_reward.py", "their_package/__init__.py", "their_package/rewards.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("def reward(reference, samples): return [0.0] * len(samples)\n")
    for target, file in (
        ("their_reward.reward", "their_reward.py"),
        ("their_package.rewards.Reward.of", "their_package/rewards.py"),
    ):
        cfg = configuration(method={"_target_": "unlearning.pmc.PMC", "reward": {"_target_": target}})
        before = comparable_config(cfg)
        (tmp_path / file).write_text("def reward(reference, samples): return [1.0] * len(samples)\n")
        (change,) = differing_keys(before, comparable_config(cfg))
        assert change.startswith("files.method.reward._target_: ")
    for target in ("unlearning.rewards.rouge_l", "no_such_module.reward", "reward"):
        assert "files" not in comparable_config(configuration(method={"reward": {"_target_": target}}))


def test_edited_rows_that_a_new_tokenizer_is_trained_on_make_the_result_stale(tmp_path):
    for name in ("train", "full"):
        (tmp_path / f"{name}.json").write_text("{}")
    data = {"path": str(tmp_path), "splits": {"train": "train"}}
    cfg = configuration(model={"new": {"tokenizer_splits": ["train", "full"]}}, data=data)
    before = comparable_config(cfg)
    (tmp_path / "full.json").write_text("changed")
    (change,) = differing_keys(before, comparable_config(cfg))
    assert change.startswith("files.model.new.tokenizer_splits: ")


@pytest.mark.parametrize("text", ["Answer. " * 100 + "{question}", "~nobody. {question}", "a\0.b"])
def test_a_text_that_cannot_be_a_path_is_no_file(text):
    assert "files" not in comparable_config(configuration(model={"prompt": {"question": text}}))


def test_what_an_older_version_did_not_record_is_no_change(folder):
    """Else an upgrade would repeat finished runs and delete the checkpoints of interrupted ones."""
    new = {**CONFIG, "files": {"forget": "1a2b"}, "start": "of its files"}
    assert changed_keys(CONFIG, new) == []
    assert changed_keys({**CONFIG, "files": {"forget": "3c4d"}}, new) != []
    (RunFolder(folder, CONFIG).open() / "checkpoint-1").mkdir()
    assert (RunFolder(folder, new).open() / "checkpoint-1").is_dir()


@pytest.mark.parametrize("edited", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_checkpoint_that_no_run_made_is_known_by_its_files(tmp_path, edited):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    for name in ("model.safetensors", "tokenizer.json", edited):
        (tmp_path / name).write_text("x")
    found = checkpoint_id(tmp_path)
    (tmp_path / edited).write_text("changed")
    assert checkpoint_id(tmp_path) not in (found, None)
    write_json(tmp_path / "result.json", {"config": {}, "id": "of the run"})
    assert (checkpoint_id(tmp_path), checkpoint_id("owner/name")) == ("of the run", None)


def test_a_run_is_not_continued_by_another_number_of_processes(folder, monkeypatch, caplog):
    """Each process has a batch of its own, so that epochs and learning rates would not go on where they stopped."""
    alone = comparable_config(configuration())
    monkeypatch.setattr("common.runs.PartialState", lambda: SimpleNamespace(num_processes=2))
    two = comparable_config(configuration())
    assert differing_keys(alone, two) == ["processes: None -> 2"]
    assert comparable_config(configuration(metrics=["headline"])).get("processes") is None, "evaluations are the same"
    monkeypatch.undo()
    finish(RunFolder(folder / "done", two), "by two")
    assert RunFolder(folder / "done", alone).is_done()
    assert "made by another number of processes" in caplog.text
    folder = folder / "begun"
    work = RunFolder(folder, two).open()
    (work / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match="was begun with 2 processes, .*; continue it with as many"):
        RunFolder(folder, alone).open()
    assert (work / "checkpoint-1").is_dir()
    RunFolder(folder, alone, overwrite=True).open()
    assert not (work / "checkpoint-1").is_dir()


def test_the_compared_configuration_keeps_the_folder_beside_them():
    """A name that only begins like theirs is another place."""
    found = comparable_config(configuration(models_dir="/m/runs", path="/m/runs-old/tiny", data=f"{ROOT}-old/data"))
    assert (found["path"], found["data"]) == ("/m/runs-old/tiny", f"{ROOT}-old/data")


@pytest.mark.parametrize("models_dir", ["data", "out", "e", "method"])
def test_the_compared_configuration_keeps_every_name_whatever_the_folder_of_runs_is_called(models_dir):
    values = {"data": {"path": "locuslab/TOFU"}, "model": {"lora": {"dropout": 0.5}, "prompt": {"style": "plain"}}}
    assert comparable_config(configuration(models_dir=models_dir, **values)) == {
        "seed": 0,
        "method": {"top_p": 0.9},
        **values,
    }


def test_differing_keys_are_dotted_with_both_values():
    old, new = {"a": 1, "b": {"c": 2, "d": [1]}, "e": 0}, {"a": 1, "b": {"c": 3, "d": [1]}, "f": None, "g": {"h": 1}}
    assert differing_keys(old, new) == ["b.c: 2 -> 3", "e: 0 -> None", "g: None -> {'h': 1}"]
    assert differing_keys(old, old) == []


# --- the folder ---------------------------------------------------------------------------------------------------------

CONFIG = {"seed": 0, "method": {"top_p": 0.9}}
OTHER = {"seed": 0, "method": {"top_p": 0.5}}


def finish(run: RunFolder, mark: str, weights=("model.safetensors",)) -> None:
    """Write what a run writes, and publish it."""
    work = run.open()
    (work / "result.json").write_text(json.dumps({"config": run.configuration, "mark": mark}))
    for name in ("generations.jsonl", "history.jsonl", *weights):
        (work / name).write_text(mark)
    for name in ("vanilla", "checkpoint-3"):
        (work / name).mkdir(exist_ok=True)
        (work / name / "file").write_text(mark)
    run.publish()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_publishing_moves_everything_up_but_checkpoints(folder):
    finish(RunFolder(folder, CONFIG), "new")
    assert names(folder) == {"result.json", "generations.jsonl", "history.jsonl", "model.safetensors", "vanilla"}
    assert result_of(folder)["mark"] == "new"
    assert (folder / "vanilla" / "file").read_text() == "new"


def test_checkpoints_stay_where_asked_for(folder):
    finish(RunFolder(folder, CONFIG, keep_checkpoints=True), "new")
    assert (folder / "checkpoint-3" / "file").read_text() == "new"


def test_the_old_result_stays_until_publishing(folder):
    finish(RunFolder(folder, CONFIG), "old")
    work = RunFolder(folder, OTHER, overwrite=True).open()
    (work / "model.safetensors").write_text("new")
    assert result_of(folder)["mark"] == "old"
    assert (folder / "model.safetensors").read_text() == "old"


def test_figures_of_the_old_result_are_put_aside(folder):
    finish(RunFolder(folder, CONFIG), "old")
    finish(RunFolder(folder, OTHER), "new")
    (aside,) = (folder / "previous").iterdir()
    assert names(aside) == {"result.json", "generations.jsonl", "history.jsonl", "vanilla"}
    assert (result_of(aside)["mark"], result_of(folder)["mark"]) == ("old", "new")


def test_weights_of_another_shape_do_not_stay_beside_the_new_ones(folder):
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json")
    finish(RunFolder(folder, CONFIG), "old", weights=shards)
    finish(RunFolder(folder, OTHER), "new")
    assert not names(folder) & set(shards)
    assert (folder / "model.safetensors").read_text() == "new"


def test_the_result_comes_last(folder, monkeypatch):
    moved, replace = [], Path.replace

    def noting(self, target):
        moved.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    finish(RunFolder(folder, CONFIG), "new")
    assert moved[-1] == "result.json"
    assert moved.count("result.json") == 1


class Killed(BaseException):
    """Ends a command as a kill does: nothing handles it."""


@contextlib.contextmanager
def killed_at(number: int):
    """Every file operation from the one with this number on raises Killed; yields a list of the operations."""
    operations = []

    def counting(operation):
        def call(*args, **kwargs):
            operations.append(args)
            if len(operations) > number:
                raise Killed
            return operation(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counting(getattr(os, name)))
        yield operations


def command(folder, configuration, mark, weights, overwrite) -> bool:
    """What a stage's command does; returns whether it trained."""
    run = RunFolder(folder, configuration, overwrite=overwrite)
    with run.locked():
        if run.is_done():
            return False
        finish(run, mark, weights)
        return True


def marks(folder: Path, *patterns: str) -> set[str]:
    return {path.read_text() for pattern in patterns for path in folder.glob(pattern)}


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
TEXTS = ("generations.jsonl", "history.jsonl", "model*")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("weights", [("model.safetensors",), ()])
def test_a_kill_at_any_file_operation_neither_mixes_two_results_nor_loses_one(tmp_path, weights, overwrite):
    for number in itertools.count():
        folder = tmp_path / str(number)
        finish(RunFolder(folder, CONFIG), "old", SHARDS)
        with killed_at(number) as operations, contextlib.suppress(Killed):
            command(folder, OTHER, "new", weights, overwrite)
        is_published = (folder / "in_progress.publishing").is_dir()
        if (folder / "result.json").exists():
            assert marks(folder, *TEXTS) <= {result_of(folder)["mark"]}
        else:
            with pytest.raises(UserError, match="the run's command completes it"):
                result_of(folder)
        is_new = is_published or (not overwrite and result_of(folder)["mark"] == "new")
        assert command(folder, OTHER, "again", weights, overwrite) != is_new
        mark = "new" if is_new else "again"
        assert result_of(folder)["mark"] == mark
        assert marks(folder, *TEXTS, "vanilla/file") == {mark}
        assert names(folder) == {"result.json", "generations.jsonl", "history.jsonl", "vanilla", "previous", *weights}
        archives = {result_of(aside)["mark"]: aside for aside in (folder / "previous").iterdir()}
        assert marks(archives["old"], *TEXTS) == {"old"}
        assert names(archives["old"]) >= (set() if weights else set(SHARDS))
        if len(operations) <= number:
            break
    assert number > 15


@pytest.mark.parametrize("configuration", [None, CONFIG])
@pytest.mark.parametrize("with_result", [False, True])
def test_a_kill_at_any_file_operation_neither_blocks_the_folder_nor_mixes_two_runs(
    tmp_path, configuration, with_result
):
    """From a new folder, and from one with the checkpoint of an interrupted run of another configuration."""
    for number in itertools.count():
        folder = tmp_path / str(number)
        if with_result:
            finish(RunFolder(folder, CONFIG), "old")
        if configuration:
            checkpoint = RunFolder(folder, configuration).open() / "checkpoint-9"
            checkpoint.mkdir()
            (checkpoint / "weights").write_text("old")
        with killed_at(number) as operations, contextlib.suppress(Killed):
            work = RunFolder(folder, OTHER).open()
        work = RunFolder(folder, OTHER).open()
        assert names(work) == {"run.json"}
        assert not (folder / "in_progress.discarded").exists()
        if len(operations) <= number:
            break
    assert number >= 2


def test_what_a_killed_run_did_not_publish_is_published_before_another_configuration(folder):
    work = RunFolder(folder, CONFIG).open()
    (work / "result.json").write_text(json.dumps({"config": CONFIG, "mark": "old"}))
    work.rename(folder / "in_progress.publishing")
    assert command(folder, OTHER, "new", ("model.safetensors",), overwrite=False)
    (aside,) = (folder / "previous").iterdir()
    assert (result_of(aside)["mark"], result_of(folder)["mark"]) == ("old", "new")


def test_what_an_interrupted_run_of_the_same_configuration_left_is_kept(folder):
    (RunFolder(folder, CONFIG).open() / "checkpoint-1").mkdir()
    assert "checkpoint-1" in names(RunFolder(folder, CONFIG).open())


@pytest.mark.parametrize(("configuration", "overwrite"), [(OTHER, False), (CONFIG, True)])
def test_what_another_configuration_left_is_thrown_away(folder, configuration, overwrite):
    (RunFolder(folder, CONFIG).open() / "checkpoint-1").mkdir()
    work = RunFolder(folder, configuration, overwrite=overwrite).open()
    assert names(work) == {"run.json"}
    assert json.loads((work / "run.json").read_text()) == {"config": configuration, "overwrite": overwrite}


@pytest.mark.parametrize("name", ["notes.txt", "steering.safetensors", "data/rows.json", "checkpoint-9/weights"])
def test_a_foreign_file_is_never_deleted(folder, name):
    finish(RunFolder(folder, CONFIG), "old")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    finish(RunFolder(folder, OTHER), "new")
    assert (folder / name).read_text() == "mine"


def test_a_folder_that_holds_something_else_loses_nothing(folder):
    """As with output_dir=models, whose finetuned/ holds every finetuned run."""
    (folder / "vanilla").mkdir(parents=True)
    (folder / "vanilla" / "precious").write_text("mine")
    try:
        finish(RunFolder(folder, CONFIG), "new")
    except UserError as error:
        assert "output_dir" in str(error)
    assert (folder / "vanilla" / "precious").read_text() == "mine"


def test_a_result_of_the_same_configuration_is_done(folder, caplog):
    caplog.set_level("INFO")
    finish(RunFolder(folder, CONFIG), "new")
    assert RunFolder(folder, CONFIG).is_done()
    assert "the result already exists" in caplog.text


def test_a_stale_result_says_what_changed(folder, caplog):
    caplog.set_level("INFO")
    finish(RunFolder(folder, CONFIG), "new")
    assert not RunFolder(folder, OTHER).is_done()
    assert "method.top_p: 0.9 -> 0.5" in caplog.text


def test_no_folder_is_not_done(folder):
    assert not RunFolder(folder, CONFIG).is_done()


def test_a_file_in_the_place_of_the_folder_is_refused(folder):
    folder.write_text("a file")
    with pytest.raises(UserError, match=re.escape(f"output_dir={folder}: cannot be written to")):
        RunFolder(folder, CONFIG).open()


# --- what a run must not write over -------------------------------------------------------------------------------------


def test_a_run_does_not_write_over_the_model_that_it_reads(folder):
    with pytest.raises(UserError, match="is the model that the run reads"):
        RunFolder(folder, CONFIG, start=str(folder))


def test_a_folder_of_somebody_else_is_refused(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="holds files that no run wrote"):
        RunFolder(folder, CONFIG, overwrite=True).open()
    assert (folder / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["publishing", "discarded", "in_progress"])
def test_folders_of_somebody_else_are_not_touched_whatever_their_names(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "notes.txt").write_text("mine")
    run = RunFolder(folder, CONFIG)
    assert not run.is_done()
    with pytest.raises(UserError, match="holds files that no run wrote"):
        run.open()
    assert (folder / name / "notes.txt").read_text() == "mine"


def test_a_run_without_weights_puts_the_old_ones_aside(folder):
    finish(RunFolder(folder, CONFIG), "old")
    work = RunFolder(folder, OTHER).open()
    (work / "result.json").write_text(json.dumps({"config": OTHER}))
    RunFolder(folder, OTHER).publish()
    assert not (folder / "model.safetensors").exists()
    (aside,) = (folder / "previous").iterdir()
    assert (aside / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_interrupted_redo_of_a_finished_run_goes_on(folder, overwrite):
    finish(RunFolder(folder, CONFIG), "old")
    (RunFolder(folder, CONFIG, overwrite=True).open() / "checkpoint-3").mkdir()
    again = RunFolder(folder, CONFIG, overwrite=overwrite)
    assert not again.is_done()
    assert "checkpoint-3" in names(again.open())


def test_a_first_run_with_overwrite_continues_when_the_same_command_is_started_again(folder):
    for _ in range(2):
        run = RunFolder(folder, CONFIG, overwrite=True)
        assert not run.is_done()
        (run.open() / "checkpoint-3").mkdir(exist_ok=True)
        assert "checkpoint-3" in names(RunFolder(folder, CONFIG, overwrite=True).open())


def test_a_broken_result_is_named(folder):
    folder.mkdir()
    (folder / "result.json").write_text("{")
    with pytest.raises(UserError, match="result.json: not readable"):
        RunFolder(folder, CONFIG).is_done()


def test_another_engine_is_another_run_and_its_other_settings_are_not():
    for engine, kept in {"own": {}, "vllm": {"generation": {"engine": "vllm"}}}.items():
        found = comparable_config(configuration(generation={"engine": engine, "vllm_memory_fraction": 0.5}))
        assert found == comparable_config(configuration()) | kept


def test_a_result_of_another_engine_is_not_that_of_this_configuration(tmp_path):
    for stored in ("own", "vllm"):
        (tmp_path / stored).mkdir()
        identity = comparable_config(configuration(metrics="headline", generation={"engine": stored}))
        write_json(tmp_path / stored / "result.json", {"config": identity})
        for wanted in ("own", "vllm"):
            cfg = configuration(metrics="headline", generation={"engine": wanted})
            assert has_result_of(tmp_path / stored, cfg) == (stored == wanted)


EVALUATED = {
    "data": {"path": "x", "splits": {"train": "all", "forget": "f"}},
    "evaluation": {},
    "model": {"prompt": {}},
}


@pytest.mark.parametrize(
    "changed",
    [
        {"data": EVALUATED["data"] | {"columns": {"question": "q2"}}},
        {"data": EVALUATED["data"] | {"windows": {"words": 8}}},
        {"files": {"forget": "another digest"}},
    ],
)
def test_other_columns_windows_or_files_are_not_the_same_evaluation(changed):
    recorded = EVALUATED | {"files": {"forget": "digest"}}
    assert differing_inputs([recorded, recorded | changed])
    assert not differing_inputs([recorded, EVALUATED]), "not recorded by an older version"
    further = {"columns": {"entity": "answer"}, "splits": EVALUATED["data"]["splits"] | {"holdout": "h"}}
    assert not differing_inputs([recorded, recorded | {"data": EVALUATED["data"] | further}]), "of other scores"


def test_answers_of_another_engine_are_not_the_same_evaluation():
    values = EVALUATED
    own, vllm = (evaluation_inputs(values | kept) for kept in ({}, {"generation": {"engine": "vllm"}}))
    assert own["generation.engine"] == "own"
    assert vllm["generation.engine"] == "vllm"


@pytest.mark.parametrize("key", ["lm_eval.include_path", "model.tokenizer"])
def test_a_changed_file_in_a_folder_of_tasks_or_of_a_tokenizer_makes_a_result_stale(tmp_path, key):
    section, _, name = key.partition(".")
    file = tmp_path / "tokenizer.json"
    file.write_text("1")
    plain = {section: {name: str(tmp_path)}}
    before = digests_of_files(plain)[key]
    (tmp_path / "model.safetensors").write_text("weights")
    assert (digests_of_files(plain)[key] == before) == (key == "model.tokenizer"), "weights are no part of a tokenizer"
    file.write_text("2")
    assert digests_of_files(plain)[key] != before
