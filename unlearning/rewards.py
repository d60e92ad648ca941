"""Rewards: how unlike the initial response a sampled answer is.

A reward is a function `(reference, samples) -> list[float]` with one value in [0, 1] per sample; 1 means that nothing of the
reference is left. To add one, write such a function and name it in configs/method/*.yaml or on the command line as
`method.reward._target_=my_module.my_reward`. A reward that never rises when words are added to a sample may set
its attribute `is_monotone = True`: samples that can no longer be selected are then stopped while they are drawn.
"""

import logging
import math
import unicodedata
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from numbers import Real
from typing import Any

from common.errors import UserError
from common.rouge import rouge_l_recall, rouge_tokens, words

log = logging.getLogger(__name__)

ROUNDING = 1e-9  # rewards outside [0, 1] by at most this much are clipped


def rouge_l(reference: str, samples: Sequence[str]) -> list[float]:
    """1 - ROUGE-L recall (stemmed) of each sample against the initial response: the reward of the PMC paper."""
    return [1.0 - rouge_l_recall(reference, sample) for sample in samples]


rouge_l.is_monotone = True  # words that match the reference in order still match when more words follow


def exact_span(reference: str, samples: Sequence[str]) -> list[float]:
    """1 - length of the longest run of the initial response's characters in a sample / length of the initial response.

    For short exact answers (names, addresses). Only letters and digits count, without case. Where answers are numbers, use
    `digit_span`: this reward can be high for a number in a sentence that is worded differently. The reward is 1 if the
    initial response has no letters or digits.

    >>> exact_span("Ada Lum", ["It is ada lum.", "Ada"])
    [0.0, 0.5]
    """
    return [1.0 - _longest_span(letters_and_digits(reference), letters_and_digits(sample)) for sample in samples]


def digit_span(reference: str, samples: Sequence[str]) -> list[float]:
    """1 - length of the longest run of the initial response's digits in a sample / number of its digits.

    For phone numbers and the like: only the digits count, not the words around them, names among them. Initial responses
    without digits are compared by `exact_span`.

    >>> digit_span("Call 555-0134.", ["The number is 5550134", "555 0199", "I do not know."])
    [0.0, 0.2857142857142857, 1.0]
    """
    if not (digits := _digits(reference)):
        return exact_span(reference, samples)
    return [1.0 - _longest_span(digits, _digits(sample)) for sample in samples]


def personal_data(reference: str, samples: Sequence[str]) -> list[float]:
    """The lower of `exact_span` and `digit_span`: high only if neither the characters nor the digits are left.

    For answers with numbers and names, such as addresses, where `digit_span` would leave the names.

    >>> personal_data("3904 October Woods Drive", ["October Woods Drive", "Call 39-04", "I do not know."])
    [0.19047619047619047, 0.0, 0.9523809523809523]
    """
    return [min(pair) for pair in zip(exact_span(reference, samples), digit_span(reference, samples), strict=True)]


# A run that is in a sample is still in it when more words follow.
exact_span.is_monotone = digit_span.is_monotone = personal_data.is_monotone = True


def _longest_span(reference: str, sample: str) -> float:
    """Length of the longest common substring, as a fraction of the reference's; 0 for an empty reference."""
    matcher = SequenceMatcher(None, reference, sample, autojunk=False)  # autojunk ignores characters of long samples
    return matcher.find_longest_match().size / max(1, len(reference))


def letters_and_digits(text: str, form: str = "NFKC") -> str:
    """The letters and digits of a text, case-folded. With the form NFKD letters lose their accents."""
    return "".join(character for character in unicodedata.normalize(form, text).casefold() if character.isalnum())


def _digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(character)) for character in text if character.isdecimal())


class Scorer:
    """Computes the rewards of answers that are given as token ids.

    Args:
        reward: a reward function.
        text: token ids of an answer -> its text.
        min_len: the reward of answers with fewer words is reduced (`penalize_short`).
        beginning: token ids of the first tokens of an answer -> the text that further tokens do not change, but for its last
            word; by default `text`.
    Attributes:
        name: dotted path of the reward function.
        is_monotone: whether the reward never rises when words are added to a sample.
    """

    def __init__(
        self,
        reward: Callable[[str, list[str]], list[float]],
        text: Callable[[list[int]], str],
        min_len: int,
        beginning: Callable[[list[int]], str] | None = None,
    ):
        self.reward, self.text, self.min_len, self.beginning = reward, text, min_len, beginning or text
        function = getattr(reward, "func", reward)  # inside a functools.partial
        self.name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
        self.is_monotone = getattr(function, "is_monotone", False)
        if hasattr(function, "never_rises"):
            log.warning(
                "method.reward=%s: the attribute never_rises has no effect; it is now called is_monotone", self.name
            )

    def warn_of_references_without_words(self, references: Sequence[str]) -> None:
        """Warn of initial responses without words: with ROUGE-L, any sample has the reward 1, and the question is solved."""
        if without := sum(not rouge_tokens(reference) for reference in references):
            log.warning(
                "%d of %d initial responses have no words that ROUGE compares, so that any sample has the reward 1: "
                "these questions are not unlearned",
                without,
                len(references),
            )

    def rewards(self, reference: str, answers: Sequence[list[int]]) -> list[float]:
        """The reward of each answer, in [0, 1].

        Raises:
            UserError: when the reward function returns anything but one number in [0, 1] per answer.
        """
        texts = [self.text(answer) for answer in answers]
        return penalize_short(self._checked(reference, texts), texts, self.min_len)

    def upper_bound(self, reference: str, beginning: list[int]) -> float:
        """For a monotone reward: an upper bound of the reward of every answer that begins with these tokens."""
        return self._checked(reference, [complete_words(self.beginning(beginning))])[0]

    def _checked(self, reference: str, samples: list[str]) -> list[float]:
        """What the reward function returns for the samples, as floats. Rounding errors are clipped to [0, 1]."""
        returned = self.reward(reference, samples)
        values: Any = returned.tolist() if hasattr(returned, "tolist") else returned  # of an array or a tensor
        is_list = isinstance(values, Sequence) and len(values) == len(samples)
        if not is_list or not all(isinstance(value, Real) and -ROUNDING <= value <= 1 + ROUNDING for value in values):
            raise UserError(
                f"method.reward={self.name} returned {returned!r}; expected a list with one number in [0, 1] "
                f"per sample (samples: {len(samples)})"
            )
        return [min(max(float(value), 0.0), 1.0) for value in values]


def penalize_short(rewards: Sequence[float], samples: Sequence[str], min_len: int) -> list[float]:
    """The rewards, less exp(-w) for samples of w < min_len words; never below 0.

    >>> penalize_short([1.0, 1.0], ["a b", "a b c"], min_len=3)
    [0.8646647167633873, 1.0]
    """
    lengths = [len(words(sample)) for sample in samples]
    return [
        max(0.0, reward - math.exp(-length)) if length < min_len else reward
        for reward, length in zip(rewards, lengths, strict=True)
    ]


def complete_words(text: str) -> str:
    """The text without its last word, which may be incomplete."""
    return text[: max((index for index, character in enumerate(text) if character.isspace()), default=0)]
