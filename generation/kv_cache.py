"""The key-value cache of a shrinking batch: preallocated buffers, one column written per step."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # number of columns added to a full buffer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, views of buffers of shape (rows or more, heads, seq_len or more, head_dim).

    Attributes:
        rows: answers in the batch.
        length: columns in use.
    """

    rows: int = 0
    length: int = 0
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append columns; returns the keys and values of all columns so far."""
        start, end = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.buffers = key_states, value_states
        else:
            if end > self.buffers[0].shape[2]:
                self.resize(end + BLOCK)
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[: self.rows, :, start:end] = states
        self.view(len(key_states), end)
        return self.keys, self.values

    def view(self, rows: int, length: int) -> None:
        """Use the first rows and columns of the buffers."""
        self.rows, self.length = rows, length
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self.buffers)

    def resize(self, seq_len: int) -> None:
        """Move to buffers of this many columns."""
        self.move_into(self.allocate(self.rows, seq_len))

    def allocate(self, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers like this layer's keys and values, of another size."""
        return tuple(
            states.new_empty(rows, states.shape[1], seq_len, states.shape[3]) for states in (self.keys, self.values)
        )

    def move_into(self, buffers: tuple[torch.Tensor, torch.Tensor], n: int = 1) -> None:
        """Copy the columns in use to these buffers and use them, with every row repeated n times."""
        for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
            buffer[: n * self.rows, :, : self.length].unflatten(0, (self.rows, n)).copy_(states[:, None])
        self.buffers = buffers
        self.view(n * self.rows, self.length)

    def concat(self, parts: list["PreallocatedLayer"], shared: int) -> None:
        """Concatenate the rows of all parts; their first `shared` columns are the same tokens.

        The parts' last columns are aligned; a shorter part gets zeros after the shared columns. Each part's tensors are
        released here, layer by layer, so memory never holds a second complete cache.
        """
        self.rows, self.length = sum(part.rows for part in parts), max(part.length for part in parts)
        self.keys = torch.cat([pad_at(part.keys, 2, shared, self.length) for part in parts])
        self.values = torch.cat([pad_at(part.values, 2, shared, self.length) for part in parts])
        for part in parts:
            part.buffers = None
            if part is not self:
                part.keys = part.values = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows as the first rows of the same buffers; only rows whose index changes are copied."""
        target = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        source = indices[target]
        for buffer in self.buffers:
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.view(len(indices), self.length)


def all_preallocated(cache: DynamicCache) -> bool:
    """Whether every layer attends to all columns: none has a sliding window or a recurrent state."""
    return all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def pad_at(states: torch.Tensor, dim: int, index: int, size: int) -> torch.Tensor:
    """The tensor with zeros inserted at `index` of dimension `dim`, so that this dimension has `size`."""
    before, after = states.tensor_split([index], dim)
    shape = [*states.shape[:dim], size - states.shape[dim], *states.shape[dim + 1 :]]
    return torch.cat((before, states.new_zeros(shape), after), dim)


def compact_indices(unfinished: torch.Tensor) -> torch.Tensor:
    """The unfinished rows in an order that moves few of them: rows from the end replace finished ones.

    >>> compact_indices(torch.tensor([True, False, True, False, True]))
    tensor([0, 4, 2])

    Args:
        unfinished: shape (rows,).
    """
    rows = torch.arange(int(unfinished.sum()), device=unfinished.device)
    finished, tail = (~unfinished[: len(rows)]).nonzero().squeeze(1), unfinished[len(rows) :].nonzero().squeeze(1)
    rows[finished] = tail + len(rows)
    return rows
