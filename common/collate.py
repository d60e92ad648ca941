"""From examples to batches of tensors: padding, micro-batches, and buckets of similar length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.prompts import Example

IGNORED = -100  # label of a position without loss


def collate(examples: Sequence[Example], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest of them.

    >>> collate([Example([5, 6], [7, 2]), Example([5], [2])])
    {'input_ids': tensor([[5, 6, 7, 2], [5, 2, 0, 0]]), 'attention_mask': tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
     'labels': tensor([[-100, -100, 7, 2], [-100, 2, -100, -100]])}

    Masks come from lengths, so any id can pad. Shapes: (rows, longest).
    """
    longest = max(map(len, examples))
    input_ids = torch.full((len(examples), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.prompt + example.answer)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, len(example.prompt) : len(ids)] = ids[len(example.prompt) :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


PASS_OVERHEAD_TOKENS = 128  # cost of one more forward and backward pass on a CPU, in positions (approximate)


def bucket_by_length(batch: dict[str, torch.Tensor], extra_pass: int) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch in sub-batches of similar length, chosen so that all together have the fewest positions.

    A batch is as long as its longest row, and TOFU's rows differ so much that half of its positions are padding.

    Args:
        batch: tensors with a row an example, `attention_mask` of shape (rows, length) among them.
        extra_pass: how many positions a further sub-batch must save.
    """
    lengths, order = batch["attention_mask"].sum(1).sort()
    lengths = lengths.tolist()
    # cheapest[n]: positions of the n shortest rows with what their parts cost, and where the last part starts.
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
    """The examples from short to long, in micro-batches of the given sizes: similar lengths need little padding.

    The loss is a mean over the tokens of the whole optimizer step, so it does not matter which rows go together.
    """
    ordered = iter(sorted(examples, key=length))
    return [[next(ordered) for _ in range(size)] for size in sizes]


def count_answer_tokens(labels: torch.Tensor) -> int:
    """The number of tokens with a loss; the first token of a row is never predicted. `labels`: shape (rows, length)."""
    return int((labels[:, 1:] != IGNORED).sum())
