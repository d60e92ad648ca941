"""Write the generated parts of docs/*.md: settings, methods and metrics from the code, leaderboards from docs/leaderboard.

    python docs/generate.py

A generated part stands between two comments, `<!-- generated: NAME -->` and `<!-- end: NAME -->`, and is part of the
repository, so that a page can be read without building the site. A test checks that it is up to date.
`settings_fields` reads a settings class, `described_scores` a metric file, `results_by_name` a file of results; everything else
here is Markdown.
"""

import csv
import dataclasses
import importlib
import inspect
import json
import re
import statistics
import sys
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from hydra.utils import get_class
from omegaconf import MISSING, OmegaConf

from common.config import StageConfig, fields_of, type_name
from common.files import CONFIGS, write_text
from evaluation.metrics import registry
from evaluation.tables import COLUMNS, cell_with_count

DOCS = Path(__file__).resolve().parent
REQUIRED = "required"


@dataclass(frozen=True)
class SettingsField:
    """One setting as the documentation shows it; `nested` is the settings class that it holds, if any."""

    name: str
    type: str
    default: str
    description: str
    nested: type | None = None


def settings_fields(settings_class: type) -> list[SettingsField]:
    """The fields of a settings class, in the order of the code."""
    return [
        SettingsField(
            name,
            type_name(field.annotation, field.metadata),
            REQUIRED if field.is_required() else yaml_value(field.get_default(call_default_factory=True)),
            (field.description or "").removesuffix("."),
            nested_settings(field.annotation),
        )
        for name, field in fields_of(settings_class).items()
    ]


def yaml_value(value: Any) -> str:
    """A value as one writes it in YAML: null, true, [8, 4]."""
    if dataclasses.is_dataclass(value):
        return "see below"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return REQUIRED if value == MISSING else value.replace("\n", "\\n") or '""'
    return json.dumps(value)


def nested_settings(hint: Any) -> type | None:
    """The settings class in `X` or `X | None`; None for other types."""
    return next((option for option in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(option)), None)


# --- Markdown ---


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    return f"`{text}`" if text not in (REQUIRED, "see below") else text


def section_table(name: str, settings_class: type, values: dict[str, Any] | None = None, level: int = 2) -> str:
    """A heading and the table of a section, followed by those of the sections inside it."""
    fields = settings_fields(settings_class)
    page = f"{'#' * level} `{name}`\n\n{settings_table(fields, values)}\n"
    for field in fields:
        if field.nested:
            page += section_table(f"{name}.{field.name}", field.nested, level=level + 1)
    return page


def settings_table(fields: list[SettingsField], values: dict[str, Any] | None = None) -> str:
    """The fields as a table; a default that a YAML file sets replaces the class's own."""
    values = values or {}
    rows = [
        [
            f"`{field.name}`",
            field.type,
            code(yaml_value(values[field.name]) if field.name in values else field.default),
            sentence(field.description),
        ]
        for field in fields
    ]
    return table(["key", "type", "default", "description"], rows)


def sentence(text: str) -> str:
    """The text beginning with a capital, unless it begins with a value ("null: ...") or a name."""
    begins_with_a_value = re.match(r"\w+:|[a-z]+_", text)
    return escaped(text if begins_with_a_value else text[:1].upper() + text[1:])


def escaped(text: str) -> str:
    """Text whose brackets, underscores and lone asterisks are characters, not Markdown; `code` and *emphasis* stay."""
    parts = re.split(r"(`[^`]*`|\*\w[\w ]*\*)", text)
    return "".join(part if part[:1] in ("`", "*") else re.sub(r"([<>*_{}\[\]])", r"\\\1", part) for part in parts)


def yaml_comments(name: str, keys: typing.Callable[[str], bool]) -> str:
    """The commented `key: value` lines of one of our YAML files whose path (`training.bf16`) is wanted, as a table."""
    rows, parents, is_wanted = [], [], False
    for line in (CONFIGS / name).read_text(encoding="utf-8").splitlines():
        more = re.match(r"\s+# (.+)", line)
        if more and is_wanted and len(line) - len(line.lstrip()) > 20:
            rows[-1][2] += " " + escaped(more[1])
        found = re.match(r"( *)([\w.]+):(?: +([^#]*?))?(?: +# (.*))?$", line)
        if not found:
            continue
        depth = len(found[1]) // 2
        parents[depth:] = [found[2]]
        is_wanted = bool(found[3]) and keys(".".join(parents))
        if is_wanted:
            rows.append([f"`{'.'.join(parents)}`", f"`{found[3].strip()}`", sentence(found[4] or "")])
    return table(["key", "value", "description"], rows)


# --- pages ---


def fixed_sections() -> dict[str, type]:
    """Section -> its settings class, of the sections that every stage has."""
    return {field.name: field.nested for field in settings_fields(StageConfig) if field.nested}


def configuration_page() -> str:
    page = "## Top level\n\nEvery stage has these keys (`configs/run.yaml`):\n\n"
    page += yaml_comments("run.yaml", lambda key: "." not in key)
    page += "\nUnlearning has one more (`configs/unlearn.yaml`):\n\n"
    page += yaml_comments("unlearn.yaml", lambda key: key.startswith("finetuned"))
    page += "\n"
    headline = OmegaConf.to_container(OmegaConf.load(CONFIGS / "evaluation/headline.yaml"))
    for name, settings_class in fixed_sections().items():
        page += section_table(name, settings_class, headline if name == "evaluation" else None)
    page += (
        "## `training`\n\nAny of Hugging Face's `TrainingArguments`, by its own name. Two keys are ours: `num_epochs` and "
        "`warmup_epochs`. Our defaults for unlearning (`configs/unlearn.yaml`):\n\n"
    )
    return page + yaml_comments("unlearn.yaml", lambda key: key.startswith("training."))


def methods_page() -> str:
    page = ""
    for path in sorted((CONFIGS / "method").glob("*.yaml"), key=lambda path: (path.stem != "pmc", path.stem)):
        values = dict(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        method = get_class(values.pop("_target_"))
        page += f"## `{path.stem}`\n\n{description_of(method)}\n"
        fields = settings_fields(method.Settings)
        page += settings_table(fields, values) if fields else "It has no settings.\n"
        page += "\n"
    return page


def description_of(method: type) -> str:
    """The docstring of the method's module (less the command) and the file that it is in."""
    module = importlib.import_module(method.__module__)
    first, *others = inspect.getdoc(module).split("\n\n")
    page = escaped(first) + "\n\n"
    for paragraph in others:
        lines = paragraph.strip("\n").splitlines()
        if lines[0].strip().startswith("python "):
            continue
        is_text = re.match(r"[A-Z\d]", lines[0]) is not None
        page += f"{escaped(paragraph)}\n\n" if is_text else "```text\n" + inspect.cleandoc(paragraph) + "\n```\n\n"
    return page + f"Class `{method.__qualname__}` in `{module.__name__.replace('.', '/')}.py`.\n"


def metrics_page() -> str:
    page = "## Scores\n\n"
    for name, group in registry.METRIC_GROUPS.items():
        page += f"### `{name}`\n\n"
        for pattern, better, meaning, not_shown in described_scores(inspect.getmodule(group.measure)):
            page += f"- `{pattern}` ({escaped(better)}): {escaped(meaning)}. *Not shown*: {escaped(not_shown)}.\n"
        page += "\n"
    page += "\n## Presets\n\n" + table(
        ["`metrics=`", "measures"],
        [[f"`{name}`", ", ".join(f"`{group}`" for group in groups)] for name, groups in registry.PRESETS.items()],
    )
    page += "\n## Settings\n\n"
    for name, settings_class in registry.SETTINGS.items():
        page += section_table(name, settings_class, level=3)
    return page


def described_scores(module: types.ModuleType) -> list[tuple[str, ...]]:
    """(name, better direction, meaning, what it does not show) of the scores under `Scores:` in a docstring.

    Each entry reads `name (better): meaning. Not shown: text.`; a `*` in the name stands for what varies, and further lines are
    indented. Raises ValueError for another form.
    """
    entries = re.split(r"\n(?=\S)", textwrap.dedent(module.__doc__.partition("\nScores:\n")[2]).strip())
    found = []
    for entry in entries:
        parts = re.fullmatch(r"(\S+) \((.+?)\): (.+)\. Not shown: (.+)\.", " ".join(entry.split()))
        if parts is None:
            raise ValueError(f"{module.__name__}: Scores: {entry!r}: write `name (better): meaning. Not shown: text.`")
        found.append(parts.groups())
    return found


def results_by_name(path: Path) -> dict[str, list[dict[str, str]]]:
    """Method or reference -> its rows of a comparison's results.csv, one a run: first the references, then the methods by mean
    unlearn quality, the highest first. Rows without a headline score, and of runs that do not count, are left out.
    """
    by_name: dict[str, list[dict[str, str]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["unlearn_quality"] and row.get("status", "done") == "done":
                by_name.setdefault(row["name"], []).append(row)

    def order(name: str) -> tuple[bool, float]:
        is_method = by_name[name][0]["reference"] == "False"
        return is_method, -statistics.fmean(float(row["unlearn_quality"]) for row in by_name[name]) * is_method

    return {name: by_name[name] for name in sorted(by_name, key=order)}


def compare_recipe(path: Path) -> Path:
    """The recipe that a board's results are of: smollm2-cpu for smollm2-cpu.csv and smollm2-cpu.float32.csv."""
    return CONFIGS / "compare" / f"{path.name.split('.')[0]}.yaml"


def leaderboard_page(path: Path) -> str:
    """The table of a comparison's results.csv, and the command of each of its methods."""
    results = results_by_name(path)
    columns = {title: column for title, column in COLUMNS.items() if title != "minutes"}
    every_run = [run for runs in results.values() for run in runs]
    columns = {title: column for title, column in columns.items() if any(run.get(column[0]) for run in every_run)}
    lines = []
    for name, runs in results.items():
        cells = [f"*{name}*" if runs[0]["reference"] == "True" else name, str(len(runs))]
        for score, digits in columns.values():
            values = [float(run[score]) for run in runs if run[score]]
            cells.append(cell_with_count(score, values, digits, len(runs)))
        lines.append(cells)
    recipe = OmegaConf.merge({"models_dir": "models"}, OmegaConf.load(compare_recipe(path))).comparison
    shared = recipe.get("unlearning", "")
    commands = "".join(
        f"- {name}: `{' '.join(f'python unlearning/main.py -cd=configs {words} {shared}'.split()).replace('{seed}', '0')}`\n"
        for name, words in recipe.methods.items()
        if name in results
    )
    return table(["method", "seeds", *columns], lines) + f"\nThe settings of each method:\n\n{commands}"


def generated_parts() -> dict[str, str]:
    """Name -> Markdown of each generated part."""
    parts = {"configuration": configuration_page(), "methods": methods_page(), "metrics": metrics_page()}
    for path in sorted((DOCS / "leaderboard").glob("*.csv")):
        parts[f"leaderboard-{path.stem}"] = leaderboard_page(path)
    return parts


def with_parts(text: str, parts: dict[str, str]) -> str:
    """The text of a page with its generated parts replaced."""

    def part(match: re.Match) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n\n{parts[name].strip()}\n\n<!-- end: {name} -->"

    return re.sub(r"<!-- generated: (?P<name>\S+) -->.*?<!-- end: (?P=name) -->", part, text, flags=re.DOTALL)


def write_pages() -> None:
    parts = generated_parts()
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := with_parts(text, parts)) != text:
            write_text(page, new)


if __name__ == "__main__":
    write_pages()
