"""The command that made a run, for its result.json and its model card, and the one that makes a missing checkpoint."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common.cli import allow_new_key
from common.errors import UserError
from common.files import CONFIGS, ROOT, looks_local, resolve_path
from common.recipes import is_recipe_of
from common.redaction import without_local_paths, without_secrets
from common.run_names import settings_of_the_result
from common.runs import with_portable_paths

# Folder of a stage's models in models_dir -> the program that creates them.
PROGRAM_OF_FOLDER = {"finetuned": "finetuning/main.py", "unlearned": "unlearning/main.py"}


def resolve_checkpoint(path: str, key: str) -> str:
    """`resolve_path` of a checkpoint's folder or hub id.

    Raises:
        UserError: names the key, if the path is meant as a local folder and does not exist.
    """
    resolved = resolve_path(path)
    if looks_local(path) and not Path(resolved).exists():
        command = command_that_makes(path)
        raise UserError(f"{key}={path}: no such folder{f'; make it with: {command}' if command else ''}")
    return resolved


def command_that_makes(path: str, overrides: Sequence[str] = ()) -> str | None:
    """The command that creates the folder <models_dir>/<stage>/<recipe>/seed-<seed> of a model, with these overrides.

    None for a path of another form, or if configs/ has no such recipe of the stage.
    """
    match = re.fullmatch(rf"(?:(.*)/)?({'|'.join(PROGRAM_OF_FOLDER)})/([^/]+)/seed-(\d+)/?", path)
    if not match or not is_recipe_of(PROGRAM_OF_FOLDER[match[2]], match[3]):
        return None
    models_dir = [] if match[1] in ("models", f"{ROOT}/models") else [f"models_dir={match[1] or '.'}"]
    words = [f"-cn={match[3]}", f"seed={match[4]}", *models_dir, *map(shlex.quote, overrides)]
    return " ".join([f"python {PROGRAM_OF_FOLDER[match[2]]} -cd=configs", *words])


def this_command(stage: str, models_dir: str) -> str | None:
    """`command_line` of the job that runs now; None outside of a Hydra command."""
    return command_line(stage, HydraConfig.get(), models_dir) if HydraConfig.initialized() else None


def command_line(stage: str, hydra: DictConfig, models_dir: str) -> str:
    """The command of one run alone, on one line. FOLDER stands for a folder of this machine outside the repository.

    Args:
        stage: the folder of the program.
        models_dir: folder of all runs; paths in it are shown relative to it.
    """
    recipe = hydra.job.config_name
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    ours = all(folder.resolve() == CONFIGS for folder in folders if (folder / f"{recipe}.yaml").is_file())
    words = [f"-cd={'configs' if ours else 'FOLDER'}", f"-cn={recipe}"]
    for word in settings_of_the_result(list(hydra.overrides.task)):
        bare = word.removeprefix("++")
        key, equals, value = (bare if allow_new_key(bare) == word else word).partition("=")
        words.append(f"{key}{equals}{without_local_paths(with_portable_paths(value, models_dir))}")
    line = shlex.join(["python", f"{stage}/main.py", *without_secrets(words)])
    return " ".join(line.split())  # on one line
