"""The recipes (YAML files for -cn): which program each belongs to, and its description. Read from the files, not composed."""

from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath

import yaml
from hydra.main import get_args_parser

from common.files import CONFIGS

# A recipe with one of these keys belongs to this program; the first that fits counts. All others are for finetuning.
PROGRAMS = {
    "comparison": "scripts/compare_methods.py",
    "benchmark": "benchmarks/step.py",
    "metrics": "evaluation/main.py",
    "browser": "evaluation/chat.py",
    "method": "unlearning/main.py",
}


def deciding_key(keys: Container[str]) -> str | None:
    """The key of `PROGRAMS` that decides which program a recipe with these keys belongs to; None for finetuning."""
    return next((key for key in PROGRAMS if key in keys), None)


def program_of(keys: Container[str]) -> str:
    return PROGRAMS.get(deciding_key(keys), "finetuning/main.py")


def recipe_folders(words: Sequence[str]) -> list[Path]:
    """The folders in which Hydra looks for recipes, given the words of a command line (-cp, -cd)."""
    args, _ = get_args_parser().parse_known_args(list(words))
    return [Path(args.config_path or CONFIGS), *([Path(args.config_dir)] if args.config_dir else [])]


def recipes_of(program: str, folders: Sequence[Path] = (CONFIGS,)) -> dict[str, str]:
    """The recipes of a program, by name, each with its description: the first line of its comment, without the command.

    Files of a group, such as data/tiny.yaml, and files that only others inherit are no recipes: run.yaml is no part of them.
    """
    found = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if is_recipe_of(program, name, folders):
                found.setdefault(name, _description(path))
    return found


def is_recipe_of(program: str, name: str, folders: Sequence[Path] = (CONFIGS,)) -> bool:
    """Whether there is a recipe of this name, and it belongs to the program."""
    keys, files = _inherited(name, folders)
    return "run" in files and name != "run" and program_of(keys) == program


def _inherited(recipe: str, folders: Sequence[Path]) -> tuple[set[str], set[str]]:
    """The top-level keys of a recipe, groups included, and the names of the files that it consists of."""
    keys: set[str] = set()
    files: set[str] = set()
    waiting = [recipe]
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        files.add(name)
        values = _load(name, folders)
        keys |= values.keys()
        for entry in values.get("defaults") or []:
            if isinstance(entry, dict):  # {"override /method": "npo"}
                keys |= {group.split()[-1].split("@")[0].strip("/") for group in entry}
            elif entry != "_self_":
                waiting.append(str(PurePosixPath("/", name).parent / entry).strip("/"))
    return keys, files


def _load(name: str, folders: Sequence[Path]) -> dict:
    """The values of a file; empty if there is none or it cannot be read. Hydra has messages for those."""
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _description(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line]
    return comments[0].split(": python ")[0].rstrip(".") if comments else ""
