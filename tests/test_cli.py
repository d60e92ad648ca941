"""The process around a run: environment and tokens, errors of the command line, mistyped overrides."""

import ast
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from common import cli
from common.cli import (
    allow_new_key,
    check_words,
    job_errors,
    launch,
    prepare_process,
    program_help,
    replace_mapping,
    user_message,
)
from common.errors import Interrupted, UserError
from common.files import CONFIGS, ROOT
from common.recipes import PROGRAMS, program_of, recipes_of
from common.redaction import secret_in, without_secrets
from tests.helpers import TOKEN, run_stage

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

    def launched(error: BaseException, module: str = __name__):
        def main():
            raise error

        main.__module__ = importlib.import_module(module).__name__
        with pytest.raises(SystemExit) as caught:
            launch(main)
        return caught.value.code

    return launched


def test_a_users_error_is_printed_without_a_traceback(exit_of):
    assert exit_of(UserError("model.path=x: no such folder")) == "\nError: model.path=x: no such folder"


def no_recipe(name: str) -> MissingConfigException:
    return MissingConfigException(f"Cannot find primary config '{name}'. Check ...", missing_cfg_file=name)


def test_a_mistyped_recipe_is_explained_with_those_of_the_stage_alone(exit_of, monkeypatch):
    monkeypatch.setattr("sys.argv", ["unlearning/main.py", "-cn=PMC-unlern-tiny"])
    message = exit_of(no_recipe("PMC-unlern-tiny"), "unlearning.main")
    first, second = message.strip().splitlines()
    assert first == "Error: -cn=PMC-unlern-tiny: no such recipe; did you mean 'PMC-unlearn-tiny'?"
    assert second.startswith("Recipes of unlearning/main.py: ")
    names = second.partition(": ")[2].split(", ")
    assert {"PMC-unlearn-tiny", "unlearn-phi"} <= set(names)
    assert not {"tiny", "run", "evaluate", "benchmark/tiny", "compare/tiny", "data/tiny"} & set(names)


@pytest.mark.parametrize("words", [["-cd={}"], ["--config-dir", "{}"], ["-cp={}"]])
def test_a_mistyped_recipe_of_a_users_folder_is_suggested(exit_of, monkeypatch, tmp_path, words):
    (tmp_path / "mine.yaml").write_text("defaults:\n  - /PMC-unlearn-tiny\n  - _self_\n")
    (tmp_path / "own.yaml").write_text("defaults:\n  - run\n  - override /method@method: npo\n")
    for name in ("run", "PMC-unlearn-tiny"):  # with -cp, the user's folder is the only one
        (tmp_path / f"{name}.yaml").write_text("defaults: [run]\nmethod: {}\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    monkeypatch.setattr("sys.argv", ["main.py", *(word.format(tmp_path) for word in words), "-cn=minne"])
    message = exit_of(no_recipe("minne"), "unlearning.main")
    assert "did you mean 'mine'?" in message
    assert message.count("mine") == 2
    assert "own" in message
    assert "broken" not in message


def test_a_mistyped_file_of_a_group_is_explained_with_the_files_of_the_group(exit_of):
    with pytest.raises(MissingConfigException) as caught, initialize_config_dir(str(CONFIGS), version_base=None):
        compose("unlearn-tiny", overrides=["method=npoo"])
    message = exit_of(caught.value, "unlearning.main").strip().splitlines()
    assert message[0].endswith("Could not find 'method/npoo'; did you mean 'npo'?")
    assert message[1].startswith("Expected one of altpo, ")
    assert len(message) == 2


PROGRAM_PATHS = ["finetuning/main.py", *PROGRAMS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAM_PATHS)
def test_recipes_belong_to_the_program_that_takes_them_composed(program, monkeypatch):
    monkeypatch.setenv("PMC_ROOT", str(ROOT))
    recipes = recipes_of(program)
    assert recipes
    for name, description in recipes.items():
        with initialize_config_dir(str(CONFIGS), version_base=None):
            assert program_of(compose(name)) == program
        assert description[0].isupper()
        assert "python" not in description


def test_every_file_but_the_shared_ones_is_a_recipe_of_one_program():
    found = [name for program in PROGRAM_PATHS for name in recipes_of(program)]
    files = [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("benchmark/*.yaml"), *CONFIGS.glob("compare/*.yaml")]
    names = [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in files]
    assert sorted(found) == sorted(set(names) - {"run", "benchmark/default"})


@pytest.mark.parametrize("program", PROGRAM_PATHS)
def test_help_says_what_the_program_does_with_commands_and_recipes(program):
    docstring = ast.get_docstring(ast.parse((ROOT / program).read_text(encoding="utf-8")))
    assert docstring.count(f"\n    python {program} ") == 3
    text = program_help(program, docstring)
    assert text.startswith(docstring)
    assert [name for name in recipes_of(program) if f"\n  {name} " not in text] == []


@pytest.mark.slow
def test_help_comes_before_the_configuration_of_the_recipe():
    output = run_stage("unlearning", "--help", "-cn=unlearn-tiny", "method=npo").stdout
    parts = [
        "Unlearn the forget rows",
        "python unlearning/main.py",
        "PMC-unlearn-tiny ",
        "method: altpo",
        "NPO\n",
        "--hydra-help",
    ]
    assert sorted(parts, key=output.index) == parts


def test_ctrl_c_and_a_stop_signal_have_their_exit_codes(exit_of):
    assert exit_of(KeyboardInterrupt()) == 130
    assert exit_of(Interrupted(15)) == 143


def could_not_override(key: str) -> ConfigCompositionException:
    return ConfigCompositionException(f"Could not override '{key}'.\nTo append to your config use +{key}=1")


def test_a_mistyped_override_is_explained_with_the_closest_key(exit_of):
    message = exit_of(could_not_override("method.lamda_unlearning"))
    assert "no key 'method.lamda_unlearning'" in message
    assert "did you mean 'method.lambda_unlearning'?" in message


def test_a_list_in_place_of_a_mapping_is_explained(exit_of):
    message = exit_of(ConfigCompositionException("Error merging override models=[a,b]"))
    assert "models=[a,b]: the recipe has a value of another kind for this key, such as a mapping" in message


def test_a_renamed_override_is_explained_with_its_new_name(exit_of):
    assert "did you mean 'benchmark.interleaved'?" in exit_of(could_not_override("benchmark.side_by_side"))


def test_a_key_of_other_recipes_is_not_suggested_to_itself(exit_of):
    assert exit_of(could_not_override("comparison.seeds")) == "\nError: no key 'comparison.seeds' in this configuration"


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [
        ("++data.splits.forget=forget[:4]", "'data.splits.forget=\"forget[:4]\"'"),
        ("output_dir=/a=b", "'output_dir=\"/a=b\"'"),
        ("output_dir=/runs (new)", "'output_dir=\"/runs (new)\"'"),
    ],
)
def test_an_override_that_needs_quotes_is_shown_with_them(exit_of, typed, quoted):
    with pytest.raises(OverrideParseException) as caught:
        OverridesParser.create().parse_overrides([typed])
    message = exit_of(caught.value)
    assert message.startswith(f"\nError: {typed.removeprefix('++')}: ")
    assert message.endswith(f": {quoted}")
    (override,) = OverridesParser.create().parse_overrides(shlex.split(quoted))
    assert f"{override.key_or_group}={override.value()}" == typed.removeprefix("++")


@pytest.mark.parametrize("typed", ["model.lora={r", "a b"])
def test_an_override_that_quotes_do_not_mend_gets_none(exit_of, typed):
    with pytest.raises(OverrideParseException) as caught:
        OverridesParser.create().parse_overrides([typed])
    message = exit_of(caught.value)
    assert message.startswith(f"\nError: {typed}: ")
    assert "quote the value" not in message


def test_a_job_that_fails_on_a_users_error_exits_with_its_message(tmp_path):
    """Hydra prints all overrides for an exception that leaves a job, not for an exit."""
    with pytest.raises(SystemExit) as caught, job_errors(tmp_path):
        raise UserError("x=1: wrong")
    assert caught.value.code == "\nError: x=1: wrong"
    with pytest.raises(ZeroDivisionError), job_errors(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("word", "named"),
    [
        (f"training.hub_token={TOKEN}", "training.hub_token:"),
        ("+training.push_to_hub_token=a-secret,b-secret", "training.push_to_hub_token:"),  # a sweep
        ("training={num_epochs:1,hub_token:a-secret}", "hub_token:"),
        ("method.judge.api_key=a-secret", "method.judge.api_key:"),
        ("hydra.job.env_set.HF_TOKEN=a-secret", "hydra.job.env_set.HF_TOKEN:"),
        (f"model.path=https://user:{TOKEN}@host/x", "user:password@:"),
        (f"model.path={TOKEN}", "hf_...:"),
    ],
)
def test_a_secret_is_refused_before_hydra_sees_it_and_not_repeated(monkeypatch, word, named):
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["main.py", "-m", word])
    with pytest.raises(SystemExit) as caught:
        launch(lambda: pytest.fail("Hydra was called"))
    assert caught.value.code.startswith(f"\nError: {named} a secret on the command line")
    assert TOKEN not in caught.value.code
    assert "a-secret" not in caught.value.code


@pytest.mark.parametrize(
    "word",
    [
        *("method.judge.api_key=${oc.env:JUDGE_KEY}", "training.hub_token=null", "training={hub_token: null,seed:1}"),
        *("training.include_num_input_tokens_seen=true", "model.new.tokenizer_splits=[full]", "metrics=[prefill]"),
        *(
            "+model.new.settings={eos_token_id:1}",
            'model.prompt.question="The secret: {question}"',
            "model.path=hf_x/y",
            "finetuned=models/finetuned/tiny/sk-experiment-long-name-0",
            "data.path=sk-news-translated-questions-2024",
            "data.path=https://user@host/rows",
        ),
    ],
)
def test_other_words_are_no_secrets(word):
    check_words([word])


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("hydra.job.env_set.AWS_SECRET_ACCESS_KEY=x", "AWS_SECRET_ACCESS_KEY"),
        ("+training.wandb_key=x", "wandb_key"),
        ("x.apikey=x", "apikey"),
        ("data.path=https://me:pass@host/x", "user:password@"),
        ("x=github_pat_" + "a" * 30, "git"),
        ("x=sk-Ab1" + "a" * 30, "sk-"),
        ("data.path=https://" + "a" * 30 + "@host/x", "aaa"),
        ("x.openai_key=x", "openai_key"),
    ],
)
def test_secrets_of_other_services_are_refused(word, named):
    assert named in secret_in(word)
    assert ":pass" not in str(without_secrets([word])) and "a" * 30 not in str(without_secrets([word]))


def test_showing_the_configuration_of_a_sweep_is_refused_without_a_traceback():
    error = ValueError("Only one of --run, --multirun, --app_help, --config and --shell_completion can be specified")
    assert "leave out -m" in user_message(error)


def test_secrets_are_masked_at_any_depth():
    values = {"a": [{"api_key": "abc"}, f"token {TOKEN}!"], "num_tokens": 3, "hub_token": None, "path": "hf_x/y"}
    assert without_secrets(values) == values | {"a": [{"api_key": "***"}, "token ***!"]}


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


def test_a_reader_that_ends_early_is_no_error(monkeypatch):
    """As in `--help | head`: what is printed at the exit goes nowhere."""

    def main():
        raise BrokenPipeError

    moved = []
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    monkeypatch.setattr(cli.sys, "stdout", SimpleNamespace(fileno=lambda: 77))
    monkeypatch.setattr(cli.os, "dup2", lambda source, target: moved.append(target))
    with pytest.raises(SystemExit) as ended:
        launch(main)
    assert (ended.value.code, moved) == (141, [77])


@pytest.mark.parametrize("program", ["finetuning/main.py", "unlearning/main.py", "evaluation/main.py"])
def test_ctrl_c_while_importing_has_no_traceback(program):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / program), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    assert process.returncode != 0


def test_ctrl_c_in_a_destructor_still_ends_the_program():
    code = """
import signal, sys, time
import common.interrupts

class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
Slow()
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0, done.stderr) == (True, "")


def test_a_mapping_on_the_command_line_replaces_the_recipe_s(monkeypatch):
    cfg = OmegaConf.create({"model": {"new": {"settings": {"hidden_size": 64, "rope_theta": 1.0, "n_embd": 8}}}})
    words = ["seed=1", "++model.new.settings={n_embd:8}"]
    monkeypatch.setattr(cli, "typed_overrides", lambda: words)
    replace_mapping(cfg, "model.new.settings")
    assert cfg.model.new.settings == {"n_embd": 8}
    words[1] = "++model.new.settings.n_embd=16"  # a single key is set, and the others stay
    cfg.model.new.settings = {"n_embd": 16, "n_head": 2}
    replace_mapping(cfg, "model.new.settings")
    assert cfg.model.new.settings == {"n_embd": 16, "n_head": 2}
