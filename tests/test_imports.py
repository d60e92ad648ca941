"""Imports go one way, no module of ours shadows a library, and nothing of ours need be installed."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement

from common.files import ROOT
from tests.helpers import run_imported

OURS = ("benchmarks", "common", "evaluation", "finetuning", "generation", "scripts", "unlearning")
PLUGINS = "hydra_plugins"  # the package in which Hydra looks; launchers install into it as well
MODULES = sorted(path for package in (*OURS, PLUGINS) for path in (ROOT / package).rglob("*.py"))


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


# scripts, benchmarks -> a stage's main -> unlearning, evaluation -> generation -> common
BELOW = {
    "common": set(),
    "generation": {"common"},
    "unlearning": {"common", "generation"},
    "evaluation": {"common", "generation"},
    "finetuning": {"common", "generation"},
    "benchmarks": {"common", "generation", "unlearning", "evaluation", "finetuning"},
    PLUGINS: {"common"},
    "scripts": {"common", "generation", "unlearning", "evaluation", "finetuning"},
}


def allowed(path) -> set[str]:
    package = path.relative_to(ROOT).parts[0]
    scores_its_run = package in ("finetuning", "unlearning") and path.name == "main.py"
    return BELOW[package] | {package} | ({"evaluation"} if scores_its_run else set())


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_lies_below_it(path):
    assert packages_of_ours(path) <= allowed(path)


def test_every_package_is_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == {*OURS, PLUGINS}
    assert {path.parent.name for path in MODULES} == {*OURS, PLUGINS, "methods", "metrics"}
    assert packages_of_ours(ROOT / "unlearning" / "main.py") == {"common", "evaluation", "generation", "unlearning"}


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
    """Python puts a script's folder first on sys.path; the script's first lines, or `import main` there, find that."""
    if path.stem in ("__init__", "main"):
        return
    assert path.stem not in sys.stdlib_module_names | required_names() | LOOKED_FOR
    assert path.stem not in OURS


def test_no_package_of_ours_shadows_a_library():
    """The repository's root is first on sys.path."""
    assert not set(OURS) & (sys.stdlib_module_names | required_names() | LOOKED_FOR)


def test_stages_reach_the_recipes_from_their_own_folder():
    for stage in ("finetuning", "unlearning", "evaluation"):
        link = ROOT / stage / "configs"
        assert link.is_symlink()
        assert link.readlink().as_posix() == "../configs"
        assert (link / "run.yaml").is_file()


# --- nothing of ours is installed ---------------------------------------------------------------------------------------


def sets_the_path(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "sys.path[0] = str(Path(__file__).resolve().parents[1])" in ast.unparse(node)


def is_script(path) -> bool:
    return "__main__" in path.read_text(encoding="utf-8") and bool(packages_of_ours(path))


SCRIPTS = [path for path in MODULES if is_script(path)]


def test_every_stage_is_a_script():
    assert {ROOT / stage / "main.py" for stage in ("finetuning", "unlearning", "evaluation")} <= set(SCRIPTS)
    assert {path.parent.name for path in SCRIPTS} >= {"benchmarks", "scripts"}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_sets_the_path_before_it_imports_ours(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    first = next((i for i, node in enumerate(body) if sets_the_path(node)), len(body))
    assert first < len(body)
    assert imported(ast.unparse(ast.Module(body[:first], []))) == {"sys", "pathlib"}
    assert "import common.interrupts" in ast.unparse(body[first]), "Ctrl-C during the other imports"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_starts_in_any_folder(path, tmp_path):
    (done,) = run_imported(path, [str(path), "--help"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage" in done.stdout.lower() or "--hydra-help" in done.stdout


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def test_installing_the_project_installs_none_of_our_packages():
    """They are called unlearning, evaluation, common ...: names that others may use as well."""
    assert pyproject()["tool"]["setuptools"] == {"packages": []}


def test_every_dependency_is_pinned_and_every_pin_is_a_dependency():
    product, separator, tests = (
        (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# tests and linters\n")
    )
    assert separator
    needed = {wanted.name: wanted for wanted in map(Requirement, pyproject()["project"]["dependencies"])}
    pinned = pins(product)
    assert set(pinned) == set(needed)
    assert [name for name, version in pinned.items() if version not in needed[name].specifier] == []
    for text in (product, tests):
        assert len(pins(text)) == sum(bool(line) and not line.startswith("#") for line in text.splitlines())
