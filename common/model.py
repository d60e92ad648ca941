"""Tokenizers and weights: from the hub, a folder, a GGUF file or nothing; with a LoRA adapter where asked for.

Checkpoints are read and written as safetensors, and code that comes with weights is not run unless
model.trust_remote_code says so.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.config import LoraSettings, ModelConfig
from common.errors import UserError
from common.files import looks_local, read_json, resolve_path
from common.new_model import new_model, train_tokenizer

ADAPTER = "adapter_config.json"


def load_tokenizer(config: ModelConfig, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model one trained on `texts`.

    Raises:
        UserError: for a path that is no checkpoint, or a tokenizer with more ids than the embedding has rows.
    """
    if config.new:
        return train_tokenizer(config.new, texts)
    path = _checkpoint_path(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_source(config))
    except Exception as error:  # a broken tokenizer file raises whatever its reader trips over
        raise _not_loadable(config, "its tokenizer", error) from error
    if not config.gguf_file and not _is_adapter(path):
        rows = _model_config(config, path).get_text_config().vocab_size
        _check_vocabulary(config, tokenizer, rows)
    return tokenizer


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, trainable: bool) -> PreTrainedModel:
    """The weights, ready to be trained or to generate.

    Args:
        config: the `model` section.
        tokenizer: from `load_tokenizer`.
        trainable: add (or go on training) the LoRA adapter of `config.lora`; otherwise an adapter in the checkpoint is
            merged into the weights, which generates faster.
    Raises:
        UserError: when the weights cannot be loaded or do not fit the tokenizer.
    """
    if config.new:
        return new_model(config.new, tokenizer, config.dtype)
    path = _checkpoint_path(config)
    if _is_adapter(path):
        return _load_adapter(config, path, tokenizer, trainable)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "output_loading_info": True}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    try:
        if config.gguf_file:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        else:
            options["use_safetensors"] = True
        model, loading = AutoModelForCausalLM.from_pretrained(path, **_source(config), **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(config, "its weights", error) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"model.path={config.path}: {len(missing)} weights are missing, {missing[0]} among them")
    _check_vocabulary(config, tokenizer, model.get_input_embeddings().num_embeddings)
    return add_adapter(model, config.lora) if trainable and config.lora else model


def add_adapter(model: PreTrainedModel, lora: LoraSettings) -> PreTrainedModel:
    """Freeze the model and put a fresh LoRA adapter on it.

    Raises:
        UserError: when no layer is called as `target_modules` says.
    """
    from peft import LoraConfig, get_peft_model

    # Under gradient checkpointing the frozen embedding would cut the graph, and the adapter would silently not train.
    model.enable_input_require_grads()
    try:
        settings = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, settings)
    except (ValueError, TypeError) as error:
        leaves = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        raise UserError(
            f"model.lora.target_modules={lora.target_modules}: {error}; linear layers here: {', '.join(sorted(leaves))}"
        ) from error


def eos_token_ids(model: PreTrainedModel, eos_token_id: int) -> list[int]:
    """Every token that ends an answer: the prompt format's own and those that the generation config names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({eos_token_id, *named})


def _checkpoint_path(config: ModelConfig) -> str:
    """`model.path` as a hub id or as a folder that holds a checkpoint."""
    path = resolve_path(config.path)
    remedy = f"; make it with: {config.made_by}" if config.made_by else ""
    if not Path(path).exists():
        if looks_local(config.path) or config.made_by:
            raise UserError(f"model.path={config.path}: no such folder{remedy}")
        return path
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"model.path={config.path}: is a file; name the folder it is in (model.gguf_file names a GGUF file)"
        )
    if config.gguf_file:
        if not (folder / config.gguf_file).is_file():
            raise UserError(f"model.gguf_file={config.gguf_file}: no such file in {folder}")
        return path
    has_weights = any(folder.glob("adapter_model.safetensors" if _is_adapter(path) else "*.safetensors"))
    if not has_weights or not ((folder / "config.json").is_file() or _is_adapter(path)):
        there = ", ".join(sorted(child.name for child in folder.iterdir())[:12]) or "nothing"
        raise UserError(
            f"model.path={config.path}: not a checkpoint; expected config.json (or {ADAPTER}) and *.safetensors, "
            f"found {there}{remedy}"
        )
    return path


def _source(config: ModelConfig) -> dict[str, Any]:
    named = {key: getattr(config, key) for key in ("revision", "gguf_file") if getattr(config, key)}
    return {"trust_remote_code": config.trust_remote_code, **named}


def _model_config(config: ModelConfig, path: str):
    try:
        return AutoConfig.from_pretrained(path, **_source(config))
    except (OSError, ValueError) as error:
        raise _not_loadable(config, "its config.json", error) from error


def _is_adapter(path: str) -> bool:
    return (Path(path) / ADAPTER).is_file()


def _load_adapter(
    config: ModelConfig, path: str, tokenizer: PreTrainedTokenizerBase, trainable: bool
) -> PreTrainedModel:
    """A LoRA checkpoint: its base model with the adapter on it, to go on training, or merged."""
    from peft import PeftModel

    saved = read_json(Path(path) / ADAPTER)
    going_on = trainable and config.lora is not None
    if going_on:
        differing = [
            f"{ours}={getattr(config.lora, ours)} (checkpoint: {saved.get(theirs)})"
            for ours, theirs in (("r", "r"), ("alpha", "lora_alpha"))
            if getattr(config.lora, ours) != saved.get(theirs)
        ]
        if differing:
            raise UserError(
                f"model.lora.{', '.join(differing)}: {path} is an adapter, and training goes on with it; give it the same "
                "values, or finetune with model.lora.merge=true to start a new one"
            )
    base = dataclasses.replace(config, path=saved["base_model_name_or_path"], revision=saved.get("revision"), lora=None)
    model = load_model(base, tokenizer, trainable=False)
    try:
        model = PeftModel.from_pretrained(model, path, is_trainable=going_on)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(config, "its adapter", error) from error
    if not going_on:
        return model.merge_and_unload().requires_grad_(trainable)
    model.get_base_model().enable_input_require_grads()
    return model


def _check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    if len(tokenizer) > rows:
        raise UserError(
            f"model.path={config.path}: its tokenizer has {len(tokenizer)} ids and its embedding {rows} rows; "
            "the two do not belong together"
        )


def _not_loadable(config: ModelConfig, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return UserError(
        f"model.path={config.path}: {what} could not be loaded ({reason}). A gated or remote model needs the hub and "
        "perhaps a token in environment.env; without the hub name a local folder"
    )
