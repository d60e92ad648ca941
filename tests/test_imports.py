"""Imports go one way, and no module of ours shadows a library."""

import ast
import functools
import re
import sys
from importlib.metadata import packages_distributions

import pytest

from common.files import ROOT

OURS = ("benchmarks", "common", "finetuning", "unlearning", "evaluation")
MODULES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imported(source: str) -> set[str]:
    """The full names of the modules that a source imports, imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: a stage's folder is no package when its main.py runs"
            found.add(node.module)
    return found


def packages_of_ours(path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path.read_text(encoding="utf-8"))} & set(OURS)


def allowed(path) -> set[str]:
    package = path.relative_to(ROOT).parts[0]
    if package == "benchmarks":
        return {"common", "unlearning", "evaluation", package}
    if package in ("finetuning", "unlearning") and path.name == "main.py":
        return {"common", "evaluation", package}
    return {"common", package}


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_lies_below_it(path):
    assert packages_of_ours(path) <= allowed(path)


def test_every_package_is_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(OURS)
    assert packages_of_ours(ROOT / "unlearning" / "main.py") == {"common", "evaluation", "unlearning"}


def test_imports_are_found_wherever_they_stand():
    source = "import a.b as c\nfrom d.e import f\ndef g():\n    from h import i\nif j:\n    import k, l\n"
    assert imported(source) == {"a.b", "d.e", "h", "k", "l"}


@functools.cache
def required_names() -> set[str]:
    """Top-level import names of everything that is installed, with what requirements.txt names."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    named = {name.replace("-", "_").lower() for name in re.findall(r"^([\w-]+)==", requirements, re.MULTILINE)}
    return {name for name in packages_distributions() if name not in OURS} | named


def test_the_libraries_that_matter_are_known():
    needed = {"datasets", "tokenizers", "accelerate", "peft", "torch", "transformers", "hydra", "omegaconf", "numpy"}
    assert needed <= required_names()


# Not installed, but looked for by libraries that are: a module of ours would be taken for them.
LOOKED_FOR = {
    "evaluate",
    "wandb",
    "trackio",
    "deepspeed",
    "vllm",
    "bitsandbytes",
    "flash_attn",
    "sklearn",
    "ray",
    "submitit",
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_shadows_no_library(path):
    """`python main.py` puts the stage's folder first on sys.path."""
    if path.stem in ("__init__", "main"):
        return
    assert path.stem not in sys.stdlib_module_names | required_names() | LOOKED_FOR
    assert path.stem not in OURS


def test_no_package_of_ours_shadows_a_library():
    """The repository's root is on sys.path."""
    assert not set(OURS) & (sys.stdlib_module_names | required_names() | LOOKED_FOR)


def test_stages_reach_the_recipes_from_their_own_folder():
    for stage in ("finetuning", "unlearning", "evaluation"):
        link = ROOT / stage / "configs"
        assert link.is_symlink()
        assert link.readlink().as_posix() == "../configs"
        assert (link / "run.yaml").is_file()
