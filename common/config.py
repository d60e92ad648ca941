"""The sections of the configuration: each key with its type, range and meaning. The values are in configs/*.yaml.

`read_config` turns a composed Hydra configuration into these dataclasses. It reports all problems at once, before any
data or model is loaded.
"""

import dataclasses
import json
import re
import types
import typing
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal, NotRequired

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from typing_extensions import TypedDict, is_typeddict

from common.errors import UserError, did_you_mean, first_line

# Rejects unknown keys, true and "5" where a number is expected, infinity and NaN.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

Fraction = Annotated[float, Field(gt=0, le=1)]


@typing.dataclass_transform(field_specifiers=(Field,))
def section(cls: type) -> Any:
    """Make the class a dataclass that checks its fields. The string under a field is the field's description."""
    made = dataclass(cls, config=STRICT | {"use_attribute_docstrings": True})
    for name, field in made.__pydantic_fields__.items():
        for parent in cls.__mro__[1:]:  # pydantic reads only the strings in the class itself
            inherited = getattr(parent, "__pydantic_fields__", {}).get(name)
            field.description = field.description or (inherited and inherited.description)
        field.description = field.description and " ".join(field.description.split())
    return made


@section
class PromptConfig:
    style: Literal["chat", "plain"]
    """chat: the tokenizer's chat template; plain: plain text."""
    system: str | None = None
    """System message of a chat."""
    date_string: str | None = None
    """Date that a chat template prints; null: the template's default."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the chat template, for instance {enable_thinking: false}."""
    question: str = "Question: {question}\nAnswer:"
    """plain style: the prompt."""
    answer: str = " {answer}"
    """plain style: the text between the prompt and the EOS token."""

    @field_validator("question", "answer")
    @classmethod
    def has_placeholder(cls, template: str, info: ValidationInfo) -> str:
        if f"{{{info.field_name}}}" not in template:
            raise ValueError(f"must contain {{{info.field_name}}}")
        if info.field_name == "answer" and template.rpartition("{answer}")[2].strip():
            raise ValueError("must end with {answer}: text after it would count as words of every answer")
        return template

    @property
    def is_bare(self) -> bool:
        """Whether a prompt and its answer are tokenized as one running text, with a space between them.

        A tokenizer that itself puts a space before every text, as that of Llama 2, needs the answer without one.
        """
        return (self.style, self.question) == ("plain", "{question}") and self.answer in (" {answer}", "{answer}")


def prompt_with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded `model.prompt`, with the defaults of the keys that are not recorded."""
    return dataclasses.asdict(PromptConfig(style="plain")) | recorded


@section
class LoraSettings:
    r: PositiveInt = 16
    """Rank of the adapter."""
    alpha: PositiveInt = 32
    """The adapter's output is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter, or all-linear."""
    merge: bool = False
    """Save the merged model instead of the adapter."""

    @field_validator("target_modules")
    @classmethod
    def compiles(cls, modules: str | list[str]) -> str | list[str]:
        try:
            re.compile(modules if isinstance(modules, str) else "")
        except re.error as error:
            raise ValueError(f"neither a list of names nor a regular expression ({error})") from error
        if not modules:
            raise ValueError("is empty; name the layers, or all-linear")
        return modules


@section
class NewModelConfig:
    """A new model: random weights, and a byte-level BPE tokenizer trained on the data set's text."""

    architecture: str
    """model_type of transformers, for instance llama."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture's configuration class."""
    vocab_size: int = Field(2000, ge=300)
    """Number of tokens of the tokenizer."""
    tokenizer_splits: list[str] = Field(default_factory=list)
    """Splits whose questions and answers the tokenizer is trained on."""


@section
class ModelConfig:
    _: dataclasses.KW_ONLY  # allows a default before required fields; the check of `path` needs `new`
    new: NewModelConfig | None = None
    """Make a new model instead of loading one."""
    path: str | None
    """Hub id, or local folder of the weights."""
    prompt: PromptConfig
    """Format of the questions and answers."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null: that of the path."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the path, dequantized on loading."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the parameters."""
    attn_implementation: str | None = None
    """Attention implementation in transformers (sdpa, flash_attention_2, eager); null: its default."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter instead of all parameters."""
    made_by: str | None = None
    """Command that creates the path; shown when the path is missing."""

    @field_validator("path")
    @classmethod
    def is_given(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None and info.data.get("new", "wrong") is None:
            raise ValueError("expected a hub id or a folder")
        return path


Column = str | Annotated[list[str], Field(min_length=1)]


class Columns(TypedDict):
    question: Column
    answer: Column
    paraphrased_question: NotRequired[Column]
    paraphrased_answer: NotRequired[Column]
    perturbed_answer: NotRequired[Column]
    entity: NotRequired[Column]
    text: NotRequired[Column]


@section
class WindowsConfig:
    """How texts are cut into prompts and their continuations."""

    words: Annotated[int, Field(ge=2)]
    """Words of a window, prompt included."""
    prompt_words: PositiveInt
    """Words of the prompt, at least; the rest of the window is the answer."""
    stride: PositiveInt
    """Words from the start of a window to that of the next."""

    @field_validator("stride")
    @classmethod
    def leaves_no_gap(cls, stride: int, info: ValidationInfo) -> int:
        words, prompt_words = info.data.get("words", stride), info.data.get("prompt_words", 0)
        if stride > words:
            raise ValueError(f"words between the windows would be lost; at most words={words}")
        if prompt_words >= words:
            raise ValueError(
                f"no words are left for the answer; prompt_words={prompt_words} must be below words={words}"
            )
        return stride


class Splits(TypedDict, total=False):
    """The roles that splits can have; the stages and the metrics read no others."""

    train: str | None
    forget: str | None
    forget_paraphrased: str | None
    retain: str | None
    retain_perturbed: str | None
    real_authors: str | None
    world_facts: str | None
    forget_passages: str | None
    forget_questions: str | None
    forget_questions_icl: str | None
    retain_questions: str | None
    retain_questions_icl: str | None
    holdout: str | None
    forget_texts: str | None
    holdout_texts: str | None
    unrelated: str | None


@section
class DataConfig:
    path: str
    """Hub id, or a local folder of <split>.json files in JSON lines."""
    splits: Splits
    """role: split, or configuration/split, or null if the data set has none."""
    columns: Columns
    """field: column of the data files, or a list of columns of which each split has one."""
    windows: WindowsConfig | None = None
    """How the texts of columns.text are cut into prompts and continuations; null: the data set has none."""
    words: Literal["latin", "unicode"] = "latin"
    """What ROUGE compares: latin: words of a-z and 0-9, as in the rouge_score package; unicode: words of any script,
    single characters for scripts without spaces."""
    max_length: int = Field(256, ge=2)
    """Maximum tokens of a training example; longer answers are truncated, longer windows refused."""
    hub_configurations: bool = True
    """Each split is a separate configuration on the hub, as in TOFU."""

    @field_validator("windows")
    @classmethod
    def has_texts(cls, windows: WindowsConfig | None, info: ValidationInfo) -> WindowsConfig | None:
        if "columns" in info.data and (windows is None) == ("text" in info.data["columns"]):
            raise ValueError("columns.text and windows need each other; give both, or neither")
        return windows


@section
class EvaluationConfig:
    max_length: PositiveInt = 200
    """Maximum tokens of a prompt with its greedy answer."""
    batch_size: int | None = Field(None, gt=0)
    """Maximum number of answers generated at once; null: as many as fit in a tenth of the memory."""
    full_eval: bool = False
    """Score all retain rows; false: of more than 400, 400 drawn with replacement and a fixed seed."""
    bf16: Literal[False, True, "auto"] = False
    """Generate answers with a bfloat16 copy of a float32 model; auto: only if bfloat16 is faster here."""
    every_epochs: NonNegativeInt = 0
    """Evaluate during training, each time this many epochs are done; 0: only at the end."""
    start: bool = True
    """Evaluate the model before training as well."""


@section
class GenerationConfig:
    cuda_graphs: Literal[False, "auto"] = False
    """Record the decode step as CUDA graphs: false, or auto on an NVIDIA GPU."""
    engine: Literal["own", "vllm"] = "own"
    """Own: the sampler of this project; vllm: vLLM (docs/speed.md names what it cannot do)."""
    vllm_memory_fraction: Fraction = 0.3
    """Fraction of the GPU's memory for vLLM's weights and cache in this process; training needs the rest."""
    vllm_server: str | None = None
    """Address of a vLLM server (docs/several-gpus.md), such as http://127.0.0.1:8000; null: vLLM in this process."""
    vllm_weights_dir: str | None = None
    """Folder in which weights are passed to the server, which must have it too; null: /dev/shm, on the same machine."""


@section
class StageConfig:
    """The keys of every stage, apart from `training`."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Seed for data order, sampling and new weights."""
    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig
    save_model: bool
    """Save the weights with the results."""
    overwrite: bool
    """Repeat a run that already has a result."""
    keep_checkpoints: bool
    """Keep the training checkpoints after the run."""
    output_dir: str | None
    """Folder of the run; null: models/<stage>/<recipe>/<seed and overrides>."""
    models_dir: str
    """Folder of all runs."""
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)


@dataclasses.dataclass(kw_only=True)
class RunConfig(StageConfig):
    """The checked configuration of a run."""

    training: dict[str, Any]
    settings: Any = None
    """The unlearning method's settings (its `Settings` dataclass); None in the other stages."""
    sections: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Sections of one stage only, by name."""


def read_config(
    cfg: DictConfig,
    settings_class: type | None = None,
    also: tuple[str, ...] = (),
    sections: dict[str, type] | None = None,
) -> RunConfig:
    """Check a composed configuration and turn it into dataclasses.

    Args:
        cfg: what Hydra composed.
        settings_class: the dataclass for `cfg.method` (without `_target_`).
        also: further top-level keys of the stage, whose values are not checked here.
        sections: further sections of the stage, by name, each with its dataclass.
    Raises:
        UserError: lists every problem with its key, its value and what is allowed.
    """
    sections, method = sections or {}, {"method": settings_class} if settings_class else {}
    problems: dict[str, str] = {}
    values = _plain(cfg, problems)
    if isinstance(values.get("method"), dict):
        values["method"].pop("_target_", None)
    training = values.get("training")
    for key in REFUSED.keys() & training if isinstance(training, dict) else ():
        problems[f"training.{key}"] = f"training.{key}: {REFUSED[key]}"
    keys = {name: (field.annotation, field) for name, field in fields_of(StageConfig).items()}
    keys |= {name: (kind, ...) for name, kind in {**method, **sections}.items()}
    keys |= {"training": (_training_schema() | None, None), **dict.fromkeys(also, (Any, None))}
    read = _validated(keys, values, problems)
    if read.data.windows and not read.model.prompt.is_bare:
        raise UserError(
            "data.windows: texts are continued without a template; set model.prompt.style=plain, model.prompt.question="
            "'{question}' and model.prompt.answer=' {answer}' ('{answer}' for a tokenizer that puts a space before every text)"
        )
    return RunConfig(
        **{name: getattr(read, name) for name in fields_of(StageConfig)},
        training=training or {},
        settings=getattr(read, "method", None),
        sections={name: getattr(read, name) for name in sections},
    )


def read_section(name: str, schema: type, node: Any) -> Any:
    """Check one section and turn it into its dataclass.

    Raises:
        UserError: lists every problem.
    """
    problems: dict[str, str] = {}
    values = {} if node is None else {name: _plain(node, problems, f"{name}.")}
    return getattr(_validated({name: (schema, ...)}, values, problems), name)


def problem_list(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _plain(node: Any, problems: dict[str, str], prefix: str = "") -> Any:
    """A configuration node as plain data without its missing values. Interpolation errors are added to `problems`."""
    if not OmegaConf.is_dict(node):
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    values = {}
    for key in node:
        try:
            if not OmegaConf.is_missing(node, key):
                values[str(key)] = _plain(node[key], problems, f"{prefix}{key}.")
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(node, resolve=False)[key]
            problems[f"{prefix}{key}"] = f"{prefix}{key}={raw}: {first_line(error)}"
    return values


def _validated(keys: dict[str, Any], values: dict[str, Any], problems: dict[str, str]) -> Any:
    """The values as attributes of an object with these keys.

    Raises:
        UserError: lists `problems`, and pydantic's errors for all other keys.
    """
    schema = create_model("Configuration", __config__=STRICT, **keys)
    read = None
    try:  # from JSON, strict mode still turns dictionaries into sections
        read = schema.model_validate_json(json.dumps(values, default=str))
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            key, problem = _problem(schema, error)
            problems.setdefault(key, problem)
    if problems:
        raise UserError(problem_list(list(problems.values())))
    return read


def _problem(schema: type, error: Any) -> tuple[str, str]:
    """The key that a pydantic error is about, and our message for it."""
    path, hint, field, fields = [], schema, FieldInfo(), {}
    for part in error["loc"]:
        if (found := fields_of(hint)) is not None:
            fields, field = found, found.get(part, FieldInfo())
            hint = field.annotation
        elif typing.get_origin(hint) in (dict, list):
            hint = typing.get_args(hint)[-1]
        else:  # a part that names an option of a union
            break
        path.append(str(part))
    key = ".".join(path)
    if error["type"] == "missing":
        return key, f"{key}: missing; give it a value"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = f" (known: {', '.join(fields)})" if len(fields) < 30 else " (see TrainingArguments)"
        return key, f"{key}: no such key{did_you_mean(path[-1], fields, key.removesuffix(path[-1]))}{known}"
    if error["type"] == "value_error":
        return key, f"{key}={error['input']}: {error['ctx']['error']}"
    if error["type"] == "too_short":
        return key, f"{key}: is empty"
    finite = "finite " if error["type"] == "finite_number" else ""
    meaning = f" ({field.description.removesuffix('.')})" if field.description else ""
    return key, f"{key}={error['input']}: expected {finite}{type_name(hint, field.metadata)}{meaning}"


def fields_of(hint: Any) -> dict[str, FieldInfo] | None:
    """The fields of X for the type `X` or `X | None`; None if X is not a section."""
    for option in typing.get_args(hint) or (hint,):
        if "__pydantic_fields__" in getattr(option, "__dict__", {}):
            return option.__pydantic_fields__
        if is_typeddict(option) or dataclasses.is_dataclass(option):  # also a plain dataclass without @section
            hints = typing.get_type_hints(option, include_extras=True)
            return {name: FieldInfo.from_annotation(kind) for name, kind in hints.items()}
    return None


LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


def type_name(hint: Any, limits: typing.Iterable[Any] = ()) -> str:
    """The type in YAML terms with its range, for instance `int or null, at least 1`."""
    if typing.get_origin(hint) is Annotated:
        return type_name(typing.get_args(hint)[0], FieldInfo.from_annotation(hint).metadata)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        name = " or ".join(map(type_name, typing.get_args(hint)))
    elif typing.get_origin(hint) is Literal:
        name = " or ".join(json.dumps(value).strip('"') for value in typing.get_args(hint))
    elif fields_of(hint) is not None:
        name = "section"
    elif typing.get_args(hint):
        name = f"{typing.get_origin(hint).__name__}[{', '.join(map(type_name, typing.get_args(hint)))}]"
    else:
        name = {type(None): "null", Any: "any"}.get(hint) or getattr(hint, "__name__", str(hint))
    signs = [(limit, sign) for limit in limits for sign in LIMITS if hasattr(limit, sign)]
    return ", ".join([name, *(f"{LIMITS[sign]} {getattr(limit, sign)}" for limit, sign in signs)])


# --- training: Hugging Face TrainingArguments under their own names ----------------------------------------------------

REFUSED = {
    "output_dir": "set the top-level output_dir instead",
    "hub_token": "put the token into environment.local.env: what stands here is written to the results",
    "push_to_hub_token": "put the token into environment.local.env: what stands here is written to the results",
    "seed": "set the top-level seed instead",
    "save_only_model": "a run could not be continued from such a checkpoint",
    "remove_unused_columns": "the data never passes through columns here",
    "label_smoothing_factor": "no loss here reads it",
    "resume_from_checkpoint": "a run resumes by itself; overwrite=true starts it anew",
    "dataloader_drop_last": "the rows of the last batch would not be trained on",
    "ignore_data_skip": "a continued run would repeat rows",
    "enable_jit_checkpoint": "a run writes a checkpoint on SIGTERM by itself",
    "average_tokens_across_devices": "tokens are always counted over all devices",
    "parallelism_config": "set training.fsdp, training.fsdp_config or training.deepspeed instead",
    "restore_callback_states_from_checkpoint": "no callback here has a state",
    "length_column_name": "the data never passes through columns here",
    "local_rank": "torchrun sets it",
    "auto_find_batch_size": "another batch size would be another run; lower per_device_train_batch_size",
    "train_sampling_strategy": "rows are always shuffled, and sorted by length within an optimizer step",
}
WITHOUT_EFFECT = (
    "do_train do_eval do_predict load_best_model_at_end metric_for_best_model greater_is_better eval_strategy"
)
WITHOUT_EFFECT += " eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only label_names"
WITHOUT_EFFECT += " eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics"
WITHOUT_EFFECT += " batch_eval_metrics bf16_full_eval fp16_full_eval"
REFUSED |= dict.fromkeys(
    WITHOUT_EFFECT.split(), "it has no effect here; evaluation.every_epochs evaluates during training"
)
HUB = "hub_strategy hub_always_push hub_revision"
REFUSED |= dict.fromkeys(HUB.split(), "only the finished run is pushed, once, to the main branch")


def _installed(trackers: str | list[str]) -> str | list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker not in ("none", "all", *KNOWN):
            raise ValueError(
                f"no such tracker{did_you_mean(tracker, KNOWN)}; expected none, wandb, tensorboard or trackio"
            )
        if tracker in ("wandb", "tensorboard", "trackio") and find_spec(tracker) is None:
            raise ValueError(f"{tracker} is not installed; pip install {tracker}")
    return trackers


def _has_liger_kernel(wanted: bool) -> bool:
    if wanted and find_spec("liger_kernel") is None:
        raise ValueError("is not installed; pip install liger-kernel")
    return wanted


def _ends_before_training(warmup_epochs: float, info: ValidationInfo) -> float:
    num_epochs, max_steps = info.data.get("num_train_epochs"), info.data.get("max_steps") or -1
    if num_epochs and max_steps < 0 and warmup_epochs > num_epochs:
        raise ValueError(f"the learning rate would not reach its peak; expected at most num_epochs={num_epochs:g}")
    return warmup_epochs


def _counts_steps(max_steps: int) -> int:
    if max_steps != -1 and max_steps < 1:
        raise ValueError("expected the number of optimizer steps, or -1 for num_epochs epochs")
    return max_steps


@cache
def _training_schema() -> type:
    """The fields of TrainingArguments plus our own keys, with ranges that TrainingArguments checks late or not at all."""
    from transformers import TrainingArguments
    from transformers.training_args import trainer_log_levels

    hints = typing.get_type_hints(TrainingArguments)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}
    kinds |= dict.fromkeys(("num_epochs", "num_train_epochs", "learning_rate"), PositiveFloat)
    kinds |= dict.fromkeys(("adam_epsilon", "save_steps", "logging_steps"), PositiveFloat)
    kinds |= dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout"), PositiveInt)
    kinds |= dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps"), NonNegativeFloat)
    kinds |= dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)])
    optional_counts = ("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb")
    kinds |= dict.fromkeys(optional_counts, Annotated[int | None, Field(ge=1)])
    kinds |= dict.fromkeys(("log_level", "log_level_replica"), Literal[tuple(trainer_log_levels)])
    kinds |= dict.fromkeys(("save_strategy", "logging_strategy"), Literal["no", "steps", "epoch"])
    return create_model(
        "Training",
        __config__=STRICT | {"arbitrary_types_allowed": True, "validate_default": False},
        **{name: (kind, None) for name, kind in kinds.items()}
        | {
            "max_steps": (Annotated[int, AfterValidator(_counts_steps)], None),
            "warmup_epochs": (Annotated[NonNegativeFloat, AfterValidator(_ends_before_training)], None),
            "dataloader_num_workers": (NonNegativeInt, None),
            "data_seed": (Annotated[int | None, Field(ge=0, lt=2**32)], None),
            "neftune_noise_alpha": (Annotated[float | None, Field(gt=0)], None),
            "bf16": (Literal[False, True, "auto"], None),
            "fsdp": (bool | str | None, None),  # transformers documents true, and annotates a string
            "report_to": (Annotated[str | list[str], AfterValidator(_installed)], None),
            "use_liger_kernel": (Annotated[bool, AfterValidator(_has_liger_kernel)], None),
        },
    )
