"""Sampling batch size: as many answers as fit in a fraction of the memory."""

from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from common.hardware import log_once

MEMORY_FRACTION = 0.1  # of the device's memory, for the key-value cache of a batch
MAX_ROWS = {"cpu": 256, "cuda": 1024}  # larger batches are not faster


def rows_that_fit(model: PreTrainedModel, seq_len: int) -> int:
    """The number of answers of `seq_len` tokens, prompt included, that a batch may have.

    Their cache takes at most MEMORY_FRACTION of the device's memory, and at most half of the free memory. The result is at
    least 1.
    """
    needed = cache_bytes_per_token(model.config, model.dtype) * seq_len
    rows = max(1, cache_budget(model.device) // needed)
    rows = min(rows, MAX_ROWS.get(model.device.type, MAX_ROWS["cpu"]))
    log_once(f"sampling batches of up to {rows} answers of {seq_len} tokens: {rows * needed / 1e9:.2g} GB of cache")
    return rows


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers; where heads are not given or differ by layer, an estimate."""
    text = config.get_text_config(decoder=True)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    heads, kv_heads, size = (_common_value(text, name) for name in names)
    width = text.hidden_size
    if isinstance(heads, int) and isinstance(kv_heads or heads, int):
        width = (kv_heads or heads) * (size if isinstance(size, int) else text.hidden_size // heads)
    return text.num_hidden_layers * 2 * width * dtype.itemsize


def _common_value(config: PreTrainedConfig, name: str) -> Any:
    """A value of the configuration; None if there is none or it differs by layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers, for a value that differs by layer
        return None


def cache_budget(device: torch.device) -> int:
    """Bytes available for the cache."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return int(min(MEMORY_FRACTION * total, free / 2))
