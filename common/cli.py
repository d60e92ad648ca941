"""The command line of a stage: environment variables, overrides, and short messages for errors that the user can fix."""

import contextlib
import gc
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import transformers
from dotenv import load_dotenv
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import Pruned, UserError, did_you_mean, first_line, full_disk_as_user_error
from common.files import CONFIGS, ROOT, SURROGATE
from common.hardware import settle_processes
from common.job import is_in_sweep, typed_overrides
from common.recipes import deciding_key, program_of, recipe_folders, recipes_of
from common.redaction import secret_in
from common.sweeps import Sweep, current_sweep

log = logging.getLogger(__name__)


class LabeledWarnings(logging.Formatter):
    """The format of the log, with `Warning: ` in front of a warning's message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (its name in the base class)
        if record.levelno == logging.WARNING:
            record.message = f"Warning: {record.message}"
        return super().formatMessage(record)


def prepare_process() -> None:
    """Load environment.local.env and environment.env, and set the variables that the libraries read.

    The Hugging Face token is only set as an environment variable. Logging in would write it to a file.
    """
    load_dotenv(ROOT / "environment.local.env")
    load_dotenv(ROOT / "environment.env")
    for name in ("HUGGINGFACE_LOGIN_TOKEN", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"):
        if os.environ.get(name) == "":
            del os.environ[name]
    if token := os.environ.get("HUGGINGFACE_LOGIN_TOKEN"):
        os.environ.setdefault("HF_TOKEN", token)
    os.environ.setdefault("PMC_ROOT", str(ROOT))
    # Processes that a launcher starts must find the packages of this repository as well.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    # Hydra logs an error that importing a name raises. The stage prints it as well.
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it logs each file of a checkpoint
    # Hides the progress bars for reading and writing files, which would clutter the output of training.
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # a garbage collection, of which the Trainer makes several, takes half a second with the imported modules


def launch(
    main: Callable[[], None], one_process: bool = False, after_sweep: Callable[[Sweep], None] | None = None
) -> None:
    """Run a stage's Hydra entry point. An error that the user can fix is printed without a traceback.

    Args:
        one_process: whether the program is refused where a launcher started several processes.
        after_sweep: called at the end of a sweep, also when jobs failed or Ctrl-C stopped it.
    """
    prepare_process()
    module = sys.modules[main.__module__]
    program = Path(module.__file__).resolve().relative_to(ROOT).as_posix()
    # Makes Hydra raise its errors. By default it prints them and exits.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        settle_processes(one_process)
        check_words(sys.argv[1:])
        if {"--help", "-h"} & set(sys.argv):  # Hydra adds the configuration
            print(program_help(program, module.__doc__), flush=True)
        sys.argv[1:] = [allow_new_key(word) for word in sys.argv[1:]]
        try:
            main()
        finally:
            if after_sweep and (sweep := current_sweep()):
                after_sweep(sweep)
    except BrokenPipeError:  # whatever read the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if (message := user_message(error, program)) is None:
            raise
        sys.exit(message)
    except KeyboardInterrupt:
        sys.exit(130)


def program_help(program: str, description: str) -> str:
    """What --help shows before the configuration: the script's docstring and the program's recipes."""
    recipes = recipes_of(program, recipe_folders(sys.argv[1:]))
    width = max(map(len, recipes), default=0)
    lines = [f"  {name:{width}}  {text}" for name, text in recipes.items()]
    return "\n".join([description, "Recipes (-cn=NAME):", "", *lines, ""])


def user_message(error: Exception, program: str = "") -> str | None:
    """What is printed for an error that the user can fix; None for any other.

    Args:
        program: path of the running script in the repository. Only its recipes are suggested.
    """
    if isinstance(error, UserError):
        return f"\nError: {error}"
    if isinstance(error, OmegaConfBaseException):  # for instance of an interpolation
        return f"\nError: {error.full_key}: {first_line(error)}"
    if isinstance(error, PermissionError):
        return f"\nError: {error.filename}: {error.strerror}; change its permissions, or name another file or folder"
    if isinstance(error, MissingConfigException):
        return f"\nError: {_explain_missing(error, program)}"
    if isinstance(error, OverrideParseException):
        return f"\nError: {_explain_syntax(error)}"
    if isinstance(error, ValueError) and str(error).startswith("Only one of --"):  # Hydra's
        return "\nError: --cfg, --info, --run and --multirun (-m) exclude each other; --cfg job shows one run: leave out -m"
    return f"\nError: {_explain_override(str(error))}" if isinstance(error, HydraException) else None


def check_words(words: list[str]) -> None:
    """Check what Hydra does not accept and has no message for.

    Raises:
        UserError: for a secret (it is not repeated), a word that is not text, a recipe named by its file, and a group that
            is not one of its files.
    """
    for word in words:
        if secret := secret_in(word):
            raise UserError(
                f"{secret}: a secret on the command line would be logged and written to files; put it into "
                "environment.local.env (another key can refer to a variable there: KEY=${oc.env:NAME})"
            )
        if SURROGATE.search(word):
            raise UserError(f"{word!r}: is not UTF-8 text")
        key, _, value = word.lstrip("+").partition("=")
        if key in ("-cn", "--config-name") and value.endswith(".yaml"):
            raise UserError(f"{word}: name the recipe without its ending, {key}={value.removesuffix('.yaml')}")
        if (CONFIGS / key).is_dir() and key and re.match(r"null$|[\[{]|$", value) and "=" in word:
            choices = ", ".join(sorted(path.stem for path in (CONFIGS / key).glob("*.yaml")))
            raise UserError(f"{word}: expected one of {choices}")


def allow_new_key(override: str) -> str:
    """Prefix an override with "++", so that it can also set a key that no YAML file lists.

    `read_config` rejects mistyped keys later.


    >>> allow_new_key("training.fp16=true")
    '++training.fp16=true'
    """
    sections = ("model.", "data.", "method.", "training.", "evaluation.")
    return f"++{override}" if override.startswith(sections) and "=" in override else override


def quoted(key: str, value: str) -> str:
    """An override whose value Hydra reads as text, whatever characters it has.

    >>> print(quoted("output_dir", "/runs (new)/a=b"))
    output_dir="/runs (new)/a=b"
    """
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


def _explain_missing(error: MissingConfigException, program: str) -> str:
    """The recipe, or the file that it inherits, that does not exist, with those that do."""
    missing = str(error.missing_cfg_file)
    if str(error).startswith("Cannot find primary config"):
        recipes = recipes_of(program, recipe_folders(sys.argv[1:]))
        return (
            f"-cn={missing}: no such recipe{did_you_mean(missing, recipes)}\nRecipes of {program}: {', '.join(recipes)}"
        )
    options = list(error.options or [])
    expected = f"\nExpected one of {', '.join(options)}" if options else ""
    return f"{first_line(error)}{did_you_mean(missing.rpartition('/')[2], options)}{expected}"


def _explain_syntax(error: OverrideParseException) -> str:
    """The override that Hydra's parser refused, with the quoting that it accepts."""
    typed = error.override.removeprefix("++")
    key, _, value = typed.partition("=")
    problem = f"{typed}: {error.message.splitlines()[0]}"
    if value.startswith(("{", "[", '"', "'")):
        return f"{problem}; check its brackets and quotes"
    word = quoted(key, value)
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return f"{problem}; expected KEY=VALUE"
    return f"{problem}; quote the value, once for Hydra and once for the shell: {shlex.quote(word)}"


def _explain_override(message: str) -> str:
    """Hydra's message, or for a mistyped override a message with the closest known key."""
    mistyped = re.search(r"Could not override '([^']+)'", message)
    if merged := re.fullmatch(r"Error merging override (.+)", message):
        return (
            f"{merged[1]}: the recipe has a value of another kind for this key, such as a mapping, into which it cannot be "
            "merged; give one of that kind ({NAME:VALUE}), or use a recipe without it"
        )
    if not mistyped:
        return message
    known: set[str] = set()
    for path in CONFIGS.rglob("*.yaml"):
        is_global = path.parent == CONFIGS or path.read_text(encoding="utf-8").startswith("# @package _global_")
        prefix = "" if is_global else f"{path.parent.name}."
        known.update(_dotted_keys(OmegaConf.to_container(OmegaConf.load(path)), prefix))
    return f"no key '{mistyped[1]}' in this configuration{did_you_mean(mistyped[1], known)}"


def _dotted_keys(values: dict, prefix: str) -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")


def replace_mapping(cfg: DictConfig, key: str) -> None:
    """Set the key to the mapping that the command line gives, if it does. Hydra adds it to the recipe's mapping."""
    parser = OverridesParser.create()
    for override in map(parser.parse_override, typed_overrides()):
        if override.key_or_group == key and isinstance(override.value(), dict):
            OmegaConf.update(cfg, key, override.value(), merge=False, force_add=True)


def recipe_config(recipe: str, *overrides: str) -> DictConfig:
    """The configuration that a stage's command composes, for calling the stage from Python, as docs/quickstart.ipynb does.

    The run's folder is that of the command. `prepare_process` is called first.

    Raises:
        UserError: for a secret.
        HydraException: for a recipe or an override that Hydra refuses.
    """
    prepare_process()
    check_words(list(overrides))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(recipe, list(map(allow_new_key, overrides)), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # names the run's folder
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    replace_mapping(cfg, "model.new.settings")
    return cfg


def check_recipe(cfg: DictConfig, program: str) -> None:
    """Check that the composed recipe belongs to this program.

    Raises:
        UserError: names the program that the recipe belongs to.
    """
    if (belongs_to := program_of(cfg)) != program:
        key = deciding_key(cfg)
        name = HydraConfig.get().job.config_name
        why = f"it has the key {key}" if key else "it has neither the key method nor the key metrics"
        raise UserError(f"recipe {name} does not belong to {program}: {why}; use {belongs_to}")


@contextlib.contextmanager
def job_errors(folder: str | Path) -> Iterator[None]:
    """A context for one job: turn a full disk into a UserError; exit with the message of an error that the user can fix.

    Exiting spares Hydra's own line on the error. A sweep continues after a failed job; its error is logged at once.
    """
    try:
        with full_disk_as_user_error(folder):
            yield
    except Exception as error:
        if isinstance(error, Pruned):
            log.info("pruned: %s", error)
        elif is_in_sweep():
            traceback = None if isinstance(error, UserError) else error
            log.error("this job failed, the sweep continues: %s", error, exc_info=traceback)
        elif message := user_message(error):
            sys.exit(message)
        raise
