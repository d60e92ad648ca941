"""The model's side of sampling: prompts go in once, then one token of every answer at a time.

The cache is a buffer with room for the tokens to come, so that a step writes one column and copies nothing. On CUDA the
steps are recorded as graphs over a few sizes, which spares the launch of hundreds of kernels a token; where that does not
work the plain step does.
"""

import logging
import os
import weakref

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from generation.cuda_graphs import ROWS, StepGraphs, at_least, round_up
from generation.kv_cache import BLOCK, PreallocatedLayer, all_preallocated, pad_at

log = logging.getLogger(__name__)
PREFILL_PROMPTS = {"cpu": 32, "cuda": 256}  # prompts read side by side, padded to the longest of them
ROTATED_BY_THE_LONGEST = ("dynamic", "longrope")  # rotations that depend on the longest row of a pass, too


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, shape (prompts, longest), with the prompts' ends aligned."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class Decoder:
    """A model with the cache of the answers that it is writing, all of them one token further at every step.

    Args:
        model: a causal language model in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)  # `decoder_of` keeps decoders, and must not keep models alive by that
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # of the layers, kept for their graphs
        self.graphs: StepGraphs | None = None
        self.use_cuda_graphs = model.device.type == "cuda" and model.config._attn_implementation == "sdpa"

    @property
    def model(self) -> PreTrainedModel:
        return self._model()

    def start(self, prompts: list[list[int]], n: int, room: int) -> torch.Tensor:
        """Read the prompts, each once, for n answers each.

        Args:
            prompts: token ids.
            n: answers to each prompt; they lie together.
            room: tokens that the longest answer may have.
        Returns:
            logits of the answers' first tokens, shape (prompts * n, vocabulary).
        """
        self.cache = self.preallocated = None  # freed before the next prompts are read
        logits, mask, self.cache = self.read(prompts)
        self.preallocated = [layer for layer in self.cache.layers if isinstance(layer, PreallocatedLayer)]
        self.length = mask.shape[1]
        rows, columns = len(prompts) * n, self.length + room
        for layer in self.cache.layers:
            if not isinstance(layer, PreallocatedLayer) and n > 1:
                layer.batch_repeat_interleave(n)
        for layer, buffers in zip(self.preallocated, self._buffers(rows, columns), strict=True):
            layer.repeat_into(n, buffers)
        self.mask = torch.zeros(rows, columns, dtype=torch.bool, device=mask.device)
        self.mask[:, : self.length] = mask.repeat_interleave(n, 0)
        # A mask of four dimensions is taken as it is, which spares its making; sliding windows need one of their own.
        self.whole_mask = self.model.config._attn_implementation == "sdpa" and all_preallocated(self.cache)
        self.positions = mask.sum(1).repeat_interleave(n)  # of the next token
        return logits.repeat_interleave(n, 0)

    def read(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Put the prompts through the model: many of them in parts, and what they all begin with once.

        Args:
            prompts: token ids; sorted by length, the parts have little padding.
        Returns:
            logits of the next tokens, shape (prompts, vocabulary); mask of the columns, shape (prompts, columns), each prompt's
            last token in the last column; and the cache, which has the same columns.
        """
        size = PREFILL_PROMPTS.get(self.model.device.type, len(prompts))
        if len(prompts) <= size or not self._reads_in_parts():
            return self._read_together(prompts, None)
        beginning = os.path.commonprefix([prompt[:-1] for prompt in prompts])
        known = self._read_together([beginning], None)[2] if beginning else None
        parts = [self._read_together(prompts[start : start + size], known) for start in range(0, len(prompts), size)]
        logits, masks, caches = zip(*parts, strict=True)
        columns = max(mask.shape[1] for mask in masks)
        cache = caches[0]
        for layer, *others in zip(*(some.layers for some in caches), strict=True):
            layer.join([layer, *others], len(beginning))
        return torch.cat(logits), torch.cat([pad_at(mask, 1, len(beginning), columns) for mask in masks]), cache

    def _reads_in_parts(self) -> bool:
        """Whether columns may lie apart: every layer sees all of them, and rotations alone tell where a token is."""
        rotation = getattr(self.model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        told = rotation.get("rope_type") not in (None, *ROTATED_BY_THE_LONGEST)
        return told and all_preallocated(self._new_cache())

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _read_together(
        self, prompts: list[list[int]], known: DynamicCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """What `read` returns, for prompts side by side.

        Args:
            known: cache of a beginning that all have, which is not read again, a single row; None: read them whole.
        """
        cache, length = self._new_cache(), known.get_seq_length() if known else 0
        input_ids, mask = pad_left([prompt[length:] for prompt in prompts], self.model.device)
        mask = torch.nn.functional.pad(mask, (length, 0), value=1)
        if known:
            for layer, own in zip(known.layers, cache.layers, strict=True):
                own.update(*(states.expand(len(prompts), -1, -1, -1) for states in (layer.keys, layer.values)))
                own.grow(mask.shape[1])
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
        return self.forward(input_ids, mask, positions, cache), mask, cache

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every answer, shape (rows,); returns the logits of the next, shape (rows, vocabulary)."""
        self.mask[:, self.length] = True
        self.length += 1
        logits = self._recorded_step(tokens) if self.use_cuda_graphs else None
        if logits is None:
            logits = self.plain_step(tokens)
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these answers alone, given by their rows (as `compact_indices` orders them)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def plain_step(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = self.mask[:, : self.length]
        mask = mask[:, None, None] if self.whole_mask else mask
        return self.forward(tokens[:, None], mask, self.positions[:, None], self.cache)

    def forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        # Under mixed precision accelerate wraps `forward` in autocast, which would cast every weight again at every token.
        forward = self.model.__dict__.get("_original_forward", self.model)
        output = forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _buffers(self, rows: int, columns: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Room for the cache of every preallocated layer; what graphs may read is kept and taken again."""
        if not self.use_cuda_graphs:
            return [own.allocate(rows, min(columns, self.length + BLOCK)) for own in self.preallocated]
        if not self.buffers or self.buffers[0][0].shape[0] < rows or self.buffers[0][0].shape[2] < columns:
            self.graphs = self.buffers = None  # freed before the larger ones are allocated
            self.buffers = [own.allocate(at_least(ROWS, rows), round_up(columns, BLOCK)) for own in self.preallocated]
        return self.buffers

    # --- CUDA graphs ---

    def _recorded_step(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The step by a recorded graph; None where it must be done plainly."""
        if not all_preallocated(self.cache):
            self.use_cuda_graphs = False  # a sliding window or a recurrent state moves in ways that no graph repeats
            return None
        if self.graphs is None or not self.graphs.reads(self.model):
            self.graphs = StepGraphs(self.model, self.buffers)
        try:
            logits = self.graphs.step(self, tokens)
        except Exception as error:  # whatever a driver, a kernel or a model's own code trips over
            log.warning("CUDA graphs do not work here (%s); sampling goes on without them", error)
            logits = None
        if logits is None:
            self.use_cuda_graphs, self.graphs, self.buffers = False, None, None
        return logits


_decoders: "weakref.WeakKeyDictionary[PreTrainedModel, Decoder]" = weakref.WeakKeyDictionary()


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The model's decoder; on CUDA the same one every time, for its graphs go on being of use."""
    if model.device.type != "cuda":
        return Decoder(model)
    if model not in _decoders:
        _decoders[model] = Decoder(model)
    return _decoders[model]
