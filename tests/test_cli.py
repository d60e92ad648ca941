"""The process around a run: environment and tokens, files that appear whole, errors that a user can mend."""

import errno
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException, MissingConfigException

from common import cli, hardware, results
from common.cli import allow_new_key, launch, prepare_process
from common.errors import Interrupted, UserError, did_you_mean, full_disk_as_user_error
from common.files import (
    ROOT,
    looks_local,
    read_json,
    read_json_lines,
    resolve_path,
    write_json,
    write_json_lines,
    write_text,
)
from common.hardware import suitable_threads
from common.results import git_commit, package_versions, write_result
from evaluation.scores import Scores

TOKEN = "hf_" + "s3cret" * 5

# --- environment --------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """`environment(text, **values)` is what prepare_process makes of an environment.env and a process environment."""

    def prepared(text: str = "", **values: str) -> dict[str, str]:
        (tmp_path / "environment.env").write_text(text)
        monkeypatch.setattr("common.cli.ROOT", tmp_path)
        monkeypatch.setattr(os, "environ", dict(values))
        prepare_process()
        return os.environ

    return prepared


def test_nothing_is_set_when_no_token_is_given(environment):
    found = environment((ROOT / "environment.env").read_text())
    secrets = {name for name in found if "TOKEN" in name.split("_") or "KEY" in name.split("_")}
    assert secrets == set()
    assert "WANDB_MODE" not in found


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {"HUGGINGFACE_LOGIN_TOKEN": TOKEN}),
        (f"HUGGINGFACE_LOGIN_TOKEN={TOKEN}\n", {}),
        ("HUGGINGFACE_LOGIN_TOKEN=another\n", {"HUGGINGFACE_LOGIN_TOKEN": TOKEN}),  # the environment wins
        ("", {"HUGGINGFACE_LOGIN_TOKEN": "another", "HF_TOKEN": TOKEN}),
    ],
)
def test_the_token_reaches_hugging_face(environment, text, values):
    assert environment(text, **values)["HF_TOKEN"] == TOKEN


def test_an_empty_token_is_none(environment):
    found = environment("WANDB_API_KEY=\n", HUGGINGFACE_LOGIN_TOKEN="")
    assert not {"HF_TOKEN", "HUGGINGFACE_LOGIN_TOKEN", "WANDB_API_KEY"} & set(found)


def test_without_an_environment_file_nothing_fails(environment, tmp_path):
    environment(A="1")
    (tmp_path / "environment.env").unlink()
    prepare_process()
    assert os.environ["A"] == "1"


def test_the_repository_is_named_to_the_configuration(environment, tmp_path):
    assert environment()["PMC_ROOT"] == str(tmp_path)


def test_the_environment_file_in_the_repository_holds_no_token():
    lines = [line for line in (ROOT / "environment.env").read_text().splitlines() if "=" in line and line[0] != "#"]
    values = dict(line.split("=", 1) for line in lines)
    assert {name for name, value in values.items() if value} == {"WANDB_PROJECT"}
    assert {"HUGGINGFACE_LOGIN_TOKEN", "WANDB_API_KEY"} <= set(values)


# --- threads ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_threads(monkeypatch):
    """PyTorch with three threads, which nobody asked for by OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("parameters", "threads"), [(1_999_999, 1), (2_000_000, 3)])
def test_a_tiny_model_runs_on_one_thread(three_threads, parameters, threads):
    model = torch.nn.Embedding(parameters, 1)
    with suitable_threads(model):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError, match="half-way"), suitable_threads(model):
        raise RuntimeError("half-way")
    assert torch.get_num_threads() == 3


def test_the_users_number_of_threads_is_kept(three_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with suitable_threads(torch.nn.Linear(2, 2)):
        assert torch.get_num_threads() == 3


# --- paths and words ----------------------------------------------------------------------------------------------------


def test_a_path_is_looked_for_in_the_working_folder_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("data/tiny") == str(ROOT / "data" / "tiny")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    assert resolve_path("data/tiny") == str(tmp_path / "data" / "tiny")


def test_a_hub_id_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("microsoft/phi-1_5") == "microsoft/phi-1_5"


def test_a_path_in_the_home_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "tofu").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/tofu") == str(tmp_path / "tofu")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        *[("./x", True), ("../x/y", True), ("/a/b", True), ("~/x", True), ("models/x", True), ("a/b/c", True)],
        *[("x", True), ("locuslab/TOFU", False), ("meta-llama/Llama-3.2-3B-Instruct", False)],
    ],
)
def test_a_folder_is_told_from_a_hub_id(path, local):
    assert looks_local(path) is local


def test_the_closest_word_is_suggested():
    assert did_you_mean("tempreture", ["top_p", "temperature"]) == "; did you mean 'temperature'?"
    assert did_you_mean("zzz", ["top_p", "temperature"]) == ""


# --- files --------------------------------------------------------------------------------------------------------------


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_written_and_replaced(tmp_path):
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "né\n")
    assert (tmp_path / "a").read_bytes() == "né\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("where", ["fsync", "write", "replace"])
def test_the_old_file_stays_whole_when_writing_fails(tmp_path, monkeypatch, where):
    file = tmp_path / "a"
    write_text(file, "old")
    text = "new"
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif where == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        text = "new \ud800"  # cannot be encoded
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_text(file, text)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_json_is_read_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "é": "“x”\n"}
    write_json(tmp_path / "a", value)
    assert read_json(tmp_path / "a") == value


@pytest.mark.parametrize("text", ["plain", "two\nlines", "\u2028 and \u2029", "next\x85line", "\x0b\x0c\x1c", "日本"])
def test_json_lines_are_read_back(tmp_path, text):
    """Whatever a model generates: only a newline separates rows."""
    rows = [{"answer": text}, {"answer": "second"}]
    write_json_lines(tmp_path / "a", rows)
    assert read_json_lines(tmp_path / "a") == rows


def test_one_json_line_a_row(tmp_path):
    write_json_lines(tmp_path / "a", [{"x": "1\n2"}, {"x": 2}])
    assert (tmp_path / "a").read_text() == '{"x": "1\\n2"}\n{"x": 2}\n'


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_called_so(error):
    with (
        pytest.raises(UserError, match=r"/models: no space left.*save_model=false") as caught,
        full_disk_as_user_error("/models"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyError("x"), UserError("mine")])
def test_other_errors_are_not_called_a_full_disk(error):
    with pytest.raises(type(error)) as caught, full_disk_as_user_error("/models"):
        raise error
    assert caught.value is error


# --- what a result records ----------------------------------------------------------------------------------------------


def test_versions_are_recorded():
    found = package_versions()
    assert found["python"] == platform.python_version()
    assert {name: found[name] for name in ("torch", "transformers")} == {
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    assert set(found) <= {"python", *results.RECORDED_PACKAGES}


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(results, "RECORDED_PACKAGES", ("torch", "no-such-package"))
    assert set(package_versions()) == {"python", "torch"}


def test_no_token_is_in_a_result(tmp_path, monkeypatch):
    for name in ("HUGGINGFACE_LOGIN_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    write_result(tmp_path, Scores({"utility": 50.0}, generations=[{"answer": "a"}]), {"seed": 0}, {"evaluation": 1.0})
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"scores", "versions", "git_commit", "device", "peak_memory_bytes", "config", "id"} <= set(result)
    assert not [path for path in tmp_path.iterdir() if TOKEN in path.read_text()]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit, in the place of this one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "commit.gpgsign=false", "commit", "-m", "one")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path, git("rev-parse", "HEAD")


def test_the_commit_of_a_clean_checkout(repository):
    folder, commit = repository
    (folder / "untracked").write_text("x")
    assert len(commit) == 40
    assert git_commit() == commit


def test_the_commit_of_a_changed_checkout_is_marked(repository):
    folder, commit = repository
    (folder / "file").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_there_is_no_commit_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert git_commit() is None


def test_there_is_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


# --- the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def exit_of(monkeypatch):
    """What `launch` exits with when the stage raises an error."""
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def launched(error: BaseException):
        def main():
            raise error

        with pytest.raises(SystemExit) as caught:
            launch(main)
        return caught.value.code

    return launched


def test_a_users_error_is_printed_without_a_traceback(exit_of):
    assert exit_of(UserError("model.path=x: no such folder")) == "\nError: model.path=x: no such folder"


def test_a_missing_recipe_lists_the_recipes(exit_of):
    message = exit_of(MissingConfigException("Cannot find primary config 'tinny'"))
    assert "Cannot find primary config 'tinny'" in message
    assert "PMC-unlearn-tiny" in message


def test_ctrl_c_and_a_stop_signal_have_their_exit_codes(exit_of):
    assert exit_of(KeyboardInterrupt()) == 130
    assert exit_of(Interrupted(15)) == 143


def could_not_override(key: str) -> ConfigCompositionException:
    return ConfigCompositionException(f"Could not override '{key}'.\nTo append to your config use +{key}=1")


def test_a_mistyped_override_is_explained_with_the_closest_key(exit_of):
    message = exit_of(could_not_override("method.lamda_unlearning"))
    assert "no key 'method.lamda_unlearning'" in message
    assert "did you mean 'method.lambda_unlearning'?" in message


@pytest.mark.parametrize(
    ("typed", "passed_on"),
    [
        ("training.max_grad_norm=1", "++training.max_grad_norm=1"),
        ("model.revision=main", "++model.revision=main"),
        ("+training.fp16=true", "+training.fp16=true"),
        ("model=phi", "model=phi"),
        ("seed=1", "seed=1"),
        ("-cn=tiny", "-cn=tiny"),
    ],
)
def test_a_key_that_no_file_sets_needs_no_plus(typed, passed_on):
    """Hydra wants a plus before what the recipe does not have; what is mistyped is refused by the schema."""
    assert allow_new_key(typed) == passed_on


def test_other_errors_keep_their_traceback(monkeypatch):
    def main():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError):
        launch(main)


@pytest.mark.parametrize(
    ("seconds_bf16", "supported", "expected"), [(0.5, True, True), (2.0, True, False), (0.5, False, False)]
)
def test_bf16_is_chosen_on_a_cpu_that_is_faster_with_it(monkeypatch, seconds_bf16, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seconds = {torch.float32: 1.0, torch.bfloat16: seconds_bf16}
    monkeypatch.setattr(hardware, "seconds_of_a_product", lambda *dtypes: {dtype: seconds[dtype] for dtype in dtypes})
    assert hardware.has_fast_bf16.__wrapped__() == expected


def test_products_of_each_type_are_timed():
    seconds = hardware.seconds_of_a_product(torch.float32, torch.bfloat16)
    assert set(seconds) == {torch.float32, torch.bfloat16}
    assert all(0 < value < 10 for value in seconds.values())
