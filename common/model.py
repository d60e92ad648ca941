"""Load tokenizers and models from the hub, a folder or a GGUF file, or create new ones; add LoRA adapters.

Weights are read from safetensors or GGUF files only. Code from the hub runs only with model.trust_remote_code.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from common.config import LoraSettings, ModelConfig
from common.errors import UserError, first_line, reason
from common.files import looks_local, read_json, resolve_path
from common.model_checks import check_causal
from common.new_model import new_model, train_tokenizer
from common.results import checkpoint_id, recorded_config, started_from

log = logging.getLogger(__name__)
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
ADAPTER = "adapter_config.json"
PROBE = "Question: Where was Zoë born, in 1987?\nAnswer: in Łódź, naïvely."  # a text that tokenizers split differently
# What transformers and peft raise for broken files; for a JSON file with a list, errors such as AttributeError.
READING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, TypeError, AttributeError, LookupError)


def load_tokenizer(config: ModelConfig, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or for a new model train one on `texts`.

    Raises:
        UserError: if the path is not a checkpoint, or the tokenizer has more ids than the embedding has rows.
    """
    if config.new:
        return train_tokenizer(config.new, texts)
    path = _checkpoint_path(config)
    tokenizer = _own_tokenizer(config, path) if config.tokenizer is None else _other_tokenizer(config, path)
    if not config.gguf_file and not _is_adapter(path):
        with _errors_of_loading(config, "its config.json", *READING_ERRORS):
            model_config = AutoConfig.from_pretrained(path, **_source(config))
        _check_vocabulary(config, tokenizer, model_config.get_text_config().vocab_size)
    return tokenizer


def _own_tokenizer(config: ModelConfig, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint."""
    with _errors_of_loading(config, "its tokenizer", Exception):  # broken tokenizer files raise errors of any type
        return AutoTokenizer.from_pretrained(path, **_source(config))


def has_tokenizer(path: str, revision: str | None = None) -> bool:
    """Whether a folder or hub repository has the files of a tokenizer; True where that cannot be found out."""
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    try:
        return any(cached_file(path, name, revision=revision, **options) for name in names)
    except OSError:  # no such folder, or no hub: loading says so
        return True


def _other_tokenizer(config: ModelConfig, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `model.tokenizer` names.

    Raises:
        UserError: if the checkpoint has a tokenizer that gives a text other ids.
    """
    key = f"model.tokenizer={config.tokenizer}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_path(config.tokenizer), trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # broken tokenizer files raise errors of any type
        raise UserError(f"{key}: could not be loaded ({reason(error)})") from error
    ids = tokenizer(PROBE)["input_ids"]
    if has_tokenizer(path, config.revision) and _own_tokenizer(config, path)(PROBE)["input_ids"] != ids:
        raise UserError(f"{key}: gives other token ids than the tokenizer in {config.path}; leave it out")
    return tokenizer


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, trainable: bool) -> PreTrainedModel:
    """Load the model, ready for training or generation.

    Args:
        config: the `model` section.
        tokenizer: from `load_tokenizer`.
        trainable: with `config.lora`, add a LoRA adapter, or continue with the checkpoint's adapter. Otherwise an adapter
            in the checkpoint is merged into the weights, which makes generation faster.
    Raises:
        UserError: if the weights cannot be loaded, do not fit the tokenizer, or are those of a bidirectional model; if the base
            of an adapter was replaced.
    """
    if trainable and config.dtype != "float32" and not config.lora:
        log.warning(
            "model.dtype=%s: at small learning rates most updates of such weights round to nothing. Use model.dtype=float32 "
            "with training.bf16=auto (it computes in bfloat16), or model.lora",
            config.dtype,
        )
    if config.new:
        model = new_model(config.new, tokenizer, config.dtype)
        check_causal(model, f"model.new.architecture={config.new.architecture}")
        return model
    path = _checkpoint_path(config)
    if _is_adapter(path):
        return _load_adapter(config, path, tokenizer, trainable)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "output_loading_info": True}
    options |= {"quantization_config": GgufConfig(dequantize=True)} if config.gguf_file else {"use_safetensors": True}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    with _errors_of_loading(config, "its weights", *READING_ERRORS, ImportError):
        model, loading = AutoModelForCausalLM.from_pretrained(path, **_source(config), **options)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"model.path={config.path}: {len(missing)} weights are missing, {missing[0]} among them")
    _check_vocabulary(config, tokenizer, model.get_input_embeddings().num_embeddings)
    check_causal(model, f"model.path={config.path}")
    _make_generation_config_valid(model)
    return add_adapter(model, config.lora, config.revision) if trainable and config.lora else model


def _make_generation_config_valid(model: PreTrainedModel) -> None:
    """Remove what a checkpoint's greedy decoding does not use, such as a temperature: transformers refuses to save it."""
    settings = model.generation_config
    if settings is None or settings.do_sample:
        return
    defaults = GenerationConfig()
    unused = {name: getattr(settings, name, None) for name in SAMPLING_SETTINGS}
    if unused := {name: value for name, value in unused.items() if value not in (None, getattr(defaults, name))}:
        log.warning("generation_config.json: %s without do_sample has no effect and is not saved", unused)
        for name in unused:
            setattr(settings, name, getattr(defaults, name))


def add_adapter(model: PreTrainedModel, lora: LoraSettings, revision: str | None = None) -> PreTrainedModel:
    """Freeze the model and add a new LoRA adapter.

    Args:
        revision: of the model on the hub, which is saved with the adapter.
    Raises:
        UserError: if no layer has a name in `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    # With gradient checkpointing the adapter gets no gradient unless the frozen embedding's output requires one.
    model.enable_input_require_grads()
    try:
        settings = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, settings, revision=revision)
    except (ValueError, TypeError) as error:
        layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise UserError(
            f"model.lora.target_modules={lora.target_modules}: {error}; linear layers here: {names}"
        ) from error
    _refuse_tied_targets(adapted)
    return adapted


def _refuse_tied_targets(model: torch.nn.Module) -> None:
    """Refuse an adapter on a weight that two layers share: merged into one of them, it would change the other one, too.

    Raises:
        UserError: names the layers.
    """
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "weight")]
    users: dict[int, set[str]] = {id(module.weight): set() for _, module in layers}
    for name, module in layers:
        users[id(module.weight)].add(name.removesuffix(".base_layer").rpartition(".")[2])
    for _, module in layers:
        if hasattr(module, "base_layer") and len(tied := users[id(module.weight)]) > 1:
            raise UserError(
                f"model.lora.target_modules: {' and '.join(sorted(tied))} share one weight, and an adapter on one of them "
                "cannot be merged without changing the other; use other layers, for instance all-linear"
            )


def eos_token_ids(model: PreTrainedModel, eos_token_id: int) -> list[int]:
    """The tokens that end an answer: `eos_token_id` of the prompt format, and those in the model's generation config."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({eos_token_id, *named})


def _checkpoint_path(config: ModelConfig) -> str:
    """`model.path` as a hub id, or as the absolute path of a folder with a checkpoint."""
    folder = Path(path := resolve_path(config.path))
    remedy = f"; make it with: {config.made_by}" if config.made_by else ""
    if folder.is_file():
        raise UserError(
            f"model.path={config.path}: is a file; name the folder it is in (model.gguf_file names a GGUF file)"
        )
    if not folder.exists():
        if looks_local(config.path):  # `made_by` makes the recipe's path, and the command line may name another one
            raise UserError(f"model.path={config.path}: no such folder{remedy}")
        return path
    if config.gguf_file:
        if not (folder / config.gguf_file).is_file():
            raise UserError(f"model.gguf_file={config.gguf_file}: no such file in {folder}")
        return path
    needed = (ADAPTER, "adapter_model.safetensors") if _is_adapter(path) else ("config.json", "*.safetensors")
    if not all(any(folder.glob(pattern)) for pattern in needed):
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:12]) or "nothing"
        raise UserError(
            f"model.path={config.path}: not a checkpoint; expected config.json (or {ADAPTER}) and *.safetensors, "
            f"found {found}{remedy}"
        )
    return path


def _source(config: ModelConfig) -> dict[str, Any]:
    """The arguments that all from_pretrained calls share."""
    named = {key: getattr(config, key) for key in ("revision", "gguf_file") if getattr(config, key)}
    return {"trust_remote_code": config.trust_remote_code, **named}


def _is_adapter(path: str) -> bool:
    return (Path(path) / ADAPTER).is_file()


def _load_adapter(
    config: ModelConfig, path: str, tokenizer: PreTrainedTokenizerBase, trainable: bool
) -> PreTrainedModel:
    """Load the base model of a LoRA checkpoint with its adapter, either to train the adapter or merged into the weights."""
    from peft import PeftModel

    with _errors_of_loading(config, f"its {ADAPTER}", *READING_ERRORS):
        saved = dict(read_json(Path(path) / ADAPTER))
        base = dataclasses.replace(
            config, path=saved["base_model_name_or_path"], revision=saved.get("revision"), lora=None
        )
    continue_adapter = trainable and config.lora is not None
    if continue_adapter:
        keys = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        values = {key: (getattr(config.lora, key), saved.get(name)) for key, name in keys.items()}
        _refuse_other_adapter(path, {key: both for key, both in values.items() if both[0] != both[1]})
    _check_base(config, path, resolve_path(base.path))
    model = load_model(base, tokenizer, trainable=False)
    wanted = _target_layers(model, config.lora.target_modules) if continue_adapter else set()
    with _errors_of_loading(config, "its adapter", *READING_ERRORS):
        model = PeftModel.from_pretrained(model, path, is_trainable=continue_adapter)
    _refuse_tied_targets(model)
    if not continue_adapter:
        return model.merge_and_unload().requires_grad_(trainable)
    if wanted != {name for name, layer in model.get_base_model().named_modules() if hasattr(layer, "base_layer")}:
        layers = saved.get("target_modules")  # peft lists every layer of "all-linear"
        there = f"{len(layers)} layers" if isinstance(layers, list) and len(layers) > 8 else layers
        _refuse_other_adapter(path, {"target_modules": (config.lora.target_modules, there)})
    model.get_base_model().enable_input_require_grads()
    return model


def _refuse_other_adapter(path: str, differing: dict[str, tuple[Any, Any]]) -> None:
    """Refuse to continue an adapter with other settings: key -> value here, value in the checkpoint.

    Raises:
        UserError: names the keys; if there is any.
    """
    if differing:
        named = ", ".join(f"{key}={here} (checkpoint: {there})" for key, (here, there) in differing.items())
        raise UserError(
            f"model.lora.{named}: {path} is an adapter that training continues with; use the same values, or finetune with "
            "model.lora.merge=true to start a new adapter"
        )


def _target_layers(model: PreTrainedModel, targets: str | list[str]) -> set[str]:
    """Names of the layers that get an adapter, as peft understands `target_modules`."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}
    if isinstance(targets, list):
        return {name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)}
    if targets.lower() != "all-linear":
        return {name for name in layers if re.fullmatch(targets, name)}
    head = model.get_output_embeddings()
    return {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head}


def _check_base(config: ModelConfig, adapter: str, base: str) -> None:
    """Check that the folder of the base model still has the result that the adapter was trained from, if one is recorded.

    Args:
        adapter: folder of the adapter.
        base: folder of its base model, or hub id.
    Raises:
        UserError: names the base.
    """
    recorded, start = (recorded_config(adapter) or {}).get("start"), started_from(adapter)
    if recorded is None or not start or not Path(base).exists():
        return
    now = checkpoint_id(start)
    if Path(start).resolve() != Path(base).resolve():  # the run continued an adapter, which has a record of its base
        if _is_adapter(start) and now == recorded:
            _check_base(config, start, base)
    elif now != recorded:
        raise UserError(
            f"model.path={config.path}: its adapter was trained on the weights {recorded:.12} in {base}, where there are "
            f"{f'the weights {now:.12}' if now else 'none'} now; make the adapter again, or put those weights back"
        )


def _check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    if len(tokenizer) > rows:
        raise UserError(
            f"model.path={config.path}: its tokenizer has {len(tokenizer)} ids and its embedding {rows} rows; "
            "they do not belong together"
        )


@contextlib.contextmanager
def _errors_of_loading(config: ModelConfig, what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn library errors of these kinds into a UserError: `what` could not be loaded."""
    try:
        yield
    except kinds as error:
        why = first_line(error)
        # Of transformers' several messages on attention, each has one of these words.
        if config.attn_implementation and re.search("attn_implementation|FlashAttention|kernels", why):
            known = ", ".join(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in key)
            raise UserError(
                f"model.attn_implementation={config.attn_implementation}: {why.partition('. ')[0]}; expected null, eager "
                f"or one of {known} if its package is installed"
            ) from error
        problem = f"model.path={config.path}: {what} could not be loaded ({why})"
        if Path(resolve_path(config.path)).exists():
            raise UserError(f"{problem}; copy or make damaged files again") from error
        raise UserError(
            f"{problem}. A gated or remote model needs the hub and perhaps a token in environment.local.env; without "
            "the hub name a local folder"
        ) from error
