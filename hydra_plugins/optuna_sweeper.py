"""A sweep whose settings Optuna chooses (docs/launchers.md). Hydra looks for plugins in a package of this name.

    python unlearning/main.py -m -cd=configs -cn=PMC-unlearn-tiny hydra/sweeper=optuna \
        "method.lambda_unlearning=tag(log,interval(0.5,8))" "method.num_samples=range(2,11)"

Each trial is a job of the sweep, with a run folder of its own. Unlearn quality and utility are both maximized. The trials
are in study.db (SQLite), beside the sweep's report. Several commands can work on them at the same time.
"""

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from common.cli import allow_new_key
from common.errors import Pruned, UserError, library_errors_as_user_error
from common.runs import changed_keys, stored_config
from common.sweeps import current_sweep, job_of

log = logging.getLogger(__name__)
FAILURES = 3  # a command whose first trials, so many of them, all fail starts no others


class OptunaSweeper(Sweeper):
    """Hydra's interface to Optuna: asks for trials, launches them as jobs and tells their scores.

    A trial that a worker runs is locked by a file, which the operating system releases when the worker ends, also after a
    crash. A running trial without a lock is therefore one of a worker that was stopped, and is run again. Its run continues
    from the last checkpoint.

    Args:
        n_trials: trials of the study. Trials that failed in earlier commands are not counted.
        n_jobs: trials that are launched together.
        seed: of the sampler.
        min_utility: utility below which a run is pruned, see `common.sweeps.utility_floor`.
        params: settings to search, beside those of the command line.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, seed: int, min_utility: float | None, params: dict[str, str] | None
    ) -> None:
        self.n_trials, self.n_jobs, self.seed, self.min_utility = n_trials, n_jobs, seed, min_utility
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run trials until the study has `n_trials`.

        Raises:
            UserError: for settings that cannot be searched, and for a study of another configuration.
            Exception: at the end, the error of the first job that failed.
        """
        if not isinstance(self.params, Mapping):
            raise UserError(f"hydra.sweeper.params={self.params}: expected settings, {{KEY: interval(0.5,8)}}")
        words = [*(allow_new_key(f"{key}={value}") for key, value in self.params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(words)
        last = {item.key_or_group: item for item in overrides}  # of several values of a key Hydra takes the last one
        searched = {key: item for key, item in last.items() if item.is_sweep_override()}
        self.fixed = [
            f"{item.get_key_element()}={item.get_value_element_as_str()}"
            for key, item in last.items()
            if key not in searched
        ]
        self.elements = {key: item.get_key_element() for key, item in searched.items()}  # "++key"
        self.check(searched)
        self.space = {key: checked_distribution(item) for key, item in searched.items()}
        self.study = self.open_study()
        before = {trial.number for trial in self.trials() if trial.state.name == "FAIL"}
        results: list[JobReturn] = []
        useful = 0  # trials of this command that did not fail
        try:
            while True:
                with self.claimed(before) as batch:
                    if not batch:
                        break
                    self.add_to_sweep(batch)
                    jobs = [self.overrides_of(trial) for trial in batch]
                    found = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
                    useful += sum(self.tell(trial, result) for trial, result in zip(batch, found, strict=True))
                    results += found
                    if len(results) >= FAILURES and not useful:
                        log.error("the first %d trials failed; no others are started", len(results))
                        break
        finally:
            self.add_to_sweep(self.trials())
        for result in results:
            if result.status == JobStatus.FAILED and not isinstance(result._return_value, Pruned):
                _ = result.return_value  # raises its error
        return results

    def check(self, searched: dict[str, Override]) -> None:
        """Check the settings to search and those of the sweeper.

        Raises:
            UserError: names the setting, or says that Optuna is missing.
        """
        if importlib.util.find_spec("optuna") is None:
            raise UserError("hydra/sweeper=optuna: Optuna is missing; pip install -r requirements-launchers.txt")
        if not searched:
            raise UserError(
                "hydra/sweeper=optuna: no setting to search; give one several values, such as "
                "'method.lambda_unlearning=interval(0.5,8)'"
            )
        if "seed" in searched:
            raise UserError(
                "seed: Optuna would keep the seed that is best by chance; give one seed, and repeat the best settings with "
                "others"
            )
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError(
                "hydra/sweeper=optuna: each process of torchrun would run other trials; start it with python"
            )
        for key in ("n_trials", "n_jobs"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"hydra.sweeper.{key}={value}: expected a positive integer")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"hydra.sweeper.seed={self.seed}: expected an integer, 0 or more")
        floor = self.min_utility
        if floor is not None and not (isinstance(floor, int | float) and 0 <= floor <= 100):
            raise UserError(f"hydra.sweeper.min_utility={floor}: expected a utility in percent, 0 to 100")
        _, base = job_of(self.config, self.fixed)
        every, epochs = base.evaluation.every_epochs if "method" in base else 0, base.training.num_train_epochs
        if {"training.num_epochs", "training.num_train_epochs", "training.max_steps"} & searched.keys():
            epochs = math.inf
        if floor is not None and not 0 < every < epochs:
            raise UserError(
                f"hydra.sweeper.min_utility={floor}: no run is pruned, as the scores are only computed at its end; with an "
                f"unlearning recipe, set evaluation.every_epochs below the number of epochs (now {every} of {epochs:g})"
            )

    @property
    def folder(self) -> Path:
        return current_sweep().folder

    def open_study(self) -> Any:
        """The study in the folder of the sweep's report, created if there is none.

        Raises:
            UserError: if its trials were run with another configuration or another `min_utility`.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "study.db"
        _, base = job_of(self.config, self.fixed)
        # Trials that were pruned at another floor are not comparable with those of this one.
        wanted = stored_config(base) | {"hydra": {"sweeper": {"min_utility": self.min_utility}}}
        with FileLock(self.folder / "study.lock"):
            study = optuna.create_study(
                storage=f"sqlite:///{path}",
                study_name=self.config.hydra.job.config_name,
                directions=["maximize", "maximize"],
                load_if_exists=True,
            )
            found = study.user_attrs.get("config")
            if found is None:
                study.set_user_attr("config", wanted)
        if changes := changed_keys(found, wanted) if found else []:
            raise UserError(
                f"{path}: its trials were run with another configuration ({'; '.join(changes[:8])}); undo the change, or "
                "move the file away to begin anew"
            )
        log.info("%d of %d trials are in %s", len(study.get_trials(deepcopy=False)), self.n_trials, path)
        return study

    def trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    @contextlib.contextmanager
    def claimed(self, failed_before: set[int]) -> Iterator[list[Any]]:
        """A context with the next trials to run, locked by this worker: those of stopped workers first, then new ones.

        Args:
            failed_before: numbers of the trials that are not counted.
        """
        with contextlib.ExitStack() as locks:
            with FileLock(self.folder / "study.lock"):
                batch = self.stopped_trials(locks)
                counted = sum(trial.number not in failed_before for trial in self.trials())
                while len(batch) < self.n_jobs and counted < self.n_trials:
                    batch.append(self.new_trial(locks))
                    counted += 1
            yield batch

    def stopped_trials(self, locks: contextlib.ExitStack) -> list[Any]:
        """At most `n_jobs` trials of workers that were stopped."""
        import optuna

        found = []
        for frozen in self.trials():
            if len(found) == self.n_jobs or frozen.state.name != "RUNNING" or not self.lock(frozen.number, locks):
                continue
            if set(frozen.params) == set(self.space):
                found.append(optuna.trial.Trial(self.study, frozen._trial_id))
            else:  # stopped while its settings were chosen
                self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
        return found

    def new_trial(self, locks: contextlib.ExitStack) -> Any:
        import optuna

        # A generator for each trial: a command that continues draws no settings again, and workers draw different ones.
        seed = int(np.random.SeedSequence([self.seed, len(self.trials())]).generate_state(1)[0])
        # constant_liar: trials that are still running count as bad, so that another one is not drawn beside them.
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = self.study.ask(self.space)
        self.lock(trial.number, locks)
        return trial

    def lock(self, number: int, locks: contextlib.ExitStack) -> bool:
        """Lock a trial until the context ends; returns False if another worker runs it."""
        path = self.folder / f"trial-{number}.lock"
        try:
            locks.enter_context(FileLock(path, timeout=0, fallback_to_soft=False))
        except Timeout:
            return False
        locks.callback(path.unlink, missing_ok=True)
        return True

    def overrides_of(self, trial: Any) -> list[str]:
        return [*self.fixed, *(f"{self.elements[key]}={value}" for key, value in trial.params.items())]

    def tell(self, trial: Any, result: JobReturn) -> bool:
        """Record the outcome of a trial: its scores, the epoch in which it was pruned, or its error; False for an error."""
        from optuna.trial import TrialState

        value = result._return_value
        if isinstance(value, Pruned):
            trial.set_user_attr("pruned_in_epoch", value.epoch)
            trial.set_user_attr("utility", value.utility)
            self.study.tell(trial.number, state=TrialState.PRUNED)
        elif result.status == JobStatus.COMPLETED and are_scores(value):
            self.study.tell(trial.number, value)
        else:
            trial.set_user_attr("error", f"{type(value).__name__}: {value}")
            self.study.tell(trial.number, state=TrialState.FAIL)
            return False
        return True

    def add_to_sweep(self, trials: Sequence[Any]) -> None:
        """Make the runs of these trials part of the sweep, so that its report has them."""
        for trial in trials:
            if set(trial.params) == set(self.space):
                folder, cfg = job_of(self.config, self.overrides_of(trial))
                current_sweep().runs[folder] = cfg


def are_scores(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(x is not None and math.isfinite(x) for x in value)


def checked_distribution(item: Override) -> Any:
    """`distribution`, after a check of what it would leave out in silence.

    Raises:
        UserError: names the setting.
    """
    value, typed = item.value(), item.input_line
    if getattr(value, "shuffle", False):
        raise UserError(f"{typed}: the order of the values has no meaning for Optuna; leave out shuffle")
    if value.tags and not (value.tags == {"log"} and isinstance(value, IntervalSweep)):
        raise UserError(f"{typed}: the only tag is log, and only of an interval: tag(log,interval(1e-5,1e-3))")
    if isinstance(value, IntervalSweep) and not (math.isfinite(value.start) and math.isfinite(value.end)):
        raise UserError(f"{typed}: expected finite bounds")
    with library_errors_as_user_error(typed):
        if isinstance(value, RangeSweep) and not list(item.sweep_iterator()):
            raise UserError(f"{typed}: the range is empty")
        return distribution(item)


def distribution(item: Override) -> Any:
    """The values of a setting, in Hydra's syntax, as Optuna has them.

    interval(a,b) are all numbers from a to b, int(interval(a,b)) the integers, range(a,b,step) leaves out b, and others are
    choices. tag(log,...) of an interval draws its logarithm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = item.value()
    if isinstance(value, IntervalSweep):
        of_type = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
        return of_type(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        numbers = list(item.sweep_iterator())
        of_type = float if any(isinstance(number, float) for number in numbers) else int
        # As decimals: Optuna leaves out the last value if a sum of floats is not exactly a number of steps away.
        start, step = Decimal(str(numbers[0])), Decimal(str(value.step))
        low, high = sorted((start, start + (len(numbers) - 1) * step))
        distribution_of = FloatDistribution if of_type is float else IntDistribution
        return distribution_of(of_type(low), of_type(high), step=of_type(abs(step)))
    return CategoricalDistribution(list(item.sweep_string_iterator()))
