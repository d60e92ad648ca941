"""Paths, and writing files so that they are complete or absent."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half of a pair; alone it is not text and cannot be written


def resolve_path(path: str) -> str:
    """The absolute path, if it exists in the working folder or else in the repository. Others (hub ids) stay unchanged."""
    expanded = Path(path).expanduser()
    for candidate in (expanded, ROOT / expanded):
        if candidate.exists():
            return str(candidate.resolve())
    return path


def looks_local(path: str) -> bool:
    """Whether a path is meant as a local folder, not as a hub id ("owner/name")."""
    return path.startswith((".", "/", "~", "models/")) or path.count("/") != 1


def is_hub_id(path: str | None) -> bool:
    """Whether a path of weights or data is neither empty nor an existing or missing local folder."""
    return bool(path) and not looks_local(path) and not Path(resolve_path(path)).exists()


def local_file(path: str) -> Path | None:
    """The file that a text names, in the working folder or in the repository; None if it names none."""
    try:
        found = Path(resolve_path(path))
        return found if found.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path, "~name" of nobody, a null character
        return None


def source_file(dotted_path: str) -> Path | None:
    """The file of the module that a dotted path such as `my_module.my_function` names; None if there is no such module."""
    module = dotted_path
    while "." in module:
        module = module.rpartition(".")[0]
        with contextlib.suppress(ImportError, ValueError):  # a class in place of a package, as in module.Class.method
            spec = importlib.util.find_spec(module)
            if spec and spec.has_location:
                return Path(spec.origin)
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(paths: Iterable[Path]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 of the contents of files.

    Raises:
        UserError: if a file cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(bytes.fromhex(_sha256_of(path, path.stat().st_mtime_ns, path.stat().st_size)))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return found.hexdigest()[:16]


@cache
def _sha256_of(path: Path, changed: int, size: int) -> str:
    """`sha256`, computed again only after the file was changed: weights have gigabytes."""
    return sha256(path)


def is_first_process() -> bool:
    """Whether this process writes the files. False only in further processes of a launcher such as torchrun."""
    return os.environ.get("RANK", "0") == "0"


def write_text(path: Path, text: str) -> None:
    """Write a complete file or none. Only the first process writes."""
    if not is_first_process():
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
