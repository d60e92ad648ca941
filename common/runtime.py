"""The process around a run: environment, files, errors that the user can mend, and what a result records of the machine."""

import contextlib
import difflib
import errno
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from dotenv import load_dotenv

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "hydra-core", "omegaconf", "rapidfuzz")
TINY = 2_000_000  # parameters below which a model runs on one CPU thread

# What safetensors and torch.save say, which lose the error's number.
SIGNS_OF_A_FULL_DISK = ("No space left", "inline_container", "PytorchStreamWriter", "file write failed")

log = logging.getLogger(__name__)


class UserError(Exception):
    """A problem that the user can mend; its text names the key or file, the value, and what to do."""


class Interrupted(SystemExit):
    """The run was asked to stop (SIGTERM, Ctrl-C) and left a checkpoint. Exits with 128 + the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


def prepare_process() -> None:
    """Load environment.local.env and environment.env; hand their token to the Hugging Face libraries, by the environment alone.

    Nothing is logged in by writing files, and nothing at all happens when no token is set.
    """
    load_dotenv(ROOT / "environment.local.env")
    load_dotenv(ROOT / "environment.env")
    for name in ("HUGGINGFACE_LOGIN_TOKEN", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"):
        if not os.environ.get(name):
            os.environ.pop(name, None)
    if token := os.environ.get("HUGGINGFACE_LOGIN_TOKEN"):
        os.environ.setdefault("HF_TOKEN", token)
    os.environ.setdefault("PMC_ROOT", str(ROOT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    # Bars for reading and writing files hide the ones that matter.
    transformers.utils.logging.disable_progress_bar()


def resolve_path(path: str) -> str:
    """An existing local path (relative to the working folder, then to the repository) made absolute; a hub id as it is."""
    expanded = Path(path).expanduser()
    for candidate in (expanded, ROOT / expanded):
        if candidate.exists():
            return str(candidate.resolve())
    return path


def looks_local(path: str) -> bool:
    """Whether a path is meant as a folder of this machine rather than as a hub id ("owner/name")."""
    return path.startswith((".", "/", "~", "models/")) or path.count("/") != 1


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean '<prefix>x'?` for the closest of the known words, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""


# --- files -------------------------------------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this process writes the files; the only one unless a launcher such as torchrun started several."""
    return os.environ.get("RANK", "0") == "0"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; the first process does."""
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
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextlib.contextmanager
def full_disk_as_user_error(folder: str | Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into an error that says what became of the old result."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not any(
            sign in str(error) for sign in SIGNS_OF_A_FULL_DISK
        ):
            raise
        raise UserError(
            f"{folder}: no space left on the device. Nothing was replaced: an earlier result of this run is still whole. "
            "Free some space and run the same command again; save_model=false needs far less."
        ) from error


# --- what a result records ---------------------------------------------------------------------------------------------


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


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


@cache
def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 natively (a GPU since Ampere; a CPU with AVX512-BF16 or AMX) and sooner.

    A CPU is asked by a product of each type: AVX512-BF16 is twice as fast as float32 on one, half as fast on another.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    seconds = seconds_of_a_product(torch.float32, torch.bfloat16)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    log.info("bfloat16 products are %.2g times as fast as float32 on this CPU: bf16=auto is %s", ratio, ratio > 1)
    return ratio > 1


def seconds_of_a_product(*dtypes: "torch.dtype") -> dict["torch.dtype", float]:
    """Seconds of a matrix product of each type on the CPU, the least of ten that take turns."""
    import torch

    found = dict.fromkeys(dtypes, math.inf)
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in dtypes}
    for _ in range(10):
        for dtype, matrix in matrices.items():
            started = time.perf_counter()
            torch.nn.functional.linear(matrix, matrix)
            found[dtype] = min(found[dtype], time.perf_counter() - started)
    return found


def peak_memory_bytes() -> int:
    """Peak memory of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def suitable_threads(model: "torch.nn.Module") -> Iterator[None]:
    """One CPU thread inside for a tiny model; as before afterwards.

    Its operations take microseconds, after each of which threads wait for the last of them: with other programs on the cores
    for as long as these have their turn, which is ten times the work. OMP_NUM_THREADS, where it is set, decides instead.
    """
    import torch

    before = torch.get_num_threads()
    parameters = list(model.parameters())
    tiny = sum(parameter.numel() for parameter in parameters) < TINY and parameters[0].device.type == "cpu"
    if tiny and before > 1 and "OMP_NUM_THREADS" not in os.environ:
        log_once("a model this small runs on one CPU thread; OMP_NUM_THREADS sets another number")
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def log_once(message: str) -> None:
    log.info(message)


# --- the command line --------------------------------------------------------------------------------------------------


def launch(main: Callable[[], None]) -> None:
    """Run a stage's Hydra entry point; print the errors that the user can mend as one message, without a traceback."""
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException

    prepare_process()
    sys.argv[1:] = [allow_new_key(word) for word in sys.argv[1:]]
    # Hydra otherwise prints its errors itself and exits before anybody can explain them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except UserError as error:
        sys.exit(f"\nError: {error}")
    except MissingConfigException as error:
        recipes = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        sys.exit(f"\nError: {error}\nRecipes in {CONFIGS}: {', '.join(recipes)}")
    except (ConfigCompositionException, HydraException) as error:
        sys.exit(f"\nError: {_explain_override(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


def allow_new_key(override: str) -> str:
    """Let `training.gradient_checkpointing=true` work although no YAML lists the key; mistyped keys are refused later.

    >>> allow_new_key("training.fp16=true")
    '++training.fp16=true'
    """
    sections = ("model.", "data.", "method.", "training.", "evaluation.")
    return f"++{override}" if override.startswith(sections) and "=" in override else override


def _explain_override(message: str) -> str:
    """Add the closest known key to Hydra's complaint about a mistyped override."""
    import re

    from omegaconf import OmegaConf

    mistyped = re.search(r"Could not override '([^']+)'", message)
    if not mistyped:
        return message
    known: set[str] = set()
    for path in CONFIGS.rglob("*.yaml"):
        group = path.relative_to(CONFIGS).parent.as_posix()
        prefix = "" if group == "." else group.replace("/", ".") + "."
        known.update(prefix + key for key in _dotted_keys(OmegaConf.load(path)))
    key = mistyped.group(1)
    return f"no key '{key}' in this configuration{did_you_mean(key, known)}"


def _dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node or ():
        yield f"{prefix}{key}"
        value = node._get_node(key)
        if hasattr(value, "keys") and not value._is_none() and not value._is_interpolation():
            yield from _dotted_keys(value, f"{prefix}{key}.")
