"""The command that made a run, for its result.json and its model card."""

import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common.cli import allow_new_key
from common.files import CONFIGS
from common.redaction import without_local_paths, without_secrets
from common.runs import settings_of_the_result, with_portable_paths


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
