"""CUDA graphs of the decode step: one launch per token instead of hundreds. An option (generation.cuda_graphs).

Off by default; `decoder_with_cache` is the only entry point. A graph repeats its kernels on the same memory. So tokens,
positions, mask and column are copied to fixed tensors, and the cache's buffers are reused in later calls.
"""

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from generation.decoder import Decoder
from generation.kv_cache import BLOCK, PreallocatedLayer, all_preallocated

log = logging.getLogger(__name__)
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # row counts of graphs

_enabled = False


def use_cuda_graphs(setting: Literal[False, "auto"]) -> None:
    """Enable graphs (auto: where `decoder_with_cache` supports them) or disable them, in this process."""
    global _enabled
    _enabled = setting == "auto"


def decoder_with_cache(model: PreTrainedModel) -> Decoder:
    """A decoder of the model; with CUDA graphs if these are enabled and the model is on CUDA with sdpa attention."""
    graphs = _enabled and model.device.type == "cuda" and model.config._attn_implementation == "sdpa"
    return GraphDecoder(model) if graphs else Decoder(model)


class GraphLayer(PreallocatedLayer):
    """A layer that can be captured in a graph.

    Attributes:
        capture: while a graph is captured: the column to write, as a tensor, and how many columns to return.
    """

    capture: tuple[torch.Tensor, int] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.capture:
            return super().update(key_states, value_states)
        (column, seq_len), rows = self.capture, len(key_states)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows].index_copy_(2, column, states)
        return tuple(buffer[:rows, :, :seq_len] for buffer in self.buffers)

    def allocate(self, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Graphs also read columns that were never written. They are masked, but 0 * NaN is NaN.
        return tuple(buffer.zero_() for buffer in super().allocate(rows, seq_len))


class StepGraphs:
    """A model's graphs and the memory that they read. Each number of rows and columns, both rounded up, has its own graph.

    Rows and columns beyond those in use hold old values: the mask hides the columns, and the rows are cut off.

    Args:
        model: the model whose decode step is captured.
        buffers: keys and values of each layer.
    """

    def __init__(self, model: PreTrainedModel, buffers: list[tuple[torch.Tensor, torch.Tensor]]):
        self.buffers, self.weights = buffers, weight_addresses(model)
        self.rows, _, self.seq_len, _ = buffers[0][0].shape
        self.tokens = torch.zeros((self.rows, 1), dtype=torch.long, device=model.device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.ones((self.rows, self.seq_len), dtype=torch.bool, device=model.device)
        self.column = torch.zeros(1, dtype=torch.long, device=model.device)
        self.replays: dict[tuple[int, int], tuple[Callable[[], None], torch.Tensor]] = {}

    def fit(self, model: PreTrainedModel, rows: int, seq_len: int) -> bool:
        """Whether a batch of this size fits and the model's weights are still at the captured addresses."""
        return rows <= self.rows and seq_len <= self.seq_len and self.weights == weight_addresses(model)


# None: graphs do not work for the model.
_of_model: "weakref.WeakKeyDictionary[PreTrainedModel, StepGraphs | None]" = weakref.WeakKeyDictionary()


class GraphDecoder(Decoder):
    """A decoder that replays graphs of its step; a plain decoder where graphs do not work for the model."""

    layer_class = GraphLayer

    def allocate(self, rows: int, seq_len: int, n: int) -> None:
        self.graphs = None
        # A graph cannot repeat the updates of a sliding window or a recurrent state.
        if not all_preallocated(self.cache) or _of_model.get(self.model, "untried") is None:
            super().allocate(rows, seq_len, n)
            return
        graphs = _of_model.pop(self.model, None)
        if graphs is None or not graphs.fit(self.model, rows, seq_len):
            graphs = None  # the old buffers are freed before larger ones are allocated
            size = round_up(rows, ROWS), -(-seq_len // BLOCK) * BLOCK
            graphs = StepGraphs(self.model, [layer.allocate(*size) for layer in self.cache.layers])
        _of_model[self.model] = self.graphs = graphs
        for layer, buffers in zip(self.cache.layers, graphs.buffers, strict=True):
            layer.move_into(buffers, n)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.graphs is None:
            return super().next_logits(tokens)
        size = min(round_up(len(tokens), ROWS), self.graphs.rows), -(-self.length // BLOCK) * BLOCK
        if size in self.graphs.replays:
            return self._replay(tokens, size).clone()
        plain = super().next_logits(tokens)
        try:
            same = alike(self._replay(tokens, size), plain)
            problem = "" if same else "its logits differ from those of the step without a graph"
        except Exception as error:  # a driver, a kernel or the model's code may raise any exception
            problem = str(error) or type(error).__name__
        if problem:
            log.warning("a CUDA graph of the decode step does not work here (%s); sampling continues without", problem)
            self.graphs = _of_model[self.model] = None
        return plain

    def _replay(self, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Logits of the next token, shape (rows, vocabulary), in memory that the next replay overwrites."""
        graphs, rows, seq_len = self.graphs, len(tokens), size[1]
        graphs.tokens[:rows] = tokens[:, None]
        graphs.positions[:rows] = self.positions[:, None]
        graphs.mask[:rows, : self.length] = self.mask[:, : self.length]
        graphs.mask[:rows, self.length : seq_len] = False
        graphs.column.fill_(self.length - 1)
        for layer in self.cache.layers:
            layer.view(rows, self.length)
        if size not in graphs.replays:
            graphs.replays[size] = record(partial(self._captured_step, self.cache, *size))
        replay, logits = graphs.replays[size]
        replay()
        return logits[:rows]

    def _captured_step(self, cache: DynamicCache, rows: int, seq_len: int) -> torch.Tensor:
        """The decode step on the graphs' fixed tensors."""
        tokens, positions = self.graphs.tokens[:rows], self.graphs.positions[:rows]
        mask = self.graphs.mask[:rows, None, None, :seq_len]
        for layer in cache.layers:
            layer.capture = self.graphs.column, seq_len
        try:
            return self.forward(tokens, mask, positions, cache)
        finally:
            for layer in cache.layers:
                layer.capture = None


def record(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A function that repeats what `step` does as one CUDA graph, and the tensor that it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries initialize in their first calls, which must not be captured
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the logits are equal up to bfloat16 rounding in a different order of operations."""
    return bool((one - other).abs().max() <= 0.05 * other.abs().max())


def weight_addresses(model: PreTrainedModel) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def round_up(number: int, sizes: list[int]) -> int:
    """The smallest of the ascending sizes that is at least the number, or the number itself."""
    return next((size for size in sizes if size >= number), number)
