"""The configuration's fixed sections: names, types and checks. The values and their comments stand in configs/*.yaml.

`read_config` turns a composed Hydra configuration into these dataclasses and reports every problem at once, before
anything is loaded.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
PROMPT_STYLES = ("chat", "plain")


def at_least(settings: Any, least: float, *names: str) -> list[str]:
    """What to say of the settings that are smaller than allowed, infinite or not a number; None is allowed."""
    values = {name: getattr(settings, name) for name in names}
    allowed = f"{least:g} or more" if least == 0 else f"at least {least:g}"
    return [
        f"{name}={value}: expected {allowed}"
        for name, value in values.items()
        if value is not None and not least <= value < math.inf
    ]


def above_zero(settings: Any, *names: str) -> list[str]:
    """What to say of the settings that are not positive, infinite or not a number."""
    values = {name: getattr(settings, name) for name in names}
    return [f"{name}={value}: expected more than 0" for name, value in values.items() if not 0 < value < math.inf]


def share(settings: Any, *names: str) -> list[str]:
    """What to say of the settings that are not above 0 and at most 1."""
    values = {name: getattr(settings, name) for name in names}
    return [f"{name}={value}: expected 0 < {name} <= 1" for name, value in values.items() if not 0 < value <= 1]


@dataclass
class PromptConfig:
    style: str = MISSING
    """chat: the tokenizer's chat template; plain: the two templates below."""
    system: str | None = None
    """System message of a chat."""
    date_string: str | None = None
    """Date that a chat template prints, pinned so that results reproduce; null: not passed."""
    question: str = "Question: {question}\nAnswer:"
    """Plain style: the prompt."""
    answer: str = " {answer}"
    """Plain style: what follows the prompt, before the EOS token."""

    def problems(self) -> list[str]:
        found = []
        if self.style not in PROMPT_STYLES:
            found.append(f"style={self.style}: expected one of {', '.join(PROMPT_STYLES)}")
        if "{question}" not in self.question:
            found.append(f"question={self.question!r}: must contain {{question}}")
        if "{answer}" not in self.answer:
            found.append(f"answer={self.answer!r}: must contain {{answer}}")
        return found


@dataclass
class LoraSettings:
    r: int = 16
    """Rank of the adapter."""
    alpha: int = 32
    """Scale of the adapter: its output is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: Any = "all-linear"
    """Names of the layers that get an adapter, or "all-linear"."""
    merge: bool = False
    """Save the merged model instead of the adapter."""

    def problems(self) -> list[str]:
        found = at_least(self, 1, "r")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout={self.dropout}: expected 0 <= dropout < 1")
        return found


@dataclass
class NewModelConfig:
    """A model made from nothing: random weights, and a byte-level BPE tokenizer trained on the data set's text."""

    architecture: str = MISSING
    """`model_type` of transformers, for instance llama."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of that architecture's configuration class."""
    vocab_size: int = 2000
    """Number of tokens of the tokenizer."""
    tokenizer_splits: list[str] = field(default_factory=list)
    """Splits whose questions and answers the tokenizer is trained on."""

    def problems(self) -> list[str]:
        return at_least(self, 300, "vocab_size")


@dataclass
class ModelConfig:
    path: str | None = MISSING
    """Hub id or local folder of the weights; null where `new` is given."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`, dequantized on loading."""
    dtype: str = "float32"
    """Type that the parameters are kept in."""
    attn_implementation: str | None = None
    """Attention kernel of transformers (sdpa, flash_attention_2, eager); null: its default."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter instead of all parameters."""
    new: NewModelConfig | None = None
    """Make a new model instead of loading one."""
    made_by: str | None = None
    """Command that makes `path`, shown when it is missing."""

    def problems(self) -> list[str]:
        found = []
        if self.dtype not in DTYPES:
            found.append(f"dtype={self.dtype}: expected one of {', '.join(DTYPES)}")
        if self.path is None and self.new is None:
            found.append("path=null: expected a hub id or a folder")
        return found


@dataclass
class DataConfig:
    path: str = MISSING
    """Hub id, or a local folder of `<split>.json` files in JSON lines."""
    splits: dict[str, str | None] = field(default_factory=dict)
    """Role -> split, null for a role that the data set does not have; slices and sums as in "forget01[:20] + retain99[:60]"."""
    columns: dict[str, str] = field(default_factory=dict)
    """Field -> column of the files. Needed: question, answer."""
    max_length: int = 256
    """Longest training example in tokens; longer answers are cut there."""
    hub_configurations: bool = True
    """On the hub the splits are configurations with one "train" split each (as TOFU has them), not splits."""

    def problems(self) -> list[str]:
        found = [f"columns.{name}: missing" for name in ("question", "answer") if name not in self.columns]
        found += at_least(self, 2, "max_length")
        known = {"question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer"}
        found += [
            f"columns.{name}: no such field{did_you_mean(name, known, 'data.columns.')} (known: {', '.join(sorted(known))})"
            for name in self.columns
            if name not in known
        ]
        return found


@dataclass
class EvaluationConfig:
    max_length: int = 200
    """Longest prompt and greedy answer together, in tokens."""
    batch_size: int | None = None
    """TokenLosses generated side by side, at most; null: as many as a tenth of the memory holds."""
    full_eval: bool = False
    """Score all retain rows instead of 400 drawn with a fixed seed."""
    bf16: Any = False
    """Generate answers with a bfloat16 copy of a float32 model: true, false, or auto, where the hardware has it."""
    every_epochs: int = 0
    """Also evaluate after every so many epochs of training; 0: only at the end."""
    start: bool = True
    """Also evaluate the model that training starts from."""

    def problems(self) -> list[str]:
        found = at_least(self, 1, "max_length", "batch_size")
        if self.bf16 not in ("auto", True, False):
            found.append(f"bf16={self.bf16}: expected auto, true or false")
        return found + at_least(self, 0, "every_epochs")


@dataclass
class GenerationConfig:
    cuda_graphs: Any = False
    """Record the decode step as CUDA graphs: false, or auto on an NVIDIA GPU."""

    def problems(self) -> list[str]:
        return [] if self.cuda_graphs in (False, "auto") else [f"cuda_graphs={self.cuda_graphs}: expected false or auto"]


@dataclass
class RunConfig:
    """Everything that a stage's command line and recipe settle, read and checked."""

    seed: int
    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig
    generation: GenerationConfig
    training: dict[str, Any]
    save_model: bool
    overwrite: bool
    keep_checkpoints: bool
    output_dir: str | None
    models_dir: str
    settings: Any = None
    """The unlearning method's own knobs (its `Settings` dataclass); None in the other stages."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Further sections that only one stage has, by their names."""


SECTIONS = {"model": ModelConfig, "data": DataConfig, "evaluation": EvaluationConfig, "generation": GenerationConfig}
TOP_LEVEL = {
    "seed": int,
    "save_model": bool,
    "overwrite": bool,
    "keep_checkpoints": bool,
    "output_dir": str | None,
    "models_dir": str,
}


def read_config(
    cfg: DictConfig,
    settings_class: type | None = None,
    also: tuple[str, ...] = (),
    sections: dict[str, type] | None = None,
) -> RunConfig:
    """Check a composed configuration and turn it into dataclasses.

    Args:
        cfg: what Hydra composed.
        settings_class: the dataclass that `cfg.method` (less `_target_`) must fit.
        also: further top-level keys that the stage knows.
        sections: further sections that the stage knows, and the dataclass that each must fit.
    Raises:
        UserError: listing every problem, each with its key, its value and what is allowed.
    """
    problems: list[str] = []
    sections = sections or {}
    known = {*TOP_LEVEL, *SECTIONS, "training", *also, *sections} | ({"method"} if settings_class else set())
    problems += [f"{key}: no such key{did_you_mean(str(key), known)}" for key in cfg if key not in known]
    values = {key: _scalar(cfg, key, kind, problems) for key, kind in TOP_LEVEL.items()}
    if isinstance(values["seed"], int) and not 0 <= values["seed"] < 2**32:
        problems.append(f"seed={values['seed']}: expected 0 or more, and less than 2**32")
    for name, schema in SECTIONS.items():
        values[name] = read_section(name, schema, cfg.get(name), problems)
    values["training"] = _training(cfg.get("training"), problems)
    if settings_class:
        method = OmegaConf.masked_copy(cfg.method, [key for key in cfg.method if key != "_target_"])
        method._set_parent(cfg)
        values["settings"] = read_section("method", settings_class, method, problems)
    values["sections"] = {
        name: read_section(name, schema, cfg.get(name), problems) for name, schema in sections.items()
    }
    if problems:
        raise UserError(problem_list(problems))
    return RunConfig(**values)


def problem_list(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def read_section(name: str, schema: type, node: Any, problems: list[str]) -> Any:
    """Fit a configuration node to a dataclass, key by key; append what does not fit to `problems`.

    Returns the dataclass, or None where something was wrong.
    """
    before = len(problems)
    if not isinstance(node, DictConfig):
        problems.append(f"{name}: expected a section with keys, got {node!r}")
        return None
    fields = {f.name: f for f in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for key in node:
        if key not in fields:
            problems.append(
                f"{name}.{key}: no such key{did_you_mean(str(key), fields, f'{name}.')} (known: {', '.join(fields)})"
            )
            continue
        try:
            value = node[key]
            nested = _dataclass_of(hints[key])
            if nested and value is not None:
                values[key] = read_section(f"{name}.{key}", nested, value, problems)
            else:
                values[key] = _typed(schema, key, value)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{name}.{key}={_raw(node, key)}: expected {_type_name(hints[key])} ({reason})")
    missing = [key for key, spec in fields.items() if spec.default is MISSING and key not in node]
    problems += [f"{name}.{key}: missing; give it a value" for key in missing]
    complete = all(key in values for key, spec in fields.items() if spec.default is MISSING)
    section = schema(**values) if complete else None
    if section:  # keys that did not fit have their defaults here, so the others are still checked
        problems += [f"{name}.{problem}" for problem in section.problems()]
    return section if len(problems) == before else None


def _typed(schema: type, key: str, value: Any) -> Any:
    """`value` as the type that the schema's field declares; OmegaConf refuses what does not convert."""
    structured = OmegaConf.structured(schema)
    structured[key] = value
    typed = structured[key]
    return OmegaConf.to_container(typed, resolve=True) if OmegaConf.is_config(typed) else typed


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in `X` or `X | None`, None for other types."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _raw(node: DictConfig, key: str) -> Any:
    return OmegaConf.to_container(node, resolve=False).get(key)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _scalar(cfg: DictConfig, key: str, kind: Any, problems: list[str]) -> Any:
    """A top-level value of the given type; true is not taken for a number."""
    value = cfg.get(key)
    if not fits(value, kind):
        problems.append(f"{key}={value}: expected {_type_name(kind)}")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain YAML value is of a type such as int, float, bool, str, or a union of them."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, option) for option in typing.get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    return True  # dictionaries, enumerations and the like: their owner checks them


# --- training: Hugging Face TrainingArguments, by their own names ------------------------------------------------------

OURS = ("num_epochs", "warmup_epochs")
REFUSED = {
    "output_dir": "set the top-level output_dir instead",
    "hub_token": "put the token into environment.env: what stands here is written to the results",
    "push_to_hub_token": "put the token into environment.env: what stands here is written to the results",
    "seed": "set the top-level seed instead",
    "save_only_model": "a run could not be continued from such a checkpoint",
    "remove_unused_columns": "the data never passes through columns here",
}


def _training(node: Any, problems: list[str]) -> dict[str, Any]:
    """The `training` section as a dictionary, its names checked against TrainingArguments."""
    from transformers import TrainingArguments

    if node is None:  # a stage that does not train
        return {}
    if not isinstance(node, DictConfig):
        problems.append(f"training: expected a section with keys, got {node!r}")
        return {}
    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} | set(OURS)
    values = {}
    for key in node:
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"training.{key}={_raw(node, key)}: {str(error).splitlines()[0]}")
            continue
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if key in REFUSED:
            problems.append(f"training.{key}: {REFUSED[key]}")
        elif key not in known:
            problems.append(
                f"training.{key}: no such key{did_you_mean(str(key), known, 'training.')} (see TrainingArguments)"
            )
        elif not (key == "bf16" and value == "auto") and not fits(value, hints.get(key, float)):
            problems.append(f"training.{key}={value}: expected {_type_name(hints.get(key, float))}")
        else:
            values[key] = value
    problems += _training_ranges(values)
    return values


def _training_ranges(values: dict[str, Any]) -> list[str]:
    """What TrainingArguments itself would notice late or not at all."""
    at_least_one = ("per_device_train_batch_size", "gradient_accumulation_steps")
    found = [
        f"training.{key}={values[key]}: expected at least 1"
        for key in at_least_one
        if key in values and values[key] < 1
    ]
    found += [
        f"training.{key}={values[key]}: expected more than 0"
        for key in ("num_epochs", "num_train_epochs", "learning_rate")
        if key in values and values[key] <= 0
    ]
    trackers = values.get("report_to") or []
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker in ("wandb", "tensorboard", "trackio") and find_spec(tracker) is None:
            found.append(f"training.report_to={tracker}: not installed; pip install {tracker}")
    if values.get("warmup_epochs", 0) < 0:
        found.append(f"training.warmup_epochs={values['warmup_epochs']}: expected 0 or more")
    return found
