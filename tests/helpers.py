"""A model whose token probabilities are written down, for scores that are computed by hand."""

from types import SimpleNamespace

import numpy as np
import torch

from common.config import EvaluationConfig, PromptConfig
from common.prompts import PromptFormat
from evaluation.model_outputs import ModelOutputs, TokenLogProbs

VOCABULARY = 8
END = 0


class BigramModel(torch.nn.Module):
    """The next token depends on the present one alone: row t of `table` has the probabilities after token t."""

    def __init__(self, table, dtype=torch.float32):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(table, dtype=torch.float64).log().to(dtype))
        self.passes = 0

    @property
    def device(self):
        return self.logits.device

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        self.passes += len(input_ids)
        return SimpleNamespace(logits=self.logits[input_ids][logits_to_keep])


class LetterTokenizer:
    """Letters a-g are the tokens 1-7; 0 is the EOS token."""

    chat_template = None
    eos_token_id = END

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 96 for letter in text.lower() if "a" <= letter <= "g"]}

    def decode(self, ids, **_):
        return "".join(chr(96 + int(i)) for i in ids if int(i))


def bigram_outputs(table, max_length=20, dtype=torch.float32, **evaluation):
    """A outputs of a bigram model, asked without any prompt text, and the model."""
    model = BigramModel(table, dtype)
    prompts = PromptFormat(LetterTokenizer(), PromptConfig(style="plain", question="{question}", answer="{answer}"))
    return ModelOutputs(lambda: model, prompts, EvaluationConfig(**evaluation), max_length), model


def random_table(seed=0):
    table = np.random.default_rng(seed).random((VOCABULARY, VOCABULARY)) + 0.05
    return table / table.sum(1, keepdims=True)


def tokens(log_probs, likeliest=None, expected=None, deviation=None, ends=True):
    """TokenLogProbs with given log-probabilities."""
    n = len(log_probs)
    fill = [np.asarray(values, dtype=np.float32) for values in (log_probs, expected or [0] * n, deviation or [1] * n)]
    return TokenLogProbs(fill[0], np.asarray(likeliest or [False] * n, dtype=bool), fill[1], fill[2], ends)
