"""Questions and answers in invented words, with lengths as in TOFU, for models with random weights.

Nothing is downloaded. With random weights no answer ends by itself, so every sample's length is drawn from those of TOFU's
answers, and both trainers stop there.
"""

from itertools import product

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.data import Row

END, FRAME = "<end>", ("Question:", "Answer:")  # as in the prompt template
CONSONANTS, VOWELS, MARKS = "bdfgklmnprstvz", "aeiou", ".,;:!?-()"
LENGTH_STREAM, ROW_STREAM = 4, 5

# TOFU forget10 under the tokenizer of SmolLM2: number of tokens -> number of rows, of 400.
# Prompts are "Question: ...\nAnswer:"; answers count their EOS token.
PROMPT_TOKENS = {
    15: 4, 16: 9, 17: 26, 18: 29, 19: 37, 20: 29, 21: 52, 22: 30, 23: 44, 24: 24, 25: 23, 26: 17, 27: 18, 28: 6, 29: 6,
    30: 6, 31: 6, 32: 7, 33: 7, 34: 2, 35: 4, 36: 3, 37: 4, 38: 2, 39: 1, 45: 2, 50: 1, 56: 1,
}  # fmt: skip
ANSWER_TOKENS = {
    9: 1, 11: 2, 12: 2, 13: 1, 14: 5, 15: 4, 16: 6, 17: 6, 19: 4, 20: 3, 21: 6, 22: 3, 23: 6, 24: 8, 25: 6, 26: 14,
    27: 11, 28: 14, 29: 12, 30: 10, 31: 7, 32: 17, 33: 12, 34: 17, 35: 17, 36: 14, 37: 10, 38: 11, 39: 14, 40: 15, 41: 14,
    42: 7, 43: 4, 44: 14, 45: 9, 46: 8, 47: 10, 48: 6, 49: 5, 50: 6, 51: 7, 52: 3, 53: 7, 54: 8, 55: 5, 56: 1, 57: 3,
    58: 2, 59: 8, 61: 3, 62: 2, 63: 1, 65: 1, 67: 1, 69: 2, 72: 1, 73: 1, 81: 1, 83: 2,
}  # fmt: skip


def draw_lengths(counts: dict[int, int], n: int, key: tuple[int, ...]) -> list[int]:
    """n lengths from one of the tables above, the same for the same key."""
    lengths, weights = np.array(list(counts)), np.array(list(counts.values()))
    return np.random.default_rng((*key, LENGTH_STREAM)).choice(lengths, n, p=weights / weights.sum()).tolist()


def words(n: int) -> list[str]:
    """n different words; every fourth is punctuation, so that a word of text has 1.33 tokens (TOFU's have 1.38)."""
    syllables = [consonant + vowel for consonant, vowel in product(CONSONANTS, VOWELS)]
    spoken = ("".join(parts) for parts in product(syllables, syllables, syllables))
    marks = ("".join(parts) for length in range(1, 6) for parts in product(MARKS, repeat=length))
    return [next(marks) if i % 4 == 3 else next(spoken) for i in range(n)]


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` ids, each of them a word.

    It has no padding token: the embedding of one is zero, and deep random models have no finite gradient there.
    """
    vocabulary = {word: i for i, word in enumerate([END, *FRAME, *words(vocab_size - 1 - len(FRAME))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=END)


def rows(n: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[Row]:
    """n questions with answers whose lengths follow TOFU's."""
    rng = np.random.default_rng((seed, ROW_STREAM))

    def text(length: int) -> str:
        return tokenizer.decode(rng.integers(1, len(tokenizer), length).tolist())

    prompts = draw_lengths(PROMPT_TOKENS, n, (seed, 0))
    answers = draw_lengths(ANSWER_TOKENS, n, (seed, 1))
    return [
        Row(index, text(prompt - len(FRAME)), text(answer - 1))
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
