"""A run's folder: where it is, whether its result exists, where it continues, and how the result appears whole.

    models/<stage>/<recipe>/seed-0+method.num_samples-2/
        in_progress/     configuration and trainer checkpoints while the run is going on; gone afterwards
        previous/        figures of the results that this run replaced (weights, too, if the new run saved none)
        result.json, generations.jsonl, history.jsonl, report.md, model.safetensors, tokenizer.json, ...

Everything is written to in_progress/ first and moved up at the end, result.json last: a folder with a result.json is
complete, and a run that is killed or meets a full disk leaves the old result as it was.
"""

import hashlib
import json
import logging
import re
import shlex
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
from common.files import CONFIGS, ROOT, is_first_process, read_json, write_json
from common.results import RESULT, result_of

log = logging.getLogger(__name__)
FIGURES = (RESULT, "generations.jsonl", "rows.jsonl", "samples.jsonl", "history.jsonl", "report.md", "report.png")
# Keys that say how to run, not what: they do not name a folder and do not make a result stale.
NOT_PART_OF_THE_RUN = ("overwrite", "output_dir", "models_dir", "keep_checkpoints", "generation")


def run_name(seed: int, overrides: list[str]) -> str:
    """A folder name of its own for every combination: the seed first, then the overrides that shape the run.

    >>> run_name(0, ["method.num_samples=2", "seed=0", "overwrite=true"])
    'seed-0+method.num_samples-2'
    """
    kept = []
    for override in sorted(overrides):
        key = override.partition("=")[0].lstrip("+~")
        if key not in (*NOT_PART_OF_THE_RUN, "seed") and not key.startswith("hydra"):
            kept.append(_safe(override.lstrip("+~")))
    name = "+".join([f"seed-{seed}", *kept])
    if len(name) > 180:  # file systems stop at 255 bytes
        name = f"{name[:160]}+{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _safe(override: str) -> str:
    """An override as part of a folder's name; where characters had to go, a digest keeps it apart from others."""
    name = override.replace("=", "-", 1)
    safe = re.sub(r"[^A-Za-z0-9._+\-]+", "-", name).strip("-")
    return name if safe == name else f"{safe}-{hashlib.sha256(override.encode()).hexdigest()[:6]}"


def run_folder(stage: str, config: RunConfig, overrides: list[str] | None = None) -> Path:
    """Where a run's files go: output_dir, else models/<stage>/<recipe>/<seed and overrides>.

    In a sweep every combination gets a folder of its own below an output_dir, too.

    Args:
        overrides: for one of several runs of a command: what the run would be by itself.
    """
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    own = list(hydra.overrides.task) if hydra else []
    name = run_name(config.seed, own if overrides is None else overrides)
    if config.output_dir:
        one_of_several = overrides is not None or (hydra and hydra.mode == RunMode.MULTIRUN)
        return (Path(config.output_dir) / (name if one_of_several else "")).resolve()
    recipe = hydra.job.config_name if hydra else ""
    return (Path(config.models_dir) / stage / recipe / name).resolve()


def finetuned_run(config: RunConfig, recipe: str) -> tuple[Path, str]:
    """Where a finetuning recipe writes with this run's seed and overrides of model and data, and the command for it."""
    overrides = [word.lstrip("+") for word in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    own = {f"{group}={choice}" for group, choice in _choices(recipe).items()}
    shared = [override for override in overrides if _shapes_finetuning(override) and override not in own]
    folder = Path(config.models_dir) / "finetuned" / recipe / run_name(config.seed, shared)
    command = ["python finetuning/main.py -cd=configs", f"-cn={recipe}", f"seed={config.seed}"]
    return folder, " ".join([*command, *map(shlex.quote, shared)])


def _choices(recipe: str) -> dict[str, str]:
    """What a recipe of ours chooses from the groups model, data, ..., itself or by what it inherits."""
    path = CONFIGS / f"{recipe}.yaml"
    chosen: dict[str, str] = {}
    for entry in OmegaConf.load(path).get("defaults", []) if path.exists() else []:
        if OmegaConf.is_dict(entry):
            chosen |= {str(group).removeprefix("override "): choice for group, choice in entry.items()}
        elif entry != "_self_":
            chosen |= _choices(entry)
    return chosen


def _shapes_finetuning(override: str) -> bool:
    """Whether an override changes the finetuned model: the model, and the data less the splits of the other stages."""
    key = override.partition("=")[0].lstrip("+~")
    if key.startswith("data.splits."):
        return key == "data.splits.train"
    return key.split(".")[0] in ("model", "data")


def identity(cfg: DictConfig, start: str | None = None) -> dict[str, Any]:
    """What a result depends on, as plain data: the configuration without the keys that only say how to run.

    Args:
        start: the `id` of the result that this run starts from, so that a remade checkpoint makes a new run.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain = {key: value for key, value in plain.items() if key not in NOT_PART_OF_THE_RUN}
    if start is not None:
        plain["start"] = start
    return json.loads(json.dumps(portable(plain, cfg.models_dir)))


def portable(value: Any, models_dir: str) -> Any:
    """The value with paths below some places given their short names: a result outlives the move of its folder."""
    if isinstance(value, dict):
        return {key: portable(item, models_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, models_dir) for item in value]
    for place, name in {str(Path(models_dir)): "models", str(ROOT): "."}.items():
        if isinstance(value, str) and value.startswith(place + "/"):
            return name + value[len(place) :]
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
        folder: where the finished run's files lie.
        configuration: `identity(...)` of the run.
        start: the checkpoint that the run reads.
    Raises:
        UserError: when the run would write over the checkpoint that it reads.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any], start: str | None = None):
        if start and Path(start).resolve() == folder.resolve():
            raise UserError(f"output_dir={folder}: is the model that the run reads; name another folder")
        self.folder = folder
        self.work = folder / "in_progress"
        self.configuration = configuration

    def is_done(self) -> bool:
        """Whether a result of exactly this configuration is there; says so, or says why it is stale."""
        result = result_of(self.folder)
        if result is None:
            return False
        if self._continues():
            log.info("%s: an interrupted run is continued; it replaces the result that is there", self.folder)
            return False
        changes = differing_keys(result.get("config"), self.configuration)
        if not changes:
            log.info("%s: the result is there already, nothing to do (overwrite=true redoes it)", self.folder)
            return True
        log.info("%s: the configuration changed, so the run is redone: %s", self.folder, "; ".join(changes[:8]))
        return False

    def open(self, fresh: bool) -> Path:
        """The folder to work in, with what an interrupted run of the same configuration left there.

        Args:
            fresh: throw away what an interrupted run left.
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

    def _continues(self) -> bool:
        """Whether in_progress/ holds an interrupted run of this configuration."""
        recorded = self.work / "run.json"
        return recorded.is_file() and read_json(recorded) == self.configuration

    def _prepare(self, fresh: bool) -> None:
        recorded = self.work / "run.json"
        ours = recorded.is_file() or result_of(self.folder) is not None
        if self.folder.is_dir() and any(self.folder.iterdir()) and not ours:
            raise UserError(f"output_dir={self.folder}: holds files that are no run's; name another folder")
        # An interrupted redo of a finished run goes on, also with overwrite=true: that is how it was started.
        starts_over = fresh and not result_of(self.folder)
        if recorded.is_file() and (starts_over or not self._continues()):
            changes = differing_keys(read_json(recorded), self.configuration)
            why = "; ".join(changes[:8]) or "overwrite=true"
            log.info("%s: what an interrupted run left is thrown away (%s)", self.folder, why)
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        if not recorded.exists():
            write_json(recorded, self.configuration)

    def publish(self, keep_checkpoints: bool = False) -> Path:
        """Move the finished files up, result.json last, and put the figures of the result they replace aside.

        Returns the folder.
        """
        PartialState().wait_for_everyone()
        if not is_first_process():
            return self.folder
        self._put_old_figures_aside()
        names = sorted(path.name for path in self.work.iterdir() if path.name not in (RESULT, "run.json"))
        for name in names:
            if name.startswith("checkpoint-") and not keep_checkpoints:
                continue
            _move(self.work / name, self.folder / name)
        (self.work / RESULT).replace(self.folder / RESULT)
        shutil.rmtree(self.work)
        return self.folder

    def _put_old_figures_aside(self) -> None:
        if not (self.folder / RESULT).exists():
            return
        aside = self.folder / "previous" / time.strftime("%Y%m%d-%H%M%S")
        while aside.exists():
            aside = aside.with_name(aside.name + "+")
        aside.mkdir(parents=True)
        for name in FIGURES:  # result.json first: from here on the folder does not count as complete
            if (self.folder / name).exists():
                (self.folder / name).replace(aside / name)
        # The old weights must not lie beside the new result. They go when new ones replace them.
        replaced = any(self.work.glob("*.safetensors"))
        for pattern in (
            "model*.safetensors",
            "model.safetensors.index.json",
            "adapter_model.safetensors",
            "adapter_config.json",
        ):
            for path in self.folder.glob(pattern):
                path.unlink() if replaced else path.replace(aside / path.name)


def _move(source: Path, target: Path) -> None:
    """Move a file, or a folder file by file: what else lies in the target stays."""
    if not source.is_dir():
        source.replace(target)
        return
    target.mkdir(exist_ok=True)
    for child in source.iterdir():
        _move(child, target / child.name)
