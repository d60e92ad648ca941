"""Turn examples into batches of tensors: padding, micro-batches, and sub-batches of similar length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.prompts import Example

IGNORED = -100  # label of a position without loss
MAX_BATCH_TOKENS = 4096  # tokens in a forward pass, including padding


def collate(examples: Sequence[Example], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the length of the longest one.

    >>> collate([Example([5, 6], [7, 2]), Example([5], [2])])
    {'input_ids': tensor([[5, 6, 7, 2], [5, 2, 0, 0]]), 'attention_mask': tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
     'labels': tensor([[-100, -100, 7, 2], [-100, 2, -100, -100]])}

    The masks are computed from the lengths, so `pad_id` may be any id. Shapes: (rows, longest).
    """
    longest = max(map(len, examples))
    input_ids = torch.full((len(examples), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.prompt + example.answer)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, len(example.prompt) : len(ids)] = torch.tensor(example.targets)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batches_by_length(lengths: Sequence[int], max_rows: int | None) -> list[list[int]]:
    """Batches of row indices, of similar length: at most MAX_BATCH_TOKENS tokens each, including padding.

    >>> batches_by_length([4000, 3, 2000, 2000], None)
    [[1, 2], [3], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for i in order:
        rows = len(batches[-1]) + 1 if batches else 0
        if batches and rows * lengths[i] <= MAX_BATCH_TOKENS and (max_rows is None or rows <= max_rows):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


PASS_OVERHEAD_TOKENS = 128  # approximate fixed cost of a forward and backward pass on a CPU, in token positions


def bucket_by_length(batch: dict[str, torch.Tensor], extra_pass: int) -> list[dict[str, torch.Tensor]]:
    """Split a batch into sub-batches of similar length, so that the padded positions plus the costs of the passes are fewest.

    Every row is padded to the longest of its batch. With TOFU, half of the positions would be padding.

    Args:
        batch: tensors with one row per example; includes `attention_mask` of shape (rows, length).
        extra_pass: cost of a pass in positions; each further sub-batch must save more than this.
    """
    sorted_lengths, order = batch["attention_mask"].sum(1).sort()
    lengths = sorted_lengths.tolist()
    # cheapest[n]: lowest cost of the n shortest rows in positions, and the row that the last sub-batch starts with.
    cheapest = [(0, 0)]
    for end in range(1, len(lengths) + 1):
        costs = [(cheapest[start][0] + (end - start) * lengths[end - 1] + extra_pass, start) for start in range(end)]
        cheapest.append(min(costs))
    parts, end = [], len(lengths)
    while end > 0:
        start = cheapest[end][1]
        rows, longest = order[start:end], lengths[end - 1]
        parts.append({k: v[rows, :longest] if v.ndim > 1 else v[rows] for k, v in batch.items()})
        end = start
    return parts[::-1]


def sort_into_micro_batches(
    examples: Sequence[Any], sizes: Sequence[int], length: Callable[[Any], int] = len
) -> list[list[Any]]:
    """Sort the examples by length and split them into micro-batches of the given sizes, which saves padding.

    The loss is a mean over the tokens of the whole optimizer step, so the order of the rows does not change it.
    """
    ordered = iter(sorted(examples, key=length))
    return [[next(ordered) for _ in range(size)] for size in sizes]


def count_answer_tokens(labels: torch.Tensor) -> int:
    """Count the tokens with a loss. The first token of a row is never predicted. `labels` has shape (rows, length)."""
    return int((labels[:, 1:] != IGNORED).sum())
