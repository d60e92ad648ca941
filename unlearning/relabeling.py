"""Relabeling: a loss of PMC that teaches second choices in place of an initial response's distinctive words.

Distinctive words are those that neither the question nor many retain answers have: a name, a date, a title. The label of
each of their tokens is the likeliest token that does not spell the same word, under the model before unlearning, given the
question and the response up to there. The other tokens have no label. Labels are computed once, before training.
The forget answers of the data set are not read. `method.relabeling_weight` of `unlearning.pmc` is the loss's weight.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from common.collate import IGNORED, batches_by_length, collate
from common.data import Row
from common.errors import UserError
from common.forward import evaluation_mode
from common.losses import answer_logits
from common.prompts import Example
from common.rouge import rouge_tokens, use_words
from unlearning.rewards import letters_and_digits

COMMON_FRACTION = 0.1  # words in a larger fraction of the retain answers are common, such as "the" or "author"
NUM_CANDIDATES = 50  # likeliest tokens among which a second choice is looked for
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to

log = logging.getLogger(__name__)


@use_words("unicode")  # whatever `data.words` is: a letter with an accent is part of its word
def relabel(
    model: PreTrainedModel,
    rows: Sequence[Row],
    initial: Sequence[Example],
    retain: Sequence[Row],
    text: Callable[[Sequence[int]], str],
    batch_size: int,
) -> list[Example]:
    """The initial responses with labels: the second choices for the tokens of their distinctive words, IGNORED for the others.

    Args:
        model: the model before unlearning.
        rows: the forget rows; only their questions are read.
        initial: the questions with the initial responses.
        retain: rows whose answers tell which words are common.
        text: the text of an answer's token ids (`common.prompts.PromptFormat.text`).
        batch_size: examples of a forward pass.
    Raises:
        UserError: if no initial response has a distinctive word.
    """
    common = common_words(retain)
    distinctive = [
        in_distinctive_words(text, example.answer, common | set(rouge_tokens(row.question)))
        for row, example in zip(rows, initial, strict=True)
    ]
    labels = second_choices(model, initial, distinctive, text, batch_size)
    numbers = [sum(label != IGNORED for label in of_answer) for of_answer in labels]
    if without := numbers.count(0):
        message = (
            f"for {without} of {len(rows)} questions every word of the initial response is in the question or in more than "
            f"{COMMON_FRACTION:.0%} of the retain answers, or has no second choice"
        )
        if without == len(rows):
            raise UserError(f"method.relabeling_weight: {message}, so there is nothing to relabel; set it to 0")
        log.warning("method.relabeling_weight: %s; the loss has no effect on them", message)
    log.info("relabeling: %d of %d tokens of initial responses have a label", sum(numbers), sum(map(len, labels)))
    return [replace(example, labels=new) for example, new in zip(initial, labels, strict=True)]


def common_words(retain: Sequence[Row]) -> set[str]:
    """The words, as ROUGE compares them, of at least two retain answers and of more than a tenth of them."""
    counts = Counter(word for row in retain for word in set(rouge_tokens(row.answer)))
    return {word for word, count in counts.items() if count > max(1, COMMON_FRACTION * len(retain))}


def in_distinctive_words(
    text: Callable[[Sequence[int]], str], answer: Sequence[int], known: Collection[str]
) -> list[bool]:
    """For each token of an answer whether it is part of a word that is not among the known ones.

    Args:
        text: the text of the first tokens of an answer.
        answer: token ids.
        known: words as `rouge_tokens` returns them.
    """
    is_distinctive = [word not in known for word in rouge_tokens(text(answer))]
    flags, before = [], ()
    for end in range(1, len(answer) + 1):
        beginning = text(answer[:end])
        if beginning.endswith(INCOMPLETE) and end < len(answer):
            continue  # the token has the flag of the one that completes the character
        # Without stems the words of a beginning are those of the whole text, but for the last one, which may be incomplete.
        words = rouge_tokens(beginning, stemmed=False)
        unchanged = len(os.path.commonprefix([before, words]))
        flags += [any(is_distinctive[unchanged : len(words)])] * (end - len(flags))
        before = words
    return flags


def second_choices(
    model: PreTrainedModel,
    examples: Sequence[Example],
    wanted: Sequence[Sequence[bool]],
    text: Callable[[Sequence[int]], str],
    batch_size: int,
) -> list[list[int]]:
    """For each wanted token of each answer the likeliest token in its place that does not spell the same word.

    IGNORED for tokens that are not wanted, and where the NUM_CANDIDATES likeliest tokens all spell the same word or no text
    at all.
    """
    labels = [[IGNORED] * len(example.answer) for example in examples]
    with torch.no_grad(), evaluation_mode(model):
        for indices in batches_by_length(list(map(len, examples)), batch_size):
            batch = collate([examples[index] for index in indices])
            logits, _, _ = answer_logits(model, {name: ids.to(model.device) for name, ids in batch.items()})
            likeliest = iter(logits.topk(min(NUM_CANDIDATES, logits.shape[1])).indices.tolist())
            for index in indices:
                answer = examples[index].answer
                for position, is_wanted in enumerate(wanted[index]):
                    tokens = next(likeliest)
                    if is_wanted:
                        labels[index][position] = second_choice(text, answer, position, tokens)
    return labels


def second_choice(text: Callable[[Sequence[int]], str], answer: Sequence[int], position: int, tokens: list[int]) -> int:
    """The first of the tokens that does not spell the word of the answer's token at `position`; IGNORED if all do."""
    before = len(text(answer[:position]).rstrip(INCOMPLETE))
    expected = text(answer)[before:].strip()
    for token in tokens:
        added = text([*answer[:position], token])[before:].strip().rstrip(INCOMPLETE)
        if not spells_the_same(added, expected):
            return token
    return IGNORED


def spells_the_same(added: str, expected: str) -> bool:
    """Whether a text begins the expected one or a longer form of its first word, or is empty.

    Case, accents and punctuation do not count: for "Kuwait City" these are "kuwait", "K" and "Kuwaiti". The first bytes of
    a character, and bytes that cannot follow those before them, spell no other word either.
    """
    if INCOMPLETE in added or expected.casefold().startswith(added.casefold()):
        return True
    words, new = rouge_tokens(expected, stemmed=False), letters_and_digits(added, "NFKD")
    if not words or not new:
        return False  # punctuation
    return letters_and_digits(expected, "NFKD").startswith(new) or new.startswith(letters_and_digits(words[0], "NFKD"))
