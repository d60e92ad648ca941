"""ROUGE-L recall and F1. With stems, recall is identical to that of the `rouge_score` package, bit for bit, and faster.

That package's words consist of a-z and 0-9, so text in other scripts has none. `data.words=unicode` compares words of any
script. The longest common subsequence is computed in compiled code (rapidfuzz), and stems are cached.
"""

import contextlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import regex
from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_NOT_A_LATIN_WORD = re.compile(r"[^a-z0-9]+")
# Scripts that are written without spaces: each character is a word. Marks and joiners belong to the character before.
_ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_UNICODE_WORD = regex.compile(
    rf"(?:{_ALONE}|(?:(?!{_ALONE})[\p{{L}}\p{{N}}][\p{{M}}\u200c\u200d]*)+)[\p{{M}}\u200c\u200d]*"
)
_STEMMER = PorterStemmer()
_kind = "latin"


@contextlib.contextmanager
def use_words(kind: str) -> Iterator[None]:
    """A context in which texts are split into words of this kind, a value of `data.words`."""
    global _kind
    before, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = before


def words(text: str) -> list[str]:
    """The words that are counted: separated by whitespace, or with `data.words=unicode` those that ROUGE compares."""
    return text.split() if _kind == "latin" else list(rouge_tokens(text))


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    # rouge_score does not stem words of up to three letters.
    return _STEMMER.stem(word) if len(word) > 3 and word.isascii() else word


def rouge_tokens(text: str, stemmed: bool = True) -> tuple[str, ...]:
    """The lower-case words that ROUGE compares, those of a-z and 0-9 stemmed."""
    return _tokens(text, _kind, stemmed)


@lru_cache(maxsize=1 << 14)
def _tokens(text: str, kind: str, stemmed: bool) -> tuple[str, ...]:
    if kind == "latin":  # characters other than a-z and 0-9 separate words
        found = [word for word in _NOT_A_LATIN_WORD.split(text.lower()) if word]
    else:
        found = _UNICODE_WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return tuple(map(_stem, found) if stemmed else found)


def rouge_l_f1(reference: str, answer: str, stemmed: bool = True) -> float:
    """Harmonic mean of ROUGE-L recall and precision, in [0, 1]: 2 LCS / (len(reference) + len(answer)).

    0 if either has no words. Source: as `rouge_l_recall`.
    """
    expected, given = rouge_tokens(reference, stemmed), rouge_tokens(answer, stemmed)
    if not expected or not given:
        return 0.0
    return 2 * LCSseq.similarity(expected, given) / (len(expected) + len(given))


def rouge_l_recall(reference: str, answer: str) -> float:
    """Fraction of the reference's words that appear in the answer in the same order, in [0, 1].

    recall = LCS(reference, answer) / len(reference); 0 if either has no words.
    Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
    """
    expected, given = rouge_tokens(reference), rouge_tokens(answer)
    if not expected or not given:
        return 0.0
    return LCSseq.similarity(expected, given) / len(expected)
