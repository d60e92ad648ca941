"""result.json and the files of single rows: the measurements of a run, and everything that they depend on."""

import contextlib
import platform
import subprocess
import uuid
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.data import HEADLINE_ROLES
from common.errors import UserError
from common.files import ROOT, digest, is_first_process, read_json, write_json, write_json_lines, write_text
from common.hardware import device_name, has_fast_bf16, peak_memory_bytes

HEADLINE_FIELDS = ("question", "answer", "text", "paraphrased_question", "paraphrased_answer")  # of the headline scores
RESULT = "result.json"
PUBLISHING = "in_progress.publishing"  # inside a run's folder: the finished files that are being moved up
GENERATIONS = "generations.jsonl"  # one row per greedy answer
SAMPLES = "samples.jsonl"  # one row per question with its sampled answers
ROWS = "rows.jsonl"  # one row per score, with the values that the score is the mean of
HISTORY = "history.jsonl"  # one row per epoch of training
PICKS = "picks.jsonl"  # one row each time that PMC selects another answer to a question
CARD = "README.md"  # the model card, if there are weights
# Of weights, tokenizers and their settings.
CHECKPOINT_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".tiktoken")
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "hydra-core", "omegaconf", "rapidfuzz")


def result_of(folder: Path | str) -> dict | None:
    """The result in a folder, or None if there is none from this program.

    Raises:
        UserError: if it is not JSON, or if the files of a finished run are not all moved up.
    """
    path = Path(folder) / RESULT
    if not path.is_file():
        if (path.parent / PUBLISHING / RESULT).is_file():
            raise UserError(f"{folder}: the run stopped while its files were moved; the run's command completes it")
        return None
    try:
        result = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); move it away") from error
    return result if isinstance(result, dict) and "config" in result else None


def recorded_config(folder: Path | str) -> dict | None:
    """The configuration of the run that wrote the result in a folder; None if there is no result."""
    return (result_of(folder) or {}).get("config")


def is_unlearned(folder: Path | str) -> bool:
    """Whether the result in a folder is that of an unlearning run; false if there is no result."""
    return "method" in (recorded_config(folder) or {})


def method_name(config: dict) -> str | None:
    """Class name of the unlearning method in a run's configuration; None if it names none, as that of finetuning."""
    method = config.get("method")
    target = method.get("_target_") if isinstance(method, dict) else None
    return target and target.rpartition(".")[2]


def result_id(folder: Path | str) -> str | None:
    """The `id` of the result in a folder, which a run that starts from it records; None if there is no result."""
    return (result_of(folder) or {}).get("id")


def checkpoint_id(path: Path | str) -> str | None:
    """The id that a run which starts from a checkpoint records: its `result_id`, or that of its files; None on the hub."""
    if found := result_id(path):
        return found
    files = sorted(file for file in Path(path).glob("*") if file.suffix in CHECKPOINT_FILES and file.is_file())
    return digest(files) if files else None


def headline_scores(folder: Path) -> list[float]:
    """Unlearn quality and utility of a run: what the stages return, so that Hydra's sweepers can maximize them."""
    scores = result_of(folder)["scores"]
    return [scores["unlearn_quality"], scores["utility"]]


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def git_commit() -> str | None:
    """The commit of this repository, with "-dirty" appended if tracked files differ from it; None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_result(
    folder: Path,
    measured: dict[str, Any],
    row_files: dict[str, list[dict]],
    identity: dict[str, Any],
    started_from: str | None = None,
    command: str | None = None,
) -> None:
    """Write the files of single rows, then result.json. A folder with a result.json is therefore complete.

    Args:
        measured: scores, seconds and further measurements, from `Scores.as_result`.
        row_files: file name -> rows of the file.
        identity: the run's configuration, from `common.runs.comparable_config`.
        started_from: the checkpoint that training started from: a hub id, or a path relative to the run's folder.
        command: that made the result, from `common.command.this_command`.
    """
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
    for name, rows in row_files.items():
        write_json_lines(folder / name, rows)
    result = {
        **measured,
        "device": device_name(),
        "bf16_auto": has_fast_bf16() if "auto" in bf16_settings(identity) else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "id": uuid.uuid4().hex,
        "started_from": started_from,
        "command": command,
        "config": identity,
    }
    write_json(folder / RESULT, result)


def bf16_settings(identity: dict[str, Any]) -> list[Any]:
    """`bf16` of training and of evaluation in a run's configuration."""
    return [(identity.get(section) or {}).get("bf16") for section in ("training", "evaluation")]


def started_from(folder: Path | str) -> str | None:
    """The checkpoint that the run in a folder started from, as a path or a hub id; None if that is not recorded."""
    start = (result_of(folder) or {}).get("started_from")
    beside = Path(folder) / str(start)
    return str(beside.resolve()) if start and beside.exists() else start


def stored_result(folder: str | Path, identity: dict[str, Any]) -> dict | None:
    """The result in a checkpoint's folder, if it was evaluated on the same data in the same way."""
    result = result_of(folder)
    if result is None or differing_inputs([result["config"], identity]):
        return None
    dtype = identity["model"].get("dtype")
    return result if result["config"]["model"].get("dtype", dtype) == dtype else None


def evaluation_inputs(identity: dict[str, Any]) -> dict[str, Any]:
    """The settings that the headline scores depend on, apart from the weights: dotted key -> value."""
    data, evaluation, files = identity["data"], identity["evaluation"], identity.get("files", {})
    return {
        "data.path": data["path"],
        "data.splits": {role: data["splits"][role] for role in HEADLINE_ROLES if data["splits"].get(role) is not None},
        **{f"data.files.{role}": files[role] for role in HEADLINE_ROLES if role in files},
        "data.columns": {field: data.get("columns", {}).get(field) for field in HEADLINE_FIELDS},
        "data.windows": data.get("windows"),
        "data.words": data.get("words", "latin"),
        **{f"evaluation.{key}": evaluation.get(key) for key in ("max_length", "full_eval", "bf16")},
        "model.prompt": identity["model"]["prompt"],
        "generation.engine": identity.get("generation", {}).get("engine", "own"),
    }


def differing_inputs(identities: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys of which `evaluation_inputs` has different values, with these; one that is not recorded is no difference."""
    values: dict[str, list[Any]] = {}
    for identity in identities:
        for key, value in evaluation_inputs(identity).items():
            of_key = values.setdefault(key, [])
            if value not in of_key:
                of_key.append(value)
    return {key: found for key, found in values.items() if len(found) > 1}


def copy_result(source: str | Path, target: Path) -> None:
    """Copy a run's result.json and generations.jsonl, each complete or not at all, the result last."""
    if is_first_process():
        target.mkdir(parents=True, exist_ok=True)
    for name in (GENERATIONS, RESULT):
        write_text(target / name, (Path(source) / name).read_text(encoding="utf-8"))
