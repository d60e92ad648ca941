"""The README tells the truth: its commands compose, its make targets exist, its file tree and recipes are those on disk."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from common.runtime import CONFIGS, ROOT

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
    overrides = [word.split(",")[0] for word in words[2:] if not word.startswith("-")]
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
    named = re.findall(r"^ {6}([a-z_]+\.py)", tree, re.MULTILINE)
    assert [name for name in named if not any(path.name == name for path in modules)] == []


def test_every_recipe_is_in_the_table():
    stages = {"finetune", "unlearn", "evaluate", "run", "benchmark", "pretrain-tiny"}
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")} - stages
    assert [name for name in recipes if f"`{name}`" not in README] == []
