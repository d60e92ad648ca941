"""result.json and the files beside it: what a run measured, and everything that the measurement depends on."""

import contextlib
import platform
import shutil
import subprocess
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import ROOT, is_first_process, read_json, write_json, write_json_lines
from common.hardware import device_name, peak_memory_bytes

RESULT = "result.json"


def result_of(folder: Path | str) -> dict | None:
    """The result in a folder, or None where there is none of ours."""
    path = Path(folder) / RESULT
    if not path.is_file():
        return None
    try:
        result = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); move it away") from error
    return result if isinstance(result, dict) and "config" in result else None


RECORDED_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "hydra-core", "omegaconf", "rapidfuzz")


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """The commit of this checkout, "-dirty" appended when tracked files differ from it; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


GENERATIONS = "generations.jsonl"
ROWS = "rows.jsonl"
SAMPLES = "samples.jsonl"
HISTORY = "history.jsonl"


def write_result(
    folder: Path,
    scores: Any,
    identity: dict[str, Any],
    seconds: dict[str, float],
    started_from: str | None = None,
) -> None:
    """Write the files of single rows, then result.json: a folder with a result.json is complete.

    generations.jsonl has a row a greedy answer, samples.jsonl a row a question, rows.jsonl a row a score with the values
    that it is the mean of.

    Args:
        identity: the run's configuration, from `common.runs.comparable_config`.
        seconds: where the time went.
        started_from: the checkpoint that was trained further: a hub id, or a path relative to the run's folder.
    """
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / GENERATIONS, scores.generations)
    if scores.samples:
        write_json_lines(folder / SAMPLES, scores.samples)
    if scores.rows:
        write_json_lines(folder / ROWS, ({"name": name, **values} for name, values in scores.rows.items()))
    write_json(
        folder / RESULT,
        {
            "scores": scores.values,
            "higher_is_better": scores.higher_is_better,
            "ideal": scores.ideal,
            "counts": scores.counts,
            "left_out": scores.left_out,
            "notes": scores.notes,
            "histograms": scores.histograms,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": device_name(),
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": package_versions(),
            "git_commit": git_commit(),
            "id": uuid.uuid4().hex,
            "started_from": started_from,
            "config": identity,
        },
    )


def started_from(folder: Path | str) -> str | None:
    """The checkpoint that the run in a folder trained further, as a path or a hub id; None where that is not known."""
    start = (result_of(folder) or {}).get("started_from")
    beside = Path(folder) / str(start)
    return str(beside.resolve()) if start and beside.exists() else start


def stored_result(folder: str | Path, identity: dict[str, Any]) -> dict | None:
    """The result in a checkpoint's folder, if it was evaluated on the same data in the same way."""
    result = result_of(folder)
    if result is None:
        return None
    same = all(_how_evaluated(result["config"])[key] == value for key, value in _how_evaluated(identity).items())
    return result if same else None


def _how_evaluated(identity: dict[str, Any]) -> dict[str, Any]:
    data, evaluation = identity["data"], identity["evaluation"]
    return {
        "data": (data["path"], {role: split for role, split in data["splits"].items() if role != "train"}),
        "evaluation": {key: evaluation.get(key) for key in ("max_length", "full_eval", "bf16")},
        "prompt": identity["model"]["prompt"],
    }


def copy_result(source: str | Path, target: Path) -> None:
    """Copy a run's result.json and generations.jsonl, the result last."""
    if not is_first_process():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in (GENERATIONS, RESULT):
        shutil.copyfile(Path(source) / name, target / name)
