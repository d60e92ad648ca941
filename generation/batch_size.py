"""Sampling batch size: as many answers as fit in a fraction of the memory."""

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
    """Bytes of the keys and values of one token in all layers."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 2 * heads * size * dtype.itemsize


def cache_budget(device: torch.device) -> int:
    """Bytes available for the cache."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return int(min(MEMORY_FRACTION * total, free / 2))
