"""CUDA graphs of the decode step."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from generation.kv_cache import BLOCK

log = logging.getLogger(__name__)
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # row counts of recorded graphs


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

    def step(self, decoder: Any, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits of the next token, shape (rows, vocabulary); None when a graph's first result is not the plain step's."""
        rows, columns = at_least(ROWS, len(tokens)), round_up(decoder.length, BLOCK)
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

    def _record(self, decoder: Any, rows: int, columns: int) -> tuple[Callable[[], None], torch.Tensor]:
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
