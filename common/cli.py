"""The command line: environment variables, overrides, and one message for each error that the user can fix."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from common.errors import UserError, full_disk_as_user_error
from common.files import CONFIGS, ROOT

if TYPE_CHECKING:
    pass
from common.errors import did_you_mean

log = logging.getLogger(__name__)


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
    # Processes that a launcher starts import from the repository, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    # Bars for reading and writing files hide the ones that matter.
    transformers.utils.logging.disable_progress_bar()


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


@contextlib.contextmanager
def job_errors(folder: str | Path) -> Iterator[None]:
    """Around one job: name a full disk as such, and in a sweep log a job's error at once, for the others go on."""
    try:
        with full_disk_as_user_error(folder):
            yield
    except UserError as error:
        if _in_sweep():
            log.error("this job failed, the others go on: %s", error)
        raise
    except Exception:
        if _in_sweep():
            log.exception("this job failed, the others go on")
        raise


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
