"""The README tells the truth: its commands compose, its make targets exist, its file tree and recipes are those on disk."""

import re
import shlex
import textwrap

import pytest
from hydra import compose, initialize_config_dir

from common.cli import allow_new_key
from common.files import CONFIGS, ROOT, read_json_lines
from tests.helpers import run_stage

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    command.strip()
    for line in README.splitlines()
    if line.startswith("    ")
    for command in line.split("&&")
    if re.match(r"\s*python \S*\.py", command)
]


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command, monkeypatch):
    monkeypatch.setenv("PMC_ROOT", str(ROOT))
    words = shlex.split(command, comments=True)
    recipe = next(word.removeprefix("-cn=") for word in words if word.startswith("-cn="))
    overrides = [allow_new_key(word.split(",")[0]) for word in words[2:] if not word.startswith("-")]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        compose(recipe, overrides=overrides)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([a-z0-9]+)", README))
    assert named >= {"demo", "test", "smollm2"}
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_file_tree_names_every_module():
    tree = README.split("## How it is built")[1].split("\n## ")[0]
    modules = [
        path
        for stage in ("benchmarks", "common", "finetuning", "unlearning", "evaluation")
        for path in (ROOT / stage).glob("*.py")
    ]
    assert [str(path) for path in modules if path.name != "__init__.py" and path.name not in tree] == []
    named = re.findall(r"\b([a-z_]+\.py)\b", tree)
    assert [name for name in named if not any(path.name == name for path in modules)] == []


def test_the_method_of_the_readme_runs(models_dir, tmp_path):
    """The blocks of "Extend it", saved as it says and run from their folder."""
    section = README.split("## Extend it")[1].split("- **A data set**")[0]
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^ {6}.*\n|^\n(?= {6}))+", section, re.MULTILINE)]
    code, config = (block for block in blocks if block.strip())
    assert len([line for line in (code + config).splitlines() if line.strip()]) <= 10
    (tmp_path / "entropy.py").write_text(code)
    (tmp_path / "method").mkdir()
    (tmp_path / "method/entropy.yaml").write_text(config)
    (command,) = re.findall(r"`PYTHONPATH=\. python REPOSITORY/unlearning/main\.py (.*)`", section)
    quick = [
        f"models_dir={models_dir}",
        "training.num_epochs=3",
        "evaluation.start=false",
        f"output_dir={tmp_path}/run",
    ]
    run_stage("unlearning", *shlex.split(command), *quick, cwd=tmp_path, PYTHONPATH=".")
    losses = [record["forget_loss"] for record in read_json_lines(tmp_path / "run/history.jsonl")]
    assert losses[-1] < losses[0] < 0, "minus the entropy falls"


def test_every_recipe_is_in_the_table():
    stages = {"finetune", "unlearn", "evaluate", "run", "benchmark", "pretrain-tiny"}
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")} - stages
    assert [name for name in recipes if f"`{name}`" not in README] == []
