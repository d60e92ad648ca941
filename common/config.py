"""The configuration's fixed sections: names, types, ranges and what each key means. The values stand in configs/*.yaml.

`read_config` turns a composed Hydra configuration into these dataclasses and reports every problem at once, before
anything is loaded.
"""

import dataclasses
import json
import typing
from importlib.util import find_spec
from typing import Annotated, Any, Literal, NotRequired

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict, is_typeddict

from common.errors import UserError, did_you_mean

# Of every section: no unknown keys; true and "5" are no numbers, nor are infinity and NaN.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


@typing.dataclass_transform(field_specifiers=(Field,))
def section(cls: type) -> Any:
    """Make the class a dataclass that refuses what does not fit its fields."""
    return dataclass(cls, config=STRICT)


@section
class PromptConfig:
    style: Literal["chat", "plain"] = Field(description="chat: the tokenizer's chat template; plain: plain text")
    system: str | None = Field(None, description="system message of a chat")
    date_string: str | None = Field(None, description="date that a chat template prints, null: not passed")
    question: str = Field("Question: {question}\nAnswer:", description="plain style: the prompt")
    answer: str = Field(" {answer}", description="plain style: what follows the prompt, before the EOS token")

    @field_validator("question", "answer")
    @classmethod
    def has_placeholder(cls, template: str, info: ValidationInfo) -> str:
        if f"{{{info.field_name}}}" not in template:
            raise ValueError(f"must contain {{{info.field_name}}}")
        return template


@section
class LoraSettings:
    r: int = Field(16, ge=1, description="rank of the adapter")
    alpha: int = Field(32, description="scale of the adapter, its output is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Any = Field("all-linear", description="names of the layers that get an adapter, or all-linear")
    merge: bool = Field(False, description="save the merged model instead of the adapter")


@section
class NewModelConfig:
    """A model made from nothing: random weights, and a byte-level BPE tokenizer trained on the data set's text."""

    architecture: str = Field(description="model_type of transformers, for instance llama")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the architecture's configuration class"
    )
    vocab_size: int = Field(2000, ge=300, description="number of tokens of the tokenizer")
    tokenizer_splits: list[str] = Field(
        default_factory=list, description="splits whose questions and answers the tokenizer is trained on"
    )


@section
class ModelConfig:
    new: NewModelConfig | None = Field(None, kw_only=True, description="make a new model instead of loading one")
    path: str | None = Field(description="hub id, or local folder of the weights")
    prompt: PromptConfig = Field(description="how a question is put to the model")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    gguf_file: str | None = Field(None, description="name of a GGUF file inside the path, dequantized on loading")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of the parameters")
    attn_implementation: str | None = Field(
        None, description="attention kernel of transformers (sdpa, flash_attention_2, eager), null: its default"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the weights")
    lora: LoraSettings | None = Field(None, description="train a LoRA adapter instead of all parameters")
    made_by: str | None = Field(None, description="command that makes the path, shown when it is missing")

    @field_validator("path")
    @classmethod
    def is_given(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None and info.data.get("new", "wrong") is None:
            raise ValueError("expected a hub id or a folder")
        return path


class Columns(TypedDict):
    question: str
    answer: str
    paraphrased_question: NotRequired[str]
    paraphrased_answer: NotRequired[str]
    perturbed_answer: NotRequired[str]


@section
class DataConfig:
    path: str = Field(description="hub id, or a local folder of <split>.json files in JSON lines")
    splits: dict[str, str | None] = Field(description="role: split, null for a role that the data set lacks")
    columns: Columns = Field(description="field: column of the files")
    max_length: int = Field(256, ge=2, description="longest training example in tokens; longer answers are cut there")
    hub_configurations: bool = Field(
        True, description="on the hub every split is a configuration of its own, as in TOFU"
    )


@section
class EvaluationConfig:
    max_length: int = Field(200, ge=1, description="prompt and greedy answer together, in tokens")
    batch_size: int | None = Field(
        None, ge=1, description="answers generated side by side, at most; null: as many as a tenth of the memory holds"
    )
    full_eval: bool = Field(False, description="score all retain rows instead of 400 drawn with a fixed seed")
    bf16: Literal[False, True, "auto"] = Field(
        False, description="generate answers with a bfloat16 copy of a float32 model, auto: where the hardware has it"
    )
    every_epochs: int = Field(
        0, ge=0, description="also evaluate after every so many epochs of training; 0: only at the end"
    )
    start: bool = Field(True, description="also evaluate the model that training starts from")


@section
class GenerationConfig:
    cuda_graphs: Literal[False, "auto"] = Field(
        False, description="record the decode step as CUDA graphs: false, or auto on an NVIDIA GPU"
    )


@dataclasses.dataclass
class RunConfig:
    """Everything that a stage's command line and recipe settle, read and checked."""

    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of data order, sampling and new weights")]
    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig
    training: dict[str, Any]
    save_model: Annotated[bool, Field(description="keep the weights beside the results")]
    overwrite: Annotated[bool, Field(description="redo a run whose result is there")]
    keep_checkpoints: Annotated[bool, Field(description="keep the trainer's checkpoints after the run")]
    output_dir: Annotated[
        str | None, Field(description="folder of the run; null: models/<stage>/<recipe>/<seed and overrides>")
    ]
    models_dir: Annotated[str, Field(description="folder of all runs")]
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    settings: Any = None
    """The unlearning method's own knobs (its `Settings` dataclass); None in the other stages."""
    sections: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further sections that only one stage has, by their names."""


# The keys that every stage has, with their types; `training` is added by `_training_schema`.
KEYS = {
    name: hint
    for name, hint in typing.get_type_hints(RunConfig, include_extras=True).items()
    if name not in ("training", "settings", "sections")
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
    sections, method = sections or {}, {"method": settings_class} if settings_class else {}
    problems: dict[str, str] = {}
    values = _plain(cfg, problems)
    if isinstance(values.get("method"), dict):
        values["method"].pop("_target_", None)
    training = values.get("training")
    for key in REFUSED.keys() & training if isinstance(training, dict) else ():
        problems[f"training.{key}"] = f"training.{key}: {REFUSED[key]}"
    optional = {"training": (_training_schema() | None, None), **dict.fromkeys(also, (Any, None))}
    required = {name: (hint, ...) for name, hint in {**KEYS, **method, **sections}.items()}
    read = _validated(required | optional, values, problems)
    return RunConfig(
        **{name: getattr(read, name) for name in KEYS},
        training=training or {},
        settings=getattr(read, "method", None),
        sections={name: getattr(read, name) for name in sections},
    )


def read_section(name: str, schema: type, node: Any) -> Any:
    """A single section as its dataclass.

    Raises:
        UserError: listing every problem.
    """
    problems: dict[str, str] = {}
    values = {} if node is None else {name: _plain(node, problems, f"{name}.")}
    return getattr(_validated({name: (schema, ...)}, values, problems), name)


def problem_list(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _plain(node: Any, problems: dict[str, str], prefix: str = "") -> Any:
    """A configuration node as plain data without its missing values; what does not resolve is added to `problems`."""
    if not OmegaConf.is_dict(node):
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    values = {}
    for key in node:
        try:
            if not OmegaConf.is_missing(node, key):
                values[str(key)] = _plain(node[key], problems, f"{prefix}{key}.")
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(node, resolve=False)[key]
            problems[f"{prefix}{key}"] = f"{prefix}{key}={raw}: {str(error).splitlines()[0]}"
    return values


def _validated(keys: dict[str, Any], values: dict[str, Any], problems: dict[str, str]) -> Any:
    """The values as a model of these keys; raises a UserError with `problems` and all that pydantic finds."""
    schema = create_model("Configuration", __config__=STRICT, **keys)
    read = None
    try:  # as JSON: strict about numbers and texts, while a dictionary becomes a section
        read = schema.model_validate_json(json.dumps(values, default=str))
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            key, problem = _problem(schema, error)
            problems.setdefault(key, problem)
    if problems:
        raise UserError(problem_list(list(problems.values())))
    return read


def fields_of(hint: Any) -> dict[str, FieldInfo] | None:
    """The keys of the section in `X` or `X | None`; None where X is no section."""
    for option in typing.get_args(hint) or (hint,):
        if hasattr(option, "__pydantic_fields__"):
            return option.__pydantic_fields__
        if is_typeddict(option) or dataclasses.is_dataclass(option):  # the latter: of a user's own method
            return {name: FieldInfo.from_annotation(kind) for name, kind in typing.get_type_hints(option).items()}
    return None


def _problem(schema: type, error: Any) -> tuple[str, str]:
    """The key of one of pydantic's errors, and what to say of it."""
    path, hint, field, fields = [], schema, FieldInfo(), {}
    for part in error["loc"]:
        if (found := fields_of(hint)) is not None:
            fields, field = found, found.get(part, FieldInfo())
            hint = field.annotation
        elif typing.get_origin(hint) in (dict, list):
            hint = typing.get_args(hint)[-1]
        else:  # the option of a union that was tried
            break
        path.append(str(part))
    *above, name = path
    key, text = ".".join(path), error["msg"]
    if error["type"] == "missing":
        return key, f"{key}: missing; give it a value"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        prefix = "".join(f"{part}." for part in above)
        known = f" (known: {', '.join(fields)})" if len(fields) < 30 else " (see TrainingArguments)"
        return key, f"{key}: no such key{did_you_mean(name, fields, prefix)}{known}"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
    else:
        meaning = f" ({field.description})" if field.description else ""
        text = f"expected {_allowed(name, hint, field, error['type'])}{meaning}"
    return key, f"{key}={error['input']}: {text}"


def _allowed(name: str, hint: Any, field: FieldInfo, error: str) -> str:
    """What a key of this type and range may be, in words."""
    if fields_of(hint) is not None:
        return "a section with keys"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(value).lower() for value in typing.get_args(hint))
    if not error.startswith(("greater_than", "less_than", "finite_number")):
        return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    bounds = {sign: getattr(bound, sign) for bound in field.metadata for sign in SIGNS if hasattr(bound, sign)}
    finite = ["a finite number"] if error == "finite_number" else []
    if len(bounds) == 2:
        (low, least), (high, most) = bounds.items()
        return ", ".join([*finite, f"{least} {SIGNS[low]} {name} {SIGNS[high]} {most}"])
    words = {"gt": "more than {}", "ge": "at least {}"}
    texts = [words[sign].format(least) if least or sign == "gt" else "0 or more" for sign, least in bounds.items()]
    return ", ".join(finite + texts)


SIGNS = {"gt": "<", "ge": "<=", "lt": "<", "le": "<="}


# --- training: Hugging Face TrainingArguments, by their own names ------------------------------------------------------

REFUSED = {
    "output_dir": "set the top-level output_dir instead",
    "hub_token": "put the token into environment.env: what stands here is written to the results",
    "push_to_hub_token": "put the token into environment.env: what stands here is written to the results",
    "seed": "set the top-level seed instead",
    "save_only_model": "a run could not be continued from such a checkpoint",
    "remove_unused_columns": "the data never passes through columns here",
}


def _installed(trackers: Any) -> Any:
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        if tracker in ("wandb", "tensorboard", "trackio") and find_spec(tracker) is None:
            raise ValueError(f"{tracker} is not installed; pip install {tracker}")
    return trackers


def _training_schema() -> type:
    """TrainingArguments with our own keys, and the ranges that it would notice late or not at all."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    types = {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}
    types |= dict.fromkeys(REFUSED, Any)
    types |= dict.fromkeys(("num_epochs", "num_train_epochs", "learning_rate"), Annotated[float, Field(gt=0)])
    types |= dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), Annotated[int, Field(ge=1)])
    types["warmup_epochs"] = Annotated[float, Field(ge=0)]
    types["bf16"] = Literal[False, True, "auto"]
    trackers = hints["report_to"]
    types["report_to"] = Annotated[trackers, AfterValidator(_installed)]
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return create_model("Training", __config__=config, **{name: (hint, None) for name, hint in types.items()})
