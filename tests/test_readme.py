"""The README and docs/ tell the truth: commands compose, targets, modules, recipes and links are those on disk."""

import re
import shlex
from typing import Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from pydantic import Field, PositiveFloat

from common.cli import allow_new_key
from common.config import section
from common.files import CONFIGS, ROOT, read_json_lines
from common.run_names import run_name
from evaluation import report
from tests.helpers import docs_generator, make_trainer, run_stage
from unlearning.pmc_options import PMCSettings

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
SCRIPTS = [f"scripts/{name}.py" for name in ("plot_curves", "plot_ablations", "convert_gguf", "make_embedded_data")]
PACKAGES = ("benchmarks", "common", "evaluation", "finetuning", "generation", "hydra_plugins", "scripts", "unlearning")


def commands_of(text: str) -> list[str]:
    """The commands in indented blocks that run one of our scripts."""
    return [
        command.strip()
        for line in text.splitlines()
        if line.startswith("    ")
        for command in line.split("&&")
        if re.match(r"\s*(python|torchrun)\b.* ?\S*\.py\b", command)
    ]


COMMANDS = list(dict.fromkeys(command for text in PAGES.values() for command in commands_of(text)))


def test_there_are_commands():
    assert len(commands_of(README)) >= 6
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command, monkeypatch):
    monkeypatch.setenv("PMC_ROOT", str(ROOT))
    words = shlex.split(command, comments=True)
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    recipe = next((word.removeprefix("-cn=") for word in words if word.startswith("-cn=")), None)
    if words[script] == "evaluation/chat.py":
        recipe = recipe or "chat"
    if words[script] == "evaluation/report.py":
        assert report.argument_parser().parse_args(words[script + 1 :]).folders
        return
    if recipe is None:  # the scripts without a configuration
        assert words[script] in SCRIPTS
        return
    overrides = [word for word in words[script + 1 :] if not word.startswith("-")]
    if "hydra/launcher=ray" in overrides:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    overrides = [allow_new_key(of_first_job(word)) for word in overrides]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        compose(recipe, overrides=overrides)


def of_first_job(word: str) -> str:
    """An override with its first value, if a sweep has several."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={first}"


@pytest.mark.parametrize("page", PAGES)
def test_a_finetuned_folder_is_the_one_that_finetuning_writes(page):
    """`finetuned=...` with overrides in its name follows a finetuning command of the page with these overrides."""
    written = set()
    for command in commands_of(PAGES[page]):
        _, script, *words = shlex.split(command, comments=True)
        if script == "finetuning/main.py":
            recipe = next(word.removeprefix("-cn=") for word in words if word.startswith("-cn="))
            overrides = [word for word in words if not word.startswith("-")]
            written.add(f"models/finetuned/{recipe}/{run_name(0, overrides)}")
        named = {word.removeprefix("finetuned=") for word in words if re.match(r"finetuned=.*\+", word)}
        assert named <= written


def test_log_names_in_the_docs_are_those_of_pmc(model, prompts, tmp_path):
    """Names with spaces in backticks, like `selected reward`, are keys of the history as the log shows them."""
    quoted = {name for text in PAGES.values() for name in re.findall(r"`([^`\n]+)`", text)}
    quoted = {name for name in quoted if re.fullmatch(r"[a-z]+( [a-z]+)+", name) and not name.startswith("make ")}
    assert quoted >= {"selected reward", "sample reward upper bound", "stopped early"}
    logged = set()
    for early_stopping in (True, False):
        options = {"fluency_weight": 0.1, "early_stopping": early_stopping}
        settings = PMCSettings(num_samples=2, max_length=48, **options)
        trainer = make_trainer(model, prompts, tmp_path, settings=settings)
        trainer.train()
        logged |= {key.replace("_", " ") for key in trainer.history[-1]}
    assert sorted(quoted - logged) == []
    assert {"solved", "selected reward"} <= logged


@pytest.mark.parametrize("page", PAGES)
def test_no_module_is_run_that_is_not_there(page):
    scripts = re.findall(rf"\b((?:{'|'.join(PACKAGES)})/[\w/]+\.py)\b", PAGES[page])
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert "python -m " not in PAGES[page], "scripts are run by their path"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "\n".join([*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")])
    named = set(re.findall(r"(?:`|^ {4})make ([a-z0-9-]+)", text, re.MULTILINE))
    assert named >= {"demo", "test", "smollm2", "docs", "lint"}
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def tree_of(readme: str) -> set[str]:
    """The paths of the modules that the README's tree names; a line that begins with a folder is about its files."""
    found: set[str] = set()
    folders: list[str] = []
    for line in readme.split("## What is where")[1].split("```")[1].splitlines():
        if folder := re.match(r"((?: {2})*)(\w+/)", line):
            folders[len(folder[1]) // 2 :] = [folder[2]]
        found |= {"".join(folders) + module for module in re.findall(r"\b(\w+\.py)\b", line)}
    return found


def test_the_file_tree_names_every_module():
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert tree_of(README) == modules


def test_every_recipe_is_in_the_table():
    stages = {"finetune", "unlearn", "evaluate", "chat", "run", "benchmark"}
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")} - stages
    recipes |= {
        f"{folder}/{path.stem}"
        for folder in ("benchmark", "compare")
        for path in (CONFIGS / folder).glob("*.yaml")
        if path.stem not in ("default", "base")
    }
    table = README.split("## Recipes")[1].split("\n## ")[0]
    assert [name for name in sorted(recipes) if f"`{name}`" not in table] == []
    ours = re.findall(r"`([\w/-]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert sorted(set(ours) - recipes) == []


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(page):
    """Sphinx checks those between the pages of docs/; this checks all of them as GitHub shows them."""
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if heading:
            text = re.sub(r"```.*?```", "", linked.read_text(encoding="utf-8"), flags=re.DOTALL)
            titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_method_of_the_docs_runs(models_dir, tmp_path):
    """The blocks of "A method", saved as it says and run from their folder."""
    section = PAGES["docs/extending.md"].split("## A method")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
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


# --- pages that are generated from the code ---


@pytest.fixture(scope="module")
def generate():
    return docs_generator()


@section
class Parent:
    path: str
    """Where it is:
    a folder."""
    width: int | None = Field(None, gt=0)
    """How wide."""


@section
class Child(Parent):
    depth: PositiveFloat = 1.5
    """How deep."""
    mode: Literal[False, "auto"] = "auto"
    """How."""
    parts: list[str] = Field(default_factory=list)
    """Of what."""
    inner: Parent | None = None
    """What is inside."""


def test_settings_are_read_from_sections(generate):
    shown = [(field.name, field.type, field.default, field.description) for field in generate.settings_fields(Child)]
    assert shown == [
        ("path", "str", "required", "Where it is: a folder"),
        ("width", "int or null, more than 0", "null", "How wide"),
        ("depth", "float, more than 0", "1.5", "How deep"),
        ("mode", "false or auto", "auto", "How"),
        ("parts", "list[str]", "[]", "Of what"),
        ("inner", "section or null", "null", "What is inside"),
    ]
    assert generate.settings_fields(Child)[-1].nested is Parent


def test_the_generated_parts_of_the_pages_are_up_to_date(generate):
    parts, found = generate.generated_parts(), []
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        found += re.findall(r"<!-- generated: (\S+) -->", text)
        assert generate.with_parts(text, parts) == text, f"{page.name}: run python docs/generate.py"
    assert sorted(found) == sorted(parts)


def test_every_setting_of_the_generated_pages_is_described(generate):
    pages = {name: getattr(generate, f"{name}_page")() for name in ("configuration", "methods", "metrics")}
    for name, page in pages.items():
        rows = [line for line in page.splitlines() if re.match(r"\| `\w+` \|", line)]
        assert rows, name
        undescribed = [row for row in rows if row.endswith("|  |") and "| section" not in row]
        assert undescribed == [], name
    for path in (CONFIGS / "method").glob("*.yaml"):
        assert f"## `{path.stem}`" in pages["methods"]
        for key in set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"_target_"}:
            assert f"| `{key}` |" in pages["methods"]
