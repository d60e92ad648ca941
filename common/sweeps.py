"""A sweep (-m): the folders of its runs, its progress, and a record of the jobs that failed.

Hydra calls `SweepCallback` (configs/run.yaml). `launch` then passes the sweep to the stage, which reports on all runs.
"""

import hashlib
import logging
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from common.errors import Pruned, UserError
from common.files import looks_local, resolve_path, write_json
from common.job import is_in_sweep
from common.run_names import run_name
from common.runs import failure_file, failure_of, has_result_of, runs_folder
from common.sweep_signals import leave_signals_to_sweep, stop_jobs_on_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """The sweep of this command.

    Attributes:
        folder: of its report.
        runs: folder -> configuration of each of its runs; a sweeper that chooses them while it works adds them.
        parent: the folder of all runs of the recipe.
        finished: folders of the jobs that this process has finished.
    """

    folder: Path
    runs: dict[Path, DictConfig]
    parent: Path
    finished: set[Path] = field(default_factory=set)

    def has_result(self, folder: Path) -> bool:
        """Whether a run of this sweep is finished, in this process or before, with the configuration of this sweep."""
        if failure_of(folder):
            return False
        return folder in self.finished or has_result_of(folder, self.runs[folder])


_current: Sweep | None = None


def current_sweep() -> Sweep | None:
    """The sweep that this process started; None in a single run, and in a job on another machine."""
    return _current


class SweepCallback(Callback):
    """Logs which job of how many begins and the time left, and records the message of a job that failed."""

    def __init__(self):
        self.started = 0.0
        self.jobs = 0  # number of jobs; 0 if the sweeper chooses them while it runs
        self.seconds: list[float] = []  # of the finished jobs

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _current
        HydraConfig.instance().set_config(config)  # resolves ${hydra:...}
        jobs = _jobs(config)
        self.jobs = len(jobs) or config.hydra.sweeper.get("n_trials", 0)
        runs = dict(job_of(config, overrides, number) for number, overrides in enumerate(jobs))
        _current = Sweep(_report_folder(config, list(runs)), runs, _run_folder(config).parent)
        _warn_of_missing_starts(runs)
        if _has_local_processes(config):
            stop_jobs_on_signals(lambda: _current.runs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        if _current is None and _has_local_processes(config):
            leave_signals_to_sweep()
        self.started = time.monotonic()
        number = config.hydra.job.num + 1
        total = self.jobs
        words = " ".join(word.lstrip("+") for word in config.hydra.overrides.task)
        log.info("job %d%s%s: %s", number, f" of {total}" if total else "", self._time_left(total - number + 1), words)

    def _time_left(self, jobs: int) -> str:
        """Words for the time that this number of jobs takes, by the median of those that were not merely skipped."""
        worked = [seconds for seconds in self.seconds if seconds > max(self.seconds) / 10]
        return f", time left {tqdm.format_interval(jobs * statistics.median(worked))}" if worked and jobs > 0 else ""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self.started)
        folder = _run_folder(config)
        path = failure_file(folder)
        if job_return.status == JobStatus.FAILED and config.hydra.mode == RunMode.MULTIRUN:
            error = job_return._return_value
            status = "pruned" if isinstance(error, Pruned) else "failed"
            message = str(error) if isinstance(error, UserError | Pruned) else f"{type(error).__name__}: {error}"
            path.parent.mkdir(parents=True, exist_ok=True)
            overrides = list(config.hydra.overrides.task)
            write_json(path, {"status": status, "message": message.strip(), "overrides": overrides})
        elif job_return.status == JobStatus.COMPLETED:  # also by a single command after the sweep
            path.unlink(missing_ok=True)
            if _current:
                _current.finished.add(folder)


def _warn_of_missing_starts(runs: dict[Path, DictConfig]) -> None:
    """Warn before the first job of jobs that will fail, as the checkpoint that they start from does not exist."""
    starts = [str(run.get("finetuned") or "") for run in runs.values()]
    missing = [start for start in starts if looks_local(start) and not Path(resolve_path(start)).exists()]
    if missing:
        log.warning(
            "%d of %d jobs will fail, as finetuned=%s does not exist; finetune with the same seeds first",
            len(missing),
            len(runs),
            ", ".join(dict.fromkeys(missing)),
        )


def _has_local_processes(config: DictConfig) -> bool:
    """Whether the launcher runs jobs in other processes of this machine. On Slurm, submitit handles signals to a job."""
    return config.hydra.launcher._target_.rpartition(".")[2] not in (BasicLauncher.__name__, "SlurmLauncher")


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job, as Hydra's own sweeper combines them; empty with another sweeper."""
    if config.hydra.sweeper._target_.rpartition(".")[2] != BasicSweeper.__name__:
        return []
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    typed = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # ${seed} is that of each job
    batches = BasicSweeper.split_arguments(parser.parse_overrides([*params, *typed]), None)
    return [job for batch in batches for job in batch]


def job_of(config: DictConfig, overrides: list[str], number: int = 0) -> tuple[Path, DictConfig]:
    """The run's folder and the configuration, without Hydra's, of the sweep's job with these overrides.

    Args:
        number: of the job in the sweep, `${hydra:job.num}`.
    """
    job = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.num = job.hydra.job.id = number
    HydraConfig.instance().set_config(job)  # resolves ${hydra:...}
    return _run_folder(job), OmegaConf.masked_copy(job, [key for key in job if key != "hydra"])


def utility_floor() -> float | None:
    """The utility in percent below which a run of this sweep is pruned (`hydra.sweeper.min_utility`); None: none is."""
    return HydraConfig.get().sweeper.get("min_utility") if is_in_sweep() else None


def _run_folder(config: DictConfig) -> Path:
    """The folder of a job's run, as `common.runs.run_folder` names it."""
    stage = "evaluated" if "metrics" in config else "unlearned" if "method" in config else "finetuned"
    name = run_name(config.seed, list(config.hydra.overrides.task))
    return (runs_folder(stage, config, str(config.hydra.job.config_name)) / name).resolve()


def _report_folder(config: DictConfig, runs: list[Path]) -> Path:
    """The folder of the sweep's report: named by its overrides, the seeds included, and by the folders of its runs."""
    overrides = list(config.hydra.overrides.task)
    seeds = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("seed=")]
    seeds = re.sub(r"[^\w,.-]+", "-", seeds[-1]) if seeds else str(config.seed)
    # A sweeper that chooses the runs while it works has its settings to search in place of their folders.
    parts = runs or [config.output_dir, config.hydra.sweeper.get("params")]
    folders = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:6]
    name = f"{run_name(0, overrides).replace('seed-0', f'seed-{seeds}', 1)}+{folders}"
    return (Path(config.models_dir) / "sweeps" / str(config.hydra.job.config_name) / name).resolve()
