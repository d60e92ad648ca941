"""The process around a run: environment and tokens, errors of the command line, mistyped overrides."""

import os

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException

from common import cli
from common.cli import allow_new_key, launch, prepare_process
from common.errors import Interrupted, UserError
from common.files import ROOT
from tests.helpers import TOKEN

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


def test_a_renamed_override_is_explained_with_its_new_name(exit_of):
    assert "did you mean 'benchmark.interleaved'?" in exit_of(could_not_override("benchmark.side_by_side"))


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
