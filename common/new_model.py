"""Create a new model with random weights, and train a tokenizer for it."""

import dataclasses
from collections.abc import Iterable

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from common.config import NewModelConfig
from common.errors import UserError, did_you_mean

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"


def train_tokenizer(new: NewModelConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with `new.vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=new.vocab_size,
        special_tokens=[END, PAD, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)


def new_model(new: NewModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: str) -> PreTrainedModel:
    """Create a model of the architecture in `new`, with random weights.

    Raises:
        UserError: for an unknown architecture or setting, or settings that do not fit together.
    """
    key = f"model.new (architecture={new.architecture})"
    if new.architecture not in CONFIG_MAPPING:
        raise UserError(f"{key}: unknown{did_you_mean(new.architecture, CONFIG_MAPPING)}")
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[new.architecture])}
    for name in set(new.settings) - known:
        raise UserError(f"{key}: no setting '{name}'{did_you_mean(name, known)}")
    try:
        settings = AutoConfig.for_model(
            new.architecture,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **new.settings,
        )
        return AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    except Exception as error:  # configuration classes raise errors of any type
        raise UserError(f"{key}: {' '.join(str(error).split())[:300]}") from error
