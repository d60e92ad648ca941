"""Forward passes of sampling: one for each prompt (prefill), then one per token of the answers (decode).

The cache is a buffer with free columns for later tokens, so a step writes one column and copies nothing.
"""

import os

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.forward import own_forward
from common.model_checks import LENGTH_DEPENDENT_ROPE
from generation.kv_cache import BLOCK, PreallocatedLayer, all_preallocated, pad_at

PREFILL_PROMPTS = {"cpu": 32, "cuda": 256}  # prompts per forward pass, padded to the longest of them


class Decoder:
    """A model with the key-value cache of the answers in a batch; every step adds one token to each answer.

    Args:
        model: a causal language model in evaluation mode.
    """

    layer_class = PreallocatedLayer

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def start(self, prompts: list[list[int]], n: int, max_new_tokens: int) -> torch.Tensor:
        """Process the prompts, each once, and make room for n answers each.

        Args:
            prompts: token ids.
            n: answers to each prompt, in adjacent rows.
            max_new_tokens: of the longest answer.
        Returns:
            logits of the answers' first tokens, shape (prompts * n, vocabulary).
        """
        self.cache = None  # freed before the next prompts are processed
        logits, mask, self.cache = self.read(prompts)
        rows, self.length = len(prompts) * n, mask.shape[1]
        self.allocate(rows, self.length + max_new_tokens, n)
        self.mask = torch.zeros(rows, self.length + max_new_tokens, dtype=torch.bool, device=mask.device)
        self.mask[:, : self.length] = mask.repeat_interleave(n, 0)
        # The model uses a four-dimensional mask unchanged, which saves building one; sliding windows need masks of their own.
        self.mask_is_final = self.model.config._attn_implementation == "sdpa" and all_preallocated(self.cache)
        self.positions = mask.sum(1).repeat_interleave(n)  # of the next token
        return logits.repeat_interleave(n, 0)

    def allocate(self, rows: int, seq_len: int, n: int) -> None:
        """Move the cache into buffers for this many rows, with every row repeated n times."""
        for layer in self.cache.layers:
            if isinstance(layer, PreallocatedLayer):
                layer.move_into(layer.allocate(rows, min(seq_len, self.length + BLOCK)), n)
            elif n > 1:
                # Only beam search's interface selects the rows of recurrent states as well as those of keys and values.
                layer.reorder_cache(torch.arange(rows, device=self.model.device) // n)

    def read(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Process the prompts. Many prompts take several forward passes, before which their common prefix is processed once.

        Args:
            prompts: token ids; sorting them by length reduces padding.
        Returns:
            logits of the next tokens, shape (prompts, vocabulary); mask, shape (prompts, seq_len), each prompt's last token in
            the last column; and the cache, of the same columns.
        """
        size = PREFILL_PROMPTS.get(self.model.device.type, len(prompts))
        if len(prompts) <= size or not self._reads_in_parts():
            return self._read_together(prompts, None)
        prefix_ids = os.path.commonprefix([prompt[:-1] for prompt in prompts])
        prefix = self._read_together([prefix_ids], None)[2] if prefix_ids else None
        parts = [self._read_together(prompts[start : start + size], prefix) for start in range(0, len(prompts), size)]
        logits, masks, caches = zip(*parts, strict=True)
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            layers[0].concat(layers, len(prefix_ids))
        seq_len = max(mask.shape[1] for mask in masks)
        return torch.cat(logits), torch.cat([pad_at(mask, 1, len(prefix_ids), seq_len) for mask in masks]), caches[0]

    def _reads_in_parts(self) -> bool:
        """Whether padding between columns is harmless: full attention, and positions only in rotary embeddings."""
        rotation = getattr(self.model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        rotates = rotation.get("rope_type") not in (None, *LENGTH_DEPENDENT_ROPE)
        return rotates and all_preallocated(self._new_cache())

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        cache.layers = [self.layer_class() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _read_together(
        self, prompts: list[list[int]], prefix: DynamicCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """The same as `read`, in one forward pass.

        Args:
            prefix: cache of the common prefix, one row, which is not processed again; None: process the whole prompts.
        """
        cache, length = self._new_cache(), prefix.get_seq_length() if prefix else 0
        input_ids, mask = pad_left([prompt[length:] for prompt in prompts], self.model.device)
        mask = torch.nn.functional.pad(mask, (length, 0), value=1)
        if prefix:
            for source, layer in zip(prefix.layers, cache.layers, strict=True):
                layer.update(*(states.expand(len(prompts), -1, -1, -1) for states in (source.keys, source.values)))
                layer.resize(mask.shape[1])
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
        return self.forward(input_ids, mask, positions, cache), mask, cache

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every answer, shape (rows,); returns the logits of the next, shape (rows, vocabulary)."""
        self.mask[:, self.length] = True
        self.length += 1
        logits = self.next_logits(tokens)
        self.positions = self.positions + 1
        return logits

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = self.mask[:, : self.length]
        mask = mask[:, None, None] if self.mask_is_final else mask
        return self.forward(tokens[:, None], mask, self.positions[:, None], self.cache)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, in this order (see `compact_indices`)."""
        for layer in self.cache.layers:
            select = layer.batch_select_indices if isinstance(layer, PreallocatedLayer) else layer.reorder_cache
            select(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        output = own_forward(self.model)(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, shape (prompts, longest), with the prompts' ends aligned."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
