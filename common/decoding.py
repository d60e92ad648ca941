"""The model's side of sampling: prompts go in once, then one token of every answer at a time.

The cache is a buffer with room for the tokens to come, so that a step writes one column and copies nothing. On CUDA the
steps are recorded as graphs over a few sizes, which spares the launch of hundreds of kernels a token; where that does not
work the plain step does.
"""

import contextlib
import copy
import logging
import os
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.runtime import log_once

log = logging.getLogger(__name__)

ROOM = 64  # columns that a full buffer grows by; also the step between the column counts of recorded graphs
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # row counts of recorded graphs
MEMORY_SHARE = 0.1  # of the device's memory, for the cache of the answers drawn side by side
PREFILL_PROMPTS = {"cpu": 32, "cuda": 256}  # prompts read side by side, padded to the longest of them
ROTATED_BY_THE_LONGEST = ("dynamic", "longrope")  # rotations that depend on the longest row of a pass, too
MOST_ROWS = {"cpu": 256, "cuda": 1024}  # more rows at a time are not faster


class Replica:
    """A copy of a model with its parameters in the type that samples are drawn in.

    Sampling reads every weight once a token, so half the bytes are twice the speed, while the optimizer keeps float32.
    Buffers such as the rotary frequencies keep their type.

    Args:
        source: the model that is trained; make the replica before it is wrapped for training.
        dtype: type of the copy's parameters.
    """

    def __init__(self, source: PreTrainedModel, dtype: torch.dtype):
        self.source = source
        copies = {
            id(parameter): torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
            for parameter in source.parameters()
            if parameter.is_floating_point()
        }
        self.model = copy.deepcopy(source, copies).eval()

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """The copy, on the source's device and with its present weights."""
        self.model.to(self.source.device)
        torch._foreach_copy_(list(self.model.parameters()), list(self.source.parameters()))
        return self.model


PACKED_FOR = 64  # rows that packed weights are laid out for; any number of them works


@contextlib.contextmanager
def packed_linears(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, the model's linear layers with their weights laid out for oneDNN's kernels; as before afterwards.

    PyTorch lays a weight out anew at every call, which for a few rows costs more than the product. Inside, the weights must
    not change.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear and _packs(module)]
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), PACKED_FOR)
            layer.forward = partial(_packed_linear, packed, layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _packs(layer: torch.nn.Linear) -> bool:
    """Whether oneDNN has kernels for a layer here, and nobody else (offloading, for one) has put himself before it."""
    weight = layer.weight
    if "forward" in vars(layer) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of shape (rows or more, heads, columns or more, size of a head).

    Attributes:
        rows: answers in the batch.
        length: columns in use.
        fixed: while a graph is recorded: the column to write, as a tensor, and how many columns to return.
    """

    rows: int = 0
    length: int = 0
    fixed: tuple[torch.Tensor, int] | None = None
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Add columns; returns the keys and values of all columns so far."""
        if self.fixed:
            return self._write_fixed_column(key_states, value_states)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.rows, self.length, self.buffers = len(key_states), key_states.shape[2], (key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            self.grow(end + ROOM)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, start:end] = states
        self.length = end
        self.keys, self.values = (buffer[: self.rows, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def _write_fixed_column(self, key_states: torch.Tensor, value_states: torch.Tensor):
        column, columns = self.fixed
        rows = len(key_states)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows].index_copy_(2, column, states)
        return tuple(buffer[:rows, :, :columns] for buffer in self.buffers)

    def grow(self, columns: int) -> None:
        grown = []
        for buffer in self.buffers:
            larger = buffer.new_empty(self.rows, buffer.shape[1], columns, buffer.shape[3])
            larger[:, :, : self.length] = buffer[: self.rows, :, : self.length]
            grown.append(larger)
        self.buffers = tuple(grown)

    def room_for(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers like this layer's keys and values, of another size."""
        # Zeros where graphs read columns that were never written: masked, but 0 times not-a-number is not 0.
        new = torch.zeros if self.device.type == "cuda" else torch.empty
        return tuple(
            new(rows, states.shape[1], columns, states.shape[3], dtype=self.dtype, device=self.device)
            for states in (self.keys, self.values)
        )

    def join(self, parts: list["PreallocatedLayer"], shared: int) -> None:
        """Hold the rows of all parts, whose first `shared` columns are of the same tokens.

        The last columns of the parts come to lie beside each other; those that a part lacks are zeros after the shared ones.
        The parts are given up, layer by layer, so that no second cache is held.
        """
        self.rows, self.length = sum(part.rows for part in parts), max(part.length for part in parts)
        self.keys = torch.cat([_widened(part.keys, 2, shared, self.length) for part in parts])
        self.values = torch.cat([_widened(part.values, 2, shared, self.length) for part in parts])
        for part in parts:
            part.buffers = None
            if part is not self:
                part.keys = part.values = None

    def repeat_into(self, n: int, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Go on in these buffers, with every row n times."""
        self.rows *= n
        for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
            buffer[: self.rows, :, : self.length] = states.repeat_interleave(n, 0)
        self.buffers = buffers
        self.keys, self.values = (buffer[: self.rows, :, : self.length] for buffer in buffers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, moved to the top of the same buffers, which recorded graphs read; few move (`closed_up`)."""
        self.rows = len(indices)
        target = (indices != torch.arange(self.rows, device=indices.device)).nonzero().squeeze(1)
        source = indices[target]
        for buffer in self.buffers:
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.keys, self.values = (buffer[: self.rows, :, : self.length] for buffer in self.buffers)


def all_preallocated(cache: DynamicCache) -> bool:
    """Whether every layer sees all columns: none has a sliding window or a recurrent state."""
    return all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def _widened(states: torch.Tensor, dim: int, place: int, size: int) -> torch.Tensor:
    """The tensor with zeros inserted at `place` of dimension `dim`, so that it has `size` there."""
    before, after = states.narrow(dim, 0, place), states.narrow(dim, place, states.shape[dim] - place)
    shape = [*states.shape[:dim], size - states.shape[dim], *states.shape[dim + 1 :]]
    return torch.cat((before, states.new_zeros(shape), after), dim)


def closed_up(alive: torch.Tensor) -> torch.Tensor:
    """Rows to keep, for `Decoder.keep`: those alive, the last of them put where others have gone; nobody else moves.

    >>> closed_up(torch.tensor([True, False, True, False, True]))
    tensor([0, 4, 2])

    Args:
        alive: shape (rows,).
    """
    rows = torch.arange(int(alive.sum()), device=alive.device)
    gone, last = (~alive[: len(rows)]).nonzero().squeeze(1), alive[len(rows) :].nonzero().squeeze(1)
    rows[gone] = last + len(rows)
    return rows


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
        self.may_record = model.device.type == "cuda" and model.config._attn_implementation == "sdpa"

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
        return torch.cat(logits), torch.cat([_widened(mask, 1, len(beginning), columns) for mask in masks]), cache

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
        logits = self._recorded_step(tokens) if self.may_record else None
        if logits is None:
            logits = self.plain_step(tokens)
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these answers alone, given by their rows (as `closed_up` orders them)."""
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
        if not self.may_record:
            return [own.room_for(rows, min(columns, self.length + ROOM)) for own in self.preallocated]
        if not self.buffers or self.buffers[0][0].shape[0] < rows or self.buffers[0][0].shape[2] < columns:
            self.graphs = self.buffers = None  # freed before the larger ones are allocated
            self.buffers = [own.room_for(at_least(ROWS, rows), round_up(columns, ROOM)) for own in self.preallocated]
        return self.buffers

    # --- CUDA graphs ---

    def _recorded_step(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The step by a recorded graph; None where it must be done plainly."""
        if not all_preallocated(self.cache):
            self.may_record = False  # a sliding window or a recurrent state moves in ways that no graph repeats
            return None
        if self.graphs is None or not self.graphs.reads(self.model):
            self.graphs = StepGraphs(self.model, self.buffers)
        try:
            logits = self.graphs.step(self, tokens)
        except Exception as error:  # whatever a driver, a kernel or a model's own code trips over
            log.warning("CUDA graphs do not work here (%s); sampling goes on without them", error)
            logits = None
        if logits is None:
            self.may_record, self.graphs, self.buffers = False, None, None
        return logits


class StepGraphs:
    """One decode step, recorded for every number of rows and columns that comes up, both rounded up.

    A graph repeats its kernels on the very same memory: tokens, positions, mask and column are copied to where it reads
    them. Rows and columns beyond those in use hold leftovers; the mask hides the columns, and the rows are cut off.

    Args:
        model: whose step it is.
        buffers: the cache's keys and values.
    """

    def __init__(self, model: PreTrainedModel, buffers: list[tuple[torch.Tensor, torch.Tensor]]):
        rows, _, columns, _ = buffers[0][0].shape
        self.weights = weight_addresses(model)
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=model.device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.ones((rows, columns), dtype=torch.bool, device=model.device)
        self.column = torch.zeros(1, dtype=torch.long, device=model.device)
        self.recorded: dict[tuple[int, int], tuple[Callable[[], None], torch.Tensor]] = {}

    def reads(self, model: PreTrainedModel) -> bool:
        """Whether the model's weights are still where the graphs read them."""
        return self.weights == weight_addresses(model)

    def step(self, decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits of the next token, shape (rows, vocabulary); None when a graph's first result is not the plain step's."""
        rows, columns = at_least(ROWS, len(tokens)), round_up(decoder.length, ROOM)
        rows = min(rows, len(self.tokens))
        plain = None
        if (rows, columns) not in self.recorded:
            plain = decoder.plain_step(tokens)
        self.tokens[: len(tokens)] = tokens[:, None]
        self.positions[: len(tokens)] = decoder.positions[:, None]
        self.mask[: len(tokens), : decoder.length] = decoder.mask[:, : decoder.length]
        self.mask[: len(tokens), decoder.length : columns] = False
        self.column.fill_(decoder.length - 1)
        if plain is None:
            for layer in decoder.preallocated:
                layer.length = decoder.length
        else:
            self.recorded[rows, columns] = self._record(decoder, rows, columns)
        replay, logits = self.recorded[rows, columns]
        replay()
        logits = logits[: len(tokens)]
        if plain is not None and not _alike(logits, plain):
            log.warning(
                "a CUDA graph of the decode step gives other logits than the step itself; going on without graphs"
            )
            return None
        return logits.clone()

    def _record(self, decoder: Decoder, rows: int, columns: int) -> tuple[Callable[[], None], torch.Tensor]:
        inputs = {
            "input_ids": self.tokens[:rows],
            "mask": self.mask[:rows, None, None, :columns],
            "positions": self.positions[:rows],
            "cache": decoder.cache,
        }
        for layer in decoder.preallocated:
            layer.fixed = (self.column, columns)
        try:
            return record(lambda: decoder.forward(**inputs))
        finally:
            for layer in decoder.preallocated:
                layer.fixed = None


def record(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A function that repeats what `step` does as one CUDA graph, and the tensor that it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up at a first call, which no graph may hold
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the rounding of bfloat16 in another order of operations."""
    return bool((one - other).abs().max() <= 0.05 * other.abs().max())


def weight_addresses(model: PreTrainedModel) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def at_least(sizes: list[int], number: int) -> int:
    """The smallest of the sizes that is enough, or the number itself."""
    place = bisect_left(sizes, number)
    return sizes[place] if place < len(sizes) else number


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


_decoders: "weakref.WeakKeyDictionary[PreTrainedModel, Decoder]" = weakref.WeakKeyDictionary()


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The model's decoder; on CUDA the same one every time, for its graphs go on being of use."""
    if model.device.type != "cuda":
        return Decoder(model)
    if model not in _decoders:
        _decoders[model] = Decoder(model)
    return _decoders[model]


# --- how much fits ------------------------------------------------------------------------------------------------------


def rows_that_fit(model: PreTrainedModel, columns: int) -> int:
    """Answers of `columns` tokens, prompt included, that may be drawn side by side.

    Their cache takes at most MEMORY_SHARE of the device's memory, and at most half of what is free; one always fits.
    """
    needed = cache_bytes_per_token(model.config, model.dtype) * columns
    rows = max(1, cache_budget(model.device) // needed)
    most = MOST_ROWS.get(model.device.type, MOST_ROWS["cpu"])
    rows = min(rows, most)
    log_once(f"up to {rows} answers of {columns} tokens are drawn side by side: {rows * needed / 1e9:.2g} GB of cache")
    return rows


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 2 * heads * size * dtype.itemsize


def cache_budget(device: torch.device) -> int:
    """Bytes that the cache may take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return int(min(MEMORY_SHARE * total, free / 2))
