"""Relabeling: PMC's loss that replaces the words of an initial response that are its own by the model's second choices.

The labels of an initial response are computed once, before training. A word that the question or many retain answers contain
is no secret, and its tokens have no loss. Every other token is replaced by the token that the model, before unlearning, finds
most likely in its place. As in "Who's Harry Potter?" (arXiv 2310.02238), the words around a label stay those of the answer.
The forget answers of the data set are not read. `method.relabeling_weight` of `unlearning.pmc` turns it on.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from common.collate import IGNORED, collate
from common.data import Row
from common.errors import UserError
from common.forward import evaluation_mode
from common.losses import answer_logits
from common.prompts import Example
from common.rouge import rouge_tokens

COMMON = 0.1  # a word in a larger fraction of the retain answers is common, such as "the" or "author"

log = logging.getLogger(__name__)


def common_words(retain: Sequence[Row]) -> set[str]:
    """The words, as ROUGE compares them, that several retain answers contain, and more than a tenth of all."""
    counts = Counter(word for row in retain for word in set(rouge_tokens(row.answer)))
    return {word for word, count in counts.items() if count > max(1, COMMON * len(retain))}


def is_of_other_word(text: Callable[[Sequence[int]], str], answer: Sequence[int], known: Collection[str]) -> list[bool]:
    """For each token of an answer whether it is part of a word that is not among the known ones.

    Args:
        text: the text of the first tokens of an answer.
        answer: token ids.
        known: words as `rouge_tokens` returns them.
    """
    own = [word not in known for word in rouge_tokens(text(answer))]
    flags, before = [], ()
    for end in range(1, len(answer) + 1):
        # Without stems the words of a beginning are those of the whole text, but for the last one, which may be incomplete.
        words = rouge_tokens(text(answer[:end]), stemmed=False)
        unchanged = sum(1 for _ in equal_beginning(before, words))
        flags.append(any(own[unchanged : len(words)]))
        before = words
    return flags


def equal_beginning(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


def second_choices(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """For each token of each answer the most likely other token, given the question and the answer's tokens before it."""
    chosen: dict[int, list[int]] = {}
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            batch = collate([examples[index] for index in indices])
            logits, targets, _ = answer_logits(model, {name: ids.to(model.device) for name, ids in batch.items()})
            labels = iter(logits.scatter(1, targets[:, None], -math.inf).argmax(dim=1).tolist())
            chosen |= {index: [next(labels) for _ in examples[index].answer] for index in indices}
    return [chosen[index] for index in range(len(examples))]


def relabeled(
    model: PreTrainedModel,
    rows: Sequence[Row],
    initial: Sequence[Example],
    retain: Sequence[Row],
    text: Callable[[Sequence[int]], str],
    batch_size: int,
) -> list[Example]:
    """The initial responses with labels: the second choice for each token of a word of its own, IGNORED for the others.

    Args:
        model: the model before unlearning.
        rows: the forget rows; only their questions are read.
        initial: the questions with the initial responses.
        retain: rows whose answers tell which words are common.
        text: the text of an answer's token ids (`common.prompts.PromptFormat.text`).
        batch_size: examples of a forward pass.
    Raises:
        UserError: if no initial response has a word of its own.
    """
    common = common_words(retain)
    own = [
        is_of_other_word(text, example.answer, common | set(rouge_tokens(row.question)))
        for row, example in zip(rows, initial, strict=True)
    ]
    if without := sum(not any(flags) for flags in own):
        message = (
            f"for {without} of {len(rows)} questions the initial response has no word that is neither in the question nor in "
            f"{COMMON:.0%} of the retain answers"
        )
        if without == len(rows):
            raise UserError(
                f"method.relabeling_weight: {message}, so nothing can be relabeled. Set it to 0, or for text that is not "
                "written in a-z give data.words=unicode"
            )
        log.warning("method.relabeling_weight: %s; it has no effect on them", message)
    choices = second_choices(model, initial, batch_size)
    return [
        replace(example, labels=[new if flag else IGNORED for new, flag in zip(labels, flags, strict=True)])
        for example, labels, flags in zip(initial, choices, own, strict=True)
    ]
