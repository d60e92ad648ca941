"""A run's folder: its name, the check for an up-to-date result, and the replacement of an old result.

    models/<stage>/<recipe>/seed-0+method.num_samples-2/
        .lock                      only while a command works in the folder, see common/lock.py
        in_progress/               configuration, checkpoints and files of an unfinished run
        in_progress.publishing/    files of a finished run while they are moved up
        in_progress.discarded/     files of an interrupted run while they are deleted
        previous/                  results that a newer run replaced (also the old weights, if the newer run saved none)
        result.json, generations.jsonl, history.jsonl, report.md, model.safetensors, tokenizer.json, ...
        README.md                  the model card, if the weights are saved

All files are first written to in_progress/. At the end it is renamed in_progress.publishing/: from then on the run is
finished, and the next command completes what a killed one did not move. The old result.json is put aside first, and the
new one is moved up last. So a folder with a result.json is complete, and a run that is killed or fills the disk does not
change the old result.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.config import RunConfig
from common.data import HEADLINE_ROLES, local_files
from common.errors import FULL_DISK, UserError
from common.files import ROOT, digest, is_first_process, local_file, read_json, resolve_path, source_file, write_json
from common.job import is_in_sweep, typed_overrides
from common.lock import LOCK, locked
from common.redaction import without_secrets
from common.results import CARD, PUBLISHING, RESULT, checkpoint_id, recorded_config, result_of
from common.run_names import NOT_PART_OF_THE_RUN, PUSH_KEYS, run_name

log = logging.getLogger(__name__)
FIGURES = (
    RESULT,
    CARD,
    "generations.jsonl",
    "rows.jsonl",
    "samples.jsonl",
    "history.jsonl",
    "picks.jsonl",
    "report.md",
    "report.png",
    "report.html",
    "vanilla",
    "finetuned",
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")
FAILURES = ".failed"  # beside the runs of a sweep: a file for each job that failed
# Keys that may name a local folder -> those of its files that are read.
FOLDERS_THAT_ARE_READ = {
    "lm_eval.include_path": ("**/*",),
    "model.tokenizer": ("*token*", "*.model", "vocab*", "merges*", "chat_template*"),
}


def run_folder(stage: str, config: RunConfig, overrides: list[str] | None = None) -> Path:
    """The folder for a run's files: output_dir, else models/<stage>/<recipe>/<seed and overrides>.

    In a sweep every combination gets a separate folder, inside output_dir if that is given.

    Args:
        overrides: given for one of several runs of a command: the overrides of a command for only this run.
    """
    one_of_several = overrides is not None or is_in_sweep()
    if overrides is None:
        overrides = typed_overrides()
    parent = runs_folder(stage, config, HydraConfig.get().job.config_name if HydraConfig.initialized() else "")
    has_own_name = one_of_several or not config.output_dir
    return (parent / run_name(config.seed, overrides) if has_own_name else parent).resolve()


def runs_folder(stage: str, config: RunConfig | DictConfig, recipe: str) -> Path:
    """The folder in which the runs of a sweep get a folder each: output_dir, else models/<stage>/<recipe>."""
    return Path(config.output_dir) if config.output_dir else Path(config.models_dir) / stage / recipe


def has_result_of(folder: Path, cfg: DictConfig) -> bool:
    """Whether the folder has the result of this composed configuration, so that its command would not repeat the run.

    An evaluation's null keys are those of the run that made its model, and are not compared.
    """
    wanted, found = stored_config(cfg), recorded_config(folder)
    if "metrics" not in wanted or not found:
        return not changed_keys(found, wanted)
    if wanted.get("generation") != found.get("generation"):  # left out for the project's own sampler
        return False
    known = dict(flattened(found))
    return all(value in (known.get(key), None) for key, value in flattened(wanted))


def stored_config(cfg: DictConfig) -> dict[str, Any]:
    """The configuration that a run of this composed configuration stores in its result."""
    start = cfg.get("finetuned") or OmegaConf.select(cfg, "model.path", throw_on_missing=False)
    return comparable_config(cfg, checkpoint_id(resolve_path(start)) if start else None)


def failure_of(folder: Path) -> str | None:
    """`failed: <why>` or `pruned: <why>` of the last job of a sweep that belongs to this folder; None if it was neither."""
    path = failure_file(folder)
    try:
        if not path.is_file():
            return None
        failure = read_json(path)
        return f"{failure.get('status', 'failed')}: {failure['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"failed: {path} is not readable"


def failure_file(folder: Path) -> Path:
    """The file with the message of a failed or pruned job, beside the run's folder, which may not exist."""
    return folder.parent / FAILURES / f"{folder.name}.json"


def comparable_config(cfg: DictConfig, start_id: str | None = None) -> dict[str, Any]:
    """The configuration as JSON values, without keys that do not influence the result. A result with another one is stale.

    Secrets are masked. `files` has digests of the local files that the run reads, `processes` the number of processes that
    train, if there are several.

    Args:
        start_id: `checkpoint_id` of the checkpoint that this run starts from. A new id makes this run's result stale.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain = {key: value for key, value in plain.items() if key not in NOT_PART_OF_THE_RUN}
    engine = plain.pop("generation", {}).get("engine", "own")
    if engine != "own":  # its samples are other ones
        plain["generation"] = {"engine": engine}
    if isinstance(plain.get("training"), dict):
        plain["training"] = {key: value for key, value in plain["training"].items() if key not in PUSH_KEYS}
    if start_id is not None:
        plain["start"] = start_id
    if files := digests_of_files(plain):
        plain["files"] = files
    if "metrics" not in plain and (processes := PartialState().num_processes) > 1:
        plain["processes"] = processes  # each has a batch of its own
    # An evaluation reads the data again, and it may have another models_dir.
    data = with_portable_paths(plain.pop("data", {}), str(ROOT / "models"))
    portable = with_portable_paths(plain, cfg.models_dir) | ({"data": data} if data else {})
    return json.loads(json.dumps(without_secrets(portable)))


def digests_of_files(plain: dict[str, Any]) -> dict[str, str]:
    """Digests of the local files that a run reads: of the data set by role or key, of others by their dotted key.

    Also of the code that a `_target_` outside this repository names, such as a reward function, and of the files in a folder
    of tasks or of a tokenizer.
    """
    data, found = plain.get("data"), {}
    read = HEADLINE_ROLES if "method" in plain else (*HEADLINE_ROLES, "train")
    if isinstance(data, dict) and data.get("path"):
        for role, splits in (data.get("splits") or {}).items():
            if splits and ("metrics" in plain or role in read) and (files := local_files(data["path"], splits)):
                found[role] = digest(files)
        tokenizer_splits = ((plain.get("model") or {}).get("new") or {}).get("tokenizer_splits") or []
        if files := local_files(data["path"], " + ".join(tokenizer_splits)):
            found["model.new.tokenizer_splits"] = digest(files)
    for key, value in flattened(plain):
        if not isinstance(value, str):
            continue
        of_others = key.endswith("_target_") and not value.startswith("unlearning.")
        if file := local_file(value) or (source_file(value) if of_others else None):
            found[key] = digest([file])
        elif patterns := FOLDERS_THAT_ARE_READ.get(key):
            paths = {path for pattern in patterns for path in Path(resolve_path(value)).glob(pattern) if path.is_file()}
            if paths := sorted(path for path in paths if path.suffix != ".pyc"):
                found[key] = digest(paths)
    return found


def changed_keys(recorded: Any, wanted: dict[str, Any]) -> list[str]:
    """`differing_keys` of a recorded configuration and that of a command; what older versions did not record is no change."""
    if isinstance(recorded, dict) and "files" not in recorded:
        wanted = {key: value for key, value in wanted.items() if key in recorded or key not in ("files", "start")}
    return differing_keys(recorded, wanted)


def with_portable_paths(value: Any, models_dir: str) -> Any:
    """The value with paths inside `models_dir` and the repository made relative, so that both can be moved."""
    if isinstance(value, dict):
        return {key: with_portable_paths(item, models_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [with_portable_paths(item, models_dir) for item in value]
    for parent, name in {str(Path(models_dir)): "models", str(ROOT): "."}.items():
        if isinstance(value, str) and value.startswith(parent + "/"):
            return name + value.removeprefix(parent)
    return value


def flattened(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested dictionaries, with their values."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two nested dictionaries, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in differing_keys(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


def only_processes_differ(changes: list[str]) -> bool:
    """Whether the number of processes is the one thing that these `changed_keys` name."""
    return bool(changes) and all(change.startswith("processes: ") for change in changes)


def training_run(stage: str, cfg: DictConfig, config: RunConfig) -> "RunFolder":
    """The folder of a run that trains the checkpoint at `config.model.path` or a new model."""
    start = resolve_path(config.model.path) if config.model.path else ""
    start_id = checkpoint_id(start) if start else None
    flags = {"overwrite": config.overwrite, "keep_checkpoints": config.keep_checkpoints}
    return RunFolder(run_folder(stage, config), comparable_config(cfg, start_id), start, **flags)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


class RunFolder:
    """One run's folder on disk.

    Args:
        folder: of the finished run's files.
        configuration: `comparable_config(...)` of the run.
        start: hub id or folder of the checkpoint that the run starts from; empty for a new model.
        overwrite: repeat a finished run, and do not continue one that was begun without this flag.
        keep_checkpoints: also publish the checkpoints.
    Raises:
        UserError: if the run would overwrite that checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        configuration: dict[str, Any],
        start: str = "",
        overwrite: bool = False,
        keep_checkpoints: bool = False,
    ):
        if start and Path(start).resolve() == folder.resolve():
            raise UserError(f"output_dir={folder}: is the model that the run reads; name another folder")
        self.folder = folder
        self.start = start
        self.overwrite = overwrite
        self.keep_checkpoints = keep_checkpoints
        self.work = folder / "in_progress"
        self.publishing = folder / PUBLISHING
        self.discarded = folder / "in_progress.discarded"
        self.recorded = self.work / "run.json"
        self.configuration = configuration

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no other command works in the folder, see `common.lock.locked`."""
        return locked(self.folder)

    def is_done(self) -> bool:
        """Whether the folder has a result of exactly this configuration. The reason is logged.

        With `overwrite`, only a run whose publishing broke off is done: it is completed, not repeated.
        """
        if self.publishing.is_dir():
            return self._is_published()
        result = None if self.overwrite else result_of(self.folder)
        if result is None:
            return False
        if self._can_continue():
            log.info("%s: continuing an interrupted run; its result will replace the one in this folder", self.folder)
            return False
        changes = changed_keys(result.get("config"), self.configuration)
        if only_processes_differ(changes):
            log.warning(
                "%s: the result already exists, made by another number of processes, each with a batch of its own (%s); "
                "overwrite=true repeats the run",
                self.folder,
                changes[0],
            )
            return True
        if changes:
            log.info("%s: the configuration changed, so the run is repeated: %s", self.folder, "; ".join(changes[:8]))
        else:
            log.info("%s: the result already exists; overwrite=true repeats the run", self.folder)
        return not changes

    def _is_published(self) -> bool:
        """Whether the run that broke off while publishing had this configuration; if so, complete it."""
        result = result_of(self.publishing) or result_of(self.folder)
        if result is None or changed_keys(result["config"], self.configuration):
            return False
        PartialState().wait_for_everyone()  # all processes have read the same state
        if is_first_process():
            self._finish_publishing()
        PartialState().wait_for_everyone()
        log.info("%s: the run was finished, but stopped while its files were moved; completed", self.folder)
        return True

    def open(self) -> Path:
        """Prepare in_progress/ and return it. Files of an interrupted run of the same configuration are kept.

        Raises:
            UserError: if the folder cannot be created or holds files that no run wrote.
        """
        try:
            if is_first_process():
                self._prepare()
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise UserError(
                f"output_dir={self.folder}: cannot be written to ({error.strerror}); name another folder"
            ) from error
        PartialState().wait_for_everyone()
        return self.work

    def _begun(self) -> dict[str, Any] | None:
        """What the interrupted run in in_progress/ recorded at its start, empty if unreadable; None if there is none."""
        if not self.recorded.is_file():
            return None
        with contextlib.suppress(ValueError):
            begun = read_json(self.recorded)
            return begun if isinstance(begun, dict) else {}
        return {}

    def _can_continue(self) -> bool:
        """Whether in_progress/ has an interrupted run of this configuration.

        A command with `overwrite` continues only a run that was begun with it, as when it is itself started again.
        """
        begun = self._begun() or {}
        same = not changed_keys(begun.get("config"), self.configuration)
        return same and (begun["overwrite"] or not self.overwrite)

    def _prepare(self) -> None:
        if self.publishing.is_dir():
            self._finish_publishing()
        if self.discarded.is_dir():
            shutil.rmtree(self.discarded)
        if self.work.is_dir() and _names(self.work) <= {self.recorded.name + ".partial"}:  # killed while it began
            shutil.rmtree(self.work)
        begun = self._begun()
        if begun is None and result_of(self.folder) is None and _names(self.folder) - {LOCK}:
            raise UserError(f"output_dir={self.folder}: holds files that no run wrote; name another folder")
        if self.work.is_dir() and not self._can_continue():
            changes = changed_keys((begun or {}).get("config"), self.configuration)
            if begun and not self.overwrite and only_processes_differ(changes):
                raise UserError(
                    f"{self.folder}: the interrupted run was begun with {begun['config'].get('processes', 1)} processes, each "
                    "with a batch of its own; continue it with as many, or start again with overwrite=true"
                )
            why = "; ".join(changes[:8]) or "overwrite=true"
            log.info("%s: deleting the files of an interrupted run (%s)", self.folder, why)
            self.work.replace(self.discarded)  # at once: half of these files must not be taken for this run's
            shutil.rmtree(self.discarded)
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.recorded.exists():
            write_json(self.recorded, {"overwrite": self.overwrite, "config": self.configuration})

    def publish(self) -> Path:
        """Move the finished files up, result.json last, and the old result to previous/. Returns the folder."""
        PartialState().wait_for_everyone()
        if is_first_process():
            self.work.replace(self.publishing)
            self._finish_publishing()
        PartialState().wait_for_everyone()  # every process may read the result next
        return self.folder

    def _finish_publishing(self) -> None:
        """Move the files in in_progress.publishing/ up. After a kill it can be called again: complete steps are skipped."""
        replaced = self.publishing / "replaced"
        if (self.publishing / RESULT).is_file():
            if not replaced.is_dir():
                self._put_old_aside(replaced)
            self._move_up(kept_back=(RESULT, "run.json", replaced.name))
        if replaced.is_dir():
            self._archive(replaced)
        shutil.rmtree(self.publishing)

    def _put_old_aside(self, replaced: Path) -> None:
        partial = replaced.with_name("replacing")
        partial.mkdir(exist_ok=True)
        for pattern in (*FIGURES, *WEIGHTS):  # result.json first: without it the folder is not complete
            for path in list(self.folder.glob(pattern)):
                path.replace(partial / path.name)
        partial.replace(replaced)

    def _move_up(self, kept_back: tuple[str, ...]) -> None:
        for path in sorted(self.publishing.iterdir()):
            if path.name in kept_back or (path.name.startswith("checkpoint-") and not self.keep_checkpoints):
                continue
            if path.is_dir():  # file by file: other files in the folder stay
                shutil.copytree(path, self.folder / path.name, copy_function=os.replace, dirs_exist_ok=True)
            else:
                path.replace(self.folder / path.name)
        (self.publishing / RESULT).replace(self.folder / RESULT)

    def _archive(self, replaced: Path) -> None:
        """Move the old result to previous/. Its weights are deleted if there are new ones."""
        if any(any(self.folder.glob(pattern)) for pattern in WEIGHTS):
            for path in [path for pattern in WEIGHTS for path in replaced.glob(pattern)]:
                path.unlink()
        if not any(replaced.iterdir()):
            return
        archive = self.folder / "previous" / time.strftime("%Y%m%d-%H%M%S")
        while archive.exists():
            archive = archive.with_name(archive.name + "+")
        archive.parent.mkdir(exist_ok=True)
        replaced.replace(archive)
