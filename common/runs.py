"""A run's folder: its name, whether its result is there and up to date, and how the result appears whole.

    models/<stage>/<recipe>/seed-0+method.num_samples-2/
        in_progress/     configuration and trainer checkpoints while the run is going on; gone afterwards
        previous/        figures of the results that this run replaced (weights, too, if the new run saved none)
        result.json, generations.jsonl, history.jsonl, report.md, model.safetensors, tokenizer.json, ...

All files are written to in_progress/ first and moved up at the end, result.json last: a folder with a result.json is
complete, and a run that is killed or fills the disk leaves the old result as it was.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from common.config import RunConfig
from common.errors import UserError
from common.files import ROOT, is_first_process, read_json, write_json
from common.results import RESULT, result_of

log = logging.getLogger(__name__)
FIGURES = (RESULT, "generations.jsonl", "rows.jsonl", "samples.jsonl", "history.jsonl", "report.md", "report.png")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")
# Keys that say how to run, not what: they do not name a folder and do not make a result stale.
NOT_PART_OF_THE_RUN = ("overwrite", "output_dir", "models_dir", "keep_checkpoints", "generation")


def run_name(seed: int, overrides: list[str]) -> str:
    """A distinct folder name for every combination: the seed first, then the overrides that shape the run.

    >>> run_name(0, ["method.num_samples=2", "seed=0", "overwrite=true"])
    'seed-0+method.num_samples-2'
    """
    words = [override.lstrip("+~") for override in sorted(overrides)]
    shaping = [word for word in words if not word.startswith("hydra")]
    kept = [word for word in shaping if re.split("[.=]", word)[0] not in (*NOT_PART_OF_THE_RUN, "seed")]
    name = "+".join([f"seed-{seed}", *map(_as_file_name, kept)])
    if len(name) > 180:  # file systems stop at 255 bytes
        name = f"{name[:160]}+{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _as_file_name(override: str) -> str:
    """An override as part of a folder's name; a digest stands for the characters that had to be replaced."""
    name = override.replace("=", "-", 1)
    safe = re.sub(r"[^A-Za-z0-9._+\-]+", "-", name).strip("-")
    return name if safe == name else f"{safe}-{hashlib.sha256(override.encode()).hexdigest()[:6]}"


def run_folder(stage: str, config: RunConfig, overrides: list[str] | None = None) -> Path:
    """Where a run's files go: output_dir, else models/<stage>/<recipe>/<seed and overrides>.

    In a sweep every combination gets its own folder, below output_dir where one is given.

    Args:
        overrides: of one of several runs of a command: those that would start it alone.
    """
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    one_of_several = overrides is not None or (hydra and hydra.mode == RunMode.MULTIRUN)
    if overrides is None:
        overrides = list(hydra.overrides.task) if hydra else []
    name = run_name(config.seed, overrides)
    if config.output_dir:
        return (Path(config.output_dir) / (name if one_of_several else "")).resolve()
    return (Path(config.models_dir) / stage / (hydra.job.config_name if hydra else "") / name).resolve()


def comparable_config(cfg: DictConfig, start_id: str | None = None) -> dict[str, Any]:
    """The configuration as plain data, without the keys that only say how to run: a result with another one is stale.

    Args:
        start_id: the `id` of the result that this run starts from, so that a remade checkpoint makes a new run.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain = {key: value for key, value in plain.items() if key not in NOT_PART_OF_THE_RUN}
    start = {} if start_id is None else {"start": start_id}
    return json.loads(json.dumps(with_portable_paths(plain | start, cfg.models_dir)))


def with_portable_paths(value: Any, models_dir: str) -> Any:
    """The value with paths below `models_dir` and the repository shortened, so that these may move."""
    if isinstance(value, dict):
        return {key: with_portable_paths(item, models_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [with_portable_paths(item, models_dir) for item in value]
    for parent, name in {str(Path(models_dir)): "models", str(ROOT): "."}.items():
        if isinstance(value, str) and value.startswith(parent + "/"):
            return name + value.removeprefix(parent)
    return value


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two nested dictionaries differ, each with its two values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in differing_keys(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


class RunFolder:
    """One run's folder on disk.

    Args:
        folder: of the finished run's files.
        configuration: `comparable_config(...)` of the run.
        start: the checkpoint that the run reads.
    Raises:
        UserError: when the run would overwrite the checkpoint that it reads.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any], start: str | None = None):
        if start and Path(start).resolve() == folder.resolve():
            raise UserError(f"output_dir={folder}: is the model that the run reads; name another folder")
        self.folder = folder
        self.work = folder / "in_progress"
        self.recorded = self.work / "run.json"
        self.configuration = configuration

    def is_done(self) -> bool:
        """Whether there is a result of exactly this configuration; logs so, or why it is stale."""
        result = result_of(self.folder)
        if result is None:
            return False
        if self._can_continue():
            log.info("%s: an interrupted run is continued; it replaces the result that is there", self.folder)
            return False
        changes = differing_keys(result.get("config"), self.configuration)
        if changes:
            log.info("%s: the configuration changed, so the run is redone: %s", self.folder, "; ".join(changes[:8]))
        else:
            log.info("%s: the result is there already, nothing to do (overwrite=true redoes it)", self.folder)
        return not changes

    def open(self, fresh: bool) -> Path:
        """The folder to work in, with what an interrupted run of the same configuration left there.

        Args:
            fresh: delete what an interrupted run left.
        Raises:
            UserError: when the folder cannot be made.
        """
        try:
            if is_first_process():
                self._prepare(fresh)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(
                f"output_dir={self.folder}: cannot be written to ({error.strerror}); name another"
            ) from error
        PartialState().wait_for_everyone()
        return self.work

    def _can_continue(self) -> bool:
        """Whether in_progress/ holds an interrupted run of this configuration."""
        return self.recorded.is_file() and read_json(self.recorded) == self.configuration

    def _prepare(self, fresh: bool) -> None:
        has_result = result_of(self.folder) is not None
        if not (has_result or self.recorded.is_file()) and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"output_dir={self.folder}: holds files that are no run's; name another folder")
        # An interrupted redo of a finished run continues, also with overwrite=true: that is how it was started.
        if self.recorded.is_file() and ((fresh and not has_result) or not self._can_continue()):
            changes = differing_keys(read_json(self.recorded), self.configuration)
            why = "; ".join(changes[:8]) or "overwrite=true"
            log.info("%s: what an interrupted run left is thrown away (%s)", self.folder, why)
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.recorded.exists():
            write_json(self.recorded, self.configuration)

    def publish(self, keep_checkpoints: bool = False) -> Path:
        """Move the finished files up, result.json last, and the figures of the result they replace to previous/.

        Returns the folder.
        """
        PartialState().wait_for_everyone()
        if not is_first_process():
            return self.folder
        if (self.folder / RESULT).exists():
            self._archive_old_figures()
        for path in sorted(self.work.iterdir()):
            left = path.name in (RESULT, "run.json") or (path.name.startswith("checkpoint-") and not keep_checkpoints)
            if not left:
                _move(path, self.folder / path.name)
        (self.work / RESULT).replace(self.folder / RESULT)
        shutil.rmtree(self.work)
        return self.folder

    def _archive_old_figures(self) -> None:
        archive = self.folder / "previous" / time.strftime("%Y%m%d-%H%M%S")
        while archive.exists():
            archive = archive.with_name(archive.name + "+")
        archive.mkdir(parents=True)
        for name in FIGURES:  # result.json first: from here on the folder does not count as complete
            if (self.folder / name).exists():
                (self.folder / name).replace(archive / name)
        # The old weights must not stay beside the new result: new ones replace them, else they are archived, too.
        replaced = any(self.work.glob("*.safetensors"))
        for path in (path for pattern in WEIGHTS for path in self.folder.glob(pattern)):
            path.unlink() if replaced else path.replace(archive / path.name)


def _move(source: Path, target: Path) -> None:
    """Move a file, or a folder file by file: other files in the target stay."""
    if not source.is_dir():
        source.replace(target)
        return
    target.mkdir(exist_ok=True)
    for child in source.iterdir():
        _move(child, target / child.name)
