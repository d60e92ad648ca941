"""The key-value cache of a batch that shrinks: preallocated buffers, one column written per step."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # columns that a full buffer grows by; also the step between the column counts of recorded graphs


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
            self.grow(end + BLOCK)
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

    def allocate(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
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
        self.keys = torch.cat([pad_at(part.keys, 2, shared, self.length) for part in parts])
        self.values = torch.cat([pad_at(part.values, 2, shared, self.length) for part in parts])
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
        """Keep these rows, moved to the top of the same buffers, which recorded graphs read; few move (`compact_indices`)."""
        self.rows = len(indices)
        target = (indices != torch.arange(self.rows, device=indices.device)).nonzero().squeeze(1)
        source = indices[target]
        for buffer in self.buffers:
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.keys, self.values = (buffer[: self.rows, :, : self.length] for buffer in self.buffers)


def all_preallocated(cache: DynamicCache) -> bool:
    """Whether every layer sees all columns: none has a sliding window or a recurrent state."""
    return all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def pad_at(states: torch.Tensor, dim: int, place: int, size: int) -> torch.Tensor:
    """The tensor with zeros inserted at `place` of dimension `dim`, so that it has `size` there."""
    before, after = states.narrow(dim, 0, place), states.narrow(dim, place, states.shape[dim] - place)
    shape = [*states.shape[:dim], size - states.shape[dim], *states.shape[dim + 1 :]]
    return torch.cat((before, states.new_zeros(shape), after), dim)


def compact_indices(alive: torch.Tensor) -> torch.Tensor:
    """Rows to keep, for `Decoder.keep`: those alive, the last of them put where others have gone; nobody else moves.

    >>> compact_indices(torch.tensor([True, False, True, False, True]))
    tensor([0, 4, 2])

    Args:
        alive: shape (rows,).
    """
    rows = torch.arange(int(alive.sum()), device=alive.device)
    gone, last = (~alive[: len(rows)]).nonzero().squeeze(1), alive[len(rows) :].nonzero().squeeze(1)
    rows[gone] = last + len(rows)
    return rows
