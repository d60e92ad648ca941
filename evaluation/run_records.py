"""The runs in some folders, and their statistics over seeds: what a report shows.

A run of finetuning or unlearning is a folder with result.json. Evaluations of its model (models/evaluated/..., or a
subfolder) add their scores to it: they have recorded its `id`.
"""

import contextlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, StrictFloat, StrictInt, ValidationError

from common.errors import UserError
from common.files import read_json, read_json_lines, resolve_path
from common.results import (
    HISTORY,
    PUBLISHING,
    RESULT,
    differing_inputs,
    evaluation_inputs,
    method_name,
    result_id,
    result_of,
    started_from,
)
from common.runs import FAILURES, failure_of, flattened
from evaluation.tables import BEFORE, average, deviation, is_number, minutes_of_stage

log = logging.getLogger(__name__)
# Keys that differ between seeds, say the same as another key or do not change the model.
NOT_SETTINGS = (
    "seed",
    "start",
    "save_model",
    "model.made_by",
    "training.num_train_epochs",
    "evaluation.every_epochs",
    "evaluation.start",
)

REQUIRED = {"model", "data", "evaluation"}  # sections of a configuration that a run's result has
CHECKPOINT = ("path", "revision", "gguf_file")  # keys of `model` that name a checkpoint


@dataclass
class Run:
    """One trained model with everything that was measured of it.

    Attributes:
        folder: of its files.
        name: the method, or the recipe that finetuned it.
        result: its result.json; empty if it has none.
        status: "done", "failed: <why>", "pruned: <why>" or "unfinished".
        reference: whether it is not an unlearned model, but one to compare with.
        evaluations: folder -> result.json of the evaluations of this model, the newest last.
        of_evaluation: whether it stands for one evaluation of a sweep, with the settings of that evaluation.
    """

    folder: Path
    name: str
    result: dict[str, Any]
    status: str = "done"
    reference: bool = False
    evaluations: dict[Path, dict[str, Any]] = field(default_factory=dict)
    of_evaluation: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return self.result.get("config", {})

    @property
    def seed(self) -> int | None:
        """The seed that the model was made with; of a model that was only evaluated, the one in its path, if it has one."""
        if "metrics" in self.config:
            named = re.search(r"seed-(\d+)", str(self.config["model"].get("path")))
            return int(named[1]) if named else None
        return self.config.get("seed")

    @cached_property
    def scores(self) -> dict[str, float | None]:
        """All scores of the run and its evaluations, and the minutes of the stage that trained it."""
        scores = dict(self.result.get("scores", {}))
        for result in self.evaluations.values():
            scores |= {
                name: value for name, value in result["scores"].items() if value is not None or name not in scores
            }
        minutes = minutes_of_stage(self.result)
        return scores if minutes is None else scores | {"minutes": minutes}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value, the same for all seeds; of a model before unlearning only what its scores depend on."""
        values = self.config
        if self.of_evaluation:
            values = {
                key: value for key, value in values.items() if key != "compared_to"
            }  # its ids differ between seeds
        elif self.reference and (self.name in BEFORE or {"method", "metrics"} & set(values)):
            evaluated_only = {"method", "metrics"} & set(values)  # the settings are those of the evaluation
            values = {
                "model": {key: values["model"].get(key) for key in CHECKPOINT},
                "data": without_seeds(evaluation_inputs(values)),
                "training": {} if evaluated_only else values.get("training", {}),
            }
        flat = dict(flattened(values))
        if "training.num_train_epochs" in flat:  # the one that is used; the recipes set it to num_epochs
            flat["training.num_epochs"] = flat["training.num_train_epochs"]
        flat = {key: value for key, value in flat.items() if key not in NOT_SETTINGS and not key.startswith("files.")}
        return {key: without_seeds(value) for key, value in flat.items()}

    def files(self, name: str) -> list[dict]:
        """The rows of a file of the newest evaluation that has it, else of the run itself; empty if there is none."""
        for folder in [*reversed(self.evaluations), self.folder]:
            if rows := rows_of(folder / name):
                return rows
        return []

    @property
    def contradictions(self) -> dict[str, list[float]]:
        """The scores that the run and its evaluations do not agree on, each with all its values, the newest last."""
        values: dict[str, list[float]] = {}
        for result in (self.result, *self.evaluations.values()):
            for name, value in result["scores"].items():
                if value is not None and not any(
                    math.isclose(value, other, rel_tol=1e-6) for other in values.get(name, [])
                ):
                    values.setdefault(name, []).append(value)
        return {name: found for name, found in values.items() if len(found) > 1}

    @property
    def begun_again(self) -> bool:
        """Whether another run was begun in the folder after the one with the result."""
        return (self.folder / "in_progress" / "run.json").is_file()

    @cached_property
    def history(self) -> list[dict]:
        return self.files(HISTORY)


@dataclass
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        name: the method, or the name of a reference model.
        runs: one for each seed.
        repeated: further runs of one of these seeds, which do not count.
        varied: the settings in which the groups of this method differ.
        best: names of the scores in which it is the best of the methods.
        on_front: whether no other group has higher unlearn quality and utility.
    """

    name: str
    runs: list[Run]
    repeated: list[Run] = field(default_factory=list)
    varied: dict[str, Any] = field(default_factory=dict)
    best: set[str] = field(default_factory=set)
    on_front: bool = False

    @property
    def reference(self) -> bool:
        return self.runs[0].reference

    @property
    def label(self) -> str:
        """The name with the varied settings, for instance "PMC, num_samples=5"."""
        names = shortened(self.varied)
        return ", ".join([self.name, *(f"{names[key]}={shown_value(value)}" for key, value in self.varied.items())])

    def values(self, score: str) -> list[float]:
        """The score of each run that has it."""
        return [value for run in self.runs if is_number(value := run.scores.get(score))]

    def average(self, score: str) -> float | None:
        """The mean over seeds, or the median of p-values."""
        values = self.values(score)
        return average(score, values) if values else None

    def deviation(self, score: str) -> float | None:
        """The standard deviation over seeds (n - 1); None for fewer than two values, and for p-values."""
        return deviation(score, self.values(score))


def place(folder: Path) -> str:
    """A run's folder without what is above models/."""
    parts = folder.parts
    return "/".join(parts[parts.index("models") + 1 :]) if "models" in parts else folder.name


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSON lines file; empty, with a warning, if it cannot be read; empty if there is none."""
    try:
        return read_json_lines(path) if path.is_file() else []
    except ValueError as error:
        log.warning("%s: not readable (%s); it is left out of the report", path, error)
        return []


def shortened(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> the key without its section, "method.num_samples" -> "num_samples", where that names one key alone."""
    keys = list(keys)
    parts = Counter(key.split(".", 1)[-1] for key in keys)
    return {key: part if parts[part := key.split(".", 1)[-1]] == 1 else key for key in keys}


def shown_value(value: Any, digits: int = 17) -> str:
    """A setting as text; numbers that are not whole with so many significant digits."""
    if isinstance(value, float):
        value = float(f"{value:.{digits}g}")
    return value if isinstance(value, str) else json.dumps(value)


# --- reading ---


class _ModelSection(BaseModel):
    prompt: dict[str, Any]


class _DataSection(BaseModel):
    path: str | None
    splits: dict[str, Any]


class _Configuration(BaseModel):
    model: _ModelSection
    data: _DataSection
    evaluation: dict[str, Any]


class _Result(BaseModel):
    """What a report reads of a result.json."""

    id: str
    scores: dict[str, StrictFloat | StrictInt | None]
    seconds: dict[str, float] = {}
    config: _Configuration


def checked_result(folder: Path) -> dict[str, Any] | None:
    """The result in a folder; None if there is none from this program.

    Raises:
        UserError: if it is damaged: not JSON, or without a value that a report reads.
    """
    result = result_of(folder)
    if result is None or (isinstance(result["config"], dict) and not set(result["config"]) >= REQUIRED):
        return result  # of a program of its own, which is left out by name
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / RESULT}: {key}: {first['msg']}; repeat the run, or move the file away") from error
    return result


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders and their subfolders, with the models before unlearning, each once.

    Raises:
        UserError: for a folder that does not exist or has no run.
    """
    runs: dict[str, Run] = {}
    evaluations: list[tuple[Path, dict]] = []
    for folder in folders:
        if not folder.is_dir() and not failure_of(folder):
            raise UserError(f"{folder}: no such folder")
        found = list(_run_folders(folder))
        if not found:
            raise UserError(f"{folder}: no run is in it or its subfolders (a run has {RESULT})")
        for path in found:
            _read_run(path, runs, evaluations)
    for path, result in sorted(evaluations, key=lambda pair: (pair[0] / RESULT).stat().st_mtime):
        _add_evaluation(path, result, runs)
    return list(runs.values())


def _add_evaluation(path: Path, result: dict, runs: dict[str, Run]) -> None:
    """Add an evaluation to the run that made its model, which is added as well; without one it is a reference model."""
    section = result["config"]["model"]
    made_by, model = result["config"].get("start"), str(section.get("path"))
    folder, checkpoint = Path(resolve_path(model)), json.dumps([section.get(key) for key in CHECKPOINT])
    if made_by and made_by not in runs and _is_in(folder, made_by):
        _read_run(folder, runs, [])
    run = runs.get(made_by or checkpoint)
    if run is None and made_by:
        status = f"left out: {model} was trained again or removed after this evaluation"
        runs[str(path)] = Run(path, _name_of_model(model), result, status)
    elif run is None:
        runs[checkpoint] = Run(path, _name_of_model(model), result, reference=True)
    elif why := not_of_run(result, run):
        runs[str(path)] = Run(path, run.name, result, f"left out: {why}")
    elif path not in run.evaluations:
        run.evaluations[path] = result


def not_of_run(result: dict[str, Any], run: Run) -> str | None:
    """Why an evaluation of the run's model says nothing of the run; None if it has the run's data and other inputs."""
    keys = ", ".join(differing_inputs([result["config"], run.config]))
    return f"evaluated with another value of {keys} than its run {run.folder.name}" if keys else None


def _is_in(folder: Path, result: str) -> bool:
    """Whether the folder has the result with this id."""
    with contextlib.suppress(UserError):  # a damaged one
        return result_id(folder) == result
    return False


def read_evaluations(folders: Iterable[Path]) -> list[Run]:
    """A run for each evaluation in these folders: the rows of a sweep over settings of the evaluation."""
    runs = []
    for folder in folders:
        result, _, status = _read_results(folder)
        if result is None:
            runs.append(_run_without_result(folder, status))
        else:
            name = _name_of_model(str(result["config"]["model"].get("path")))
            runs.append(Run(folder, name, result, status, reference=True, of_evaluation=True))
    return runs


def has_run(folder: Path) -> bool:
    """Whether `read_runs` finds a run in this folder."""
    return next(_run_folders(folder), None) is not None


def _run_folders(folder: Path) -> Iterator[Path]:
    """The folders of runs: finished, unfinished or failed. Earlier results (previous/) and those of `BEFORE` are not."""
    if failure_of(folder) and not result_is_in(folder):
        yield folder
        return
    for path in [folder, *sorted(folder.rglob("*"))]:
        inside = path.relative_to(folder).parts
        if (
            not path.is_dir()
            or {"previous", FAILURES} & set(inside)
            or any(part.startswith("in_progress") for part in inside)
        ):
            continue
        if path.name in BEFORE and result_is_in(path.parent):
            continue
        if result_is_in(path) or (path / "in_progress" / "run.json").is_file() or (path / PUBLISHING).is_dir():
            yield path
        for failure in sorted((path / FAILURES).glob("*.json")):
            if not result_is_in(path / failure.stem):
                yield path / failure.stem


def result_is_in(folder: Path) -> bool:
    return (folder / RESULT).is_file()


def _read_run(path: Path, runs: dict[str, Run], evaluations: list[tuple[Path, dict]]) -> None:
    """Add the run in a folder, and the models before it."""
    result, before, status = _read_results(path)
    if result is None:
        runs.setdefault(str(path), _run_without_result(path, status))
        return
    if lacking := REQUIRED - set(result["config"]):
        status = f"left out: {RESULT} has no configuration of {', '.join(sorted(lacking))}"
        runs[str(path)] = Run(path, path.name, result, status)
        return
    if "metrics" in result["config"]:
        evaluations.append((path, result))
        return
    for folder, of_model in before.items():
        if set(of_model["config"]) >= REQUIRED:
            runs.setdefault(of_model["id"], Run(folder, folder.name, of_model, reference=True))
    run = Run(
        path,
        method_name(result["config"]) or path.parent.name,
        result,
        status,
        reference="method" not in result["config"],
    )
    known = runs.get(result["id"])
    if known is None or known.folder.name in BEFORE:  # the run itself, not the copy of its result in an unlearning run
        if known is not None:
            run.name = known.name
        runs[result["id"]] = run


def models_before(path: Path) -> dict[Path, dict]:
    """The results of the models before a run, by their folders, which have a name of `BEFORE`.

    Of a run that unlearned an unlearned model further they are those of the first run, if its folder still has that model.
    """
    before = {path / name: found for name in BEFORE if (found := checked_result(path / name))}
    start = before.get(path / "finetuned", {})
    if method_name(start.get("config", {})) is None:
        return before
    first = started_from(path)
    return models_before(Path(first)) if first and _is_in(Path(first), start["id"]) else {}


def _read_results(path: Path) -> tuple[dict | None, dict[Path, dict], str]:
    """The result of the run in a folder, those of the models before it by folder, and the run's status.

    Without a readable result the first is None, and the status says why.
    """
    failure = failure_of(path)
    if (path / PUBLISHING).is_dir():
        return None, {}, "unfinished: its files were not all moved up; the command of the run completes it"
    try:
        result = checked_result(path)
        before = models_before(path)
    except UserError as error:  # one broken file does not spoil the report of all others
        return None, {}, failure or f"failed: {error}"
    without_failure = "unfinished" if result is None else "done"
    return result, before, failure or without_failure  # a result beside a failure is an older one


def _run_without_result(path: Path, status: str) -> Run:
    config: Any = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none was begun, or its file is damaged
        config = read_json(path / "in_progress" / "run.json").get("config")
    config = config if isinstance(config, dict) else {}
    return Run(path, method_name(config) or path.parent.name, {"config": config, "scores": {}}, status)


def _name_of_model(path: str) -> str:
    """The recipe of a run's folder, or the path of another checkpoint."""
    parts = Path(path).parts
    return parts[-2] if parts[:1] == ("models",) and len(parts) > 2 else path


# --- grouping ---


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The finished runs, those with the same settings together; references first, then by descending unlearn quality.

    Best scores and the Pareto front are marked among the methods, unless the runs cannot be compared (`differences`).
    """
    done = [run for run in runs if run.status == "done"]
    by_settings: dict[str, Group] = {}
    for run in done:
        key = json.dumps([run.reference, run.name, run.settings], sort_keys=True)
        group = by_settings.setdefault(key, Group(run.name, []))
        # The same checkpoint, evaluated with several seeds, counts once.
        is_fixed = run.reference and run.seed is None
        seeds = [(other.seed, is_fixed or other.config.get("seed")) for other in group.runs]
        if (run.seed, is_fixed or run.config.get("seed")) not in seeds:
            group.runs.append(run)
        elif run.name not in BEFORE and not is_fixed:  # of those there is a copy in each run that started from them
            group.repeated.append(run)
    groups = list(by_settings.values())
    for name, reference in {(group.name, group.reference) for group in groups}:
        _name_varied([group for group in groups if group.name == name and group.reference == reference])
    methods = [group for group in groups if not group.reference]
    if not differences(done):
        _mark_best(methods)
        _mark_front(methods)
    order = {name: place for place, name in enumerate(BEFORE)}
    references = sorted(
        (group for group in groups if group.reference), key=lambda group: order.get(group.name, len(order))
    )
    return references + sorted(methods, key=lambda group: -(group.average("unlearn_quality") or 0.0))


def varied_keys(groups: Iterable[Group]) -> list[str]:
    """The settings in which some groups differ."""
    return list(dict.fromkeys(key for group in groups for key in group.varied))


def without_seeds(value: Any) -> Any:
    """The value with the seeds in the names of folders masked; lists and dictionaries as JSON."""
    value = json.dumps(value, sort_keys=True) if isinstance(value, list | dict | tuple) else value
    return re.sub(r"seed-\d+", "seed-N", value) if isinstance(value, str) else value


def _name_varied(groups: list[Group]) -> None:
    keys = dict.fromkeys(key for group in groups for key in group.runs[0].settings)
    missing = object()
    for key in keys:
        values = [group.runs[0].settings.get(key, missing) for group in groups]
        if any(value != values[0] for value in values):
            for group, value in zip(groups, values, strict=True):
                group.varied[key] = None if value is missing else value


def direction(runs: Iterable[Run], score: str) -> tuple[bool | None, float | None]:
    """Whether a score is better when higher (None: neither), and its ideal value (None: it has none)."""
    for run in runs:
        for result in (run.result, *run.evaluations.values()):
            if score in result.get("higher_is_better", {}):
                return result["higher_is_better"][score], result.get("ideal", {}).get(score)
    return (False, None) if score == "minutes" else (None, None)


def _mark_best(groups: list[Group]) -> None:
    runs = [run for group in groups for run in group.runs]
    for score in score_names(groups):
        higher, ideal = direction(runs, score)
        known = [group for group in groups if group.values(score)]
        if higher is None and ideal is None:
            continue
        if ideal is not None:  # above and below it do not cancel
            losses = [fmean(abs(value - ideal) for value in group.values(score)) for group in known]
        else:
            losses = [-group.average(score) if higher else group.average(score) for group in known]
        if len(set(losses)) < 2:
            continue
        for group, loss in zip(known, losses, strict=True):
            if loss == min(losses):
                group.best.add(score)


def _mark_front(groups: list[Group]) -> None:
    """Mark the groups on the Pareto front of unlearn quality and utility."""
    points = [(group, (group.average("unlearn_quality"), group.average("utility"))) for group in groups]
    points = [(group, point) for group, point in points if None not in point]
    for group, point in points:
        group.on_front = not any(
            other != point and all(a >= b for a, b in zip(other, point, strict=True)) for _, other in points
        )


def score_names(groups: Iterable[Group]) -> list[str]:
    """The names of all scores that a run has, in the order of the files."""
    return list(
        dict.fromkeys(
            name for group in groups for run in group.runs for name, value in run.scores.items() if value is not None
        )
    )


def differences(runs: Sequence[Run]) -> list[str]:
    """Why the scores of these unlearning runs cannot be compared; empty if they can.

    They must have been evaluated on the same data in the same way, and started from the same model for each seed. The start of
    a run that unlearns the model of another of these runs further is the other's.
    """
    runs = [run for run in runs if not run.reference]
    found = []
    for key, of_key in differing_inputs([run.config for run in runs]).items():
        values = list(dict.fromkeys(shown_value(without_seeds(value)) for value in of_key))
        if len(values) == 1:
            continue
        shown = " and ".join(values) if max(map(len, values)) < 40 else f"{len(values)} values"
        found.append(f"they were evaluated with different {key} ({shown})")
    starts: dict[int | None, set] = {}
    made_from = {run.result["id"]: run.config.get("start") for run in runs if "id" in run.result}
    for run in runs:
        start = run.config.get("start")
        while start in made_from:
            start = made_from[start]
        starts.setdefault(run.seed, set()).add(start)
    if several := [str(seed) for seed, ids in starts.items() if len(ids) > 1]:
        found.append(f"those of seed {', '.join(several)} started from different models")
    return found
