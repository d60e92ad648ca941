"""Rows are put into batches of like length, each row once and whole."""

import itertools

import pytest
import torch

from common.collate import bucket_by_length, collate, sort_into_micro_batches
from common.prompts import Example


def batch_of(lengths):
    """Rows of these lengths, the ids of each all its place."""
    batch = collate([Example([place] * (length - 1), [place]) for place, length in enumerate(lengths)])
    return {**batch, "place": torch.arange(len(lengths))}


def positions(parts):
    return sum(part["input_ids"].numel() for part in parts)


def test_every_row_is_in_one_part_with_all_its_tokens():
    lengths = [7, 3, 12, 7, 2, 30, 3]
    parts = bucket_by_length(batch_of(lengths), extra_pass=4)
    assert sorted(place for part in parts for place in part["place"].tolist()) == list(range(7))
    for part in parts:
        assert part["input_ids"].shape[1] == max(lengths[place] for place in part["place"])
        for place, ids, mask, labels in zip(
            part["place"].tolist(), part["input_ids"], part["attention_mask"], part["labels"], strict=True
        ):
            assert mask.sum() == lengths[place]
            assert (ids[mask.bool()] == place).all()
            assert (labels != -100).nonzero().tolist() == [[lengths[place] - 1]]


@pytest.mark.parametrize("extra_pass", [0, 3, 10, 1000])
def test_the_parts_have_the_fewest_positions_of_all_ways_to_part_the_rows(extra_pass):
    """Against all 2^6 ways to cut seven rows, sorted by length, into parts."""
    lengths = [7, 3, 12, 7, 2, 30, 3]
    ordered, costs = sorted(lengths), []
    for cuts in itertools.product([False, True], repeat=6):
        cost, start = 0, 0
        for end in range(1, 8):
            if end == 7 or cuts[end - 1]:
                cost, start = cost + (end - start) * ordered[end - 1] + extra_pass, end
        costs.append(cost)
    parts = bucket_by_length(batch_of(lengths), extra_pass)
    assert positions(parts) + extra_pass * len(parts) == min(costs)


def test_rows_are_dealt_to_micro_batches_by_length():
    examples = [Example([1] * length, [2]) for length in (9, 1, 5, 3, 7)]
    assert [[len(example) for example in some] for some in sort_into_micro_batches(examples, [2, 2, 1])] == [
        [2, 4],
        [6, 8],
        [10],
    ]
