"""Sampling for models whose cache the fast decoder cannot use: recurrent states, caches of their own, or none.

Every step processes the whole answers again, without a cache and without padding. That is slow, and right for every causal
language model. `decoder_of` chooses between the two by comparing them once on a few tokens.
"""

import logging
import weakref

import torch
from transformers import PreTrainedModel

from common.errors import UserError, reason
from common.forward import difference
from common.losses import next_token_logits
from generation.cuda_graphs import decoder_with_cache
from generation.decoder import Decoder

log = logging.getLogger(__name__)
MAX_TOKENS = 8192  # in a forward pass
# Settings of models that treat columns beyond so many in another way: selected ones, or the next chunk.
COLUMN_LIMITS = ("index_topk", "keep_window_size", "attention_chunk_size")

_cache_works: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


class PlainDecoder:
    """A model with the token ids of the answers in a batch; the interface is that of `Decoder`."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def start(self, prompts: list[list[int]], n: int, max_new_tokens: int) -> torch.Tensor:
        """The logits of the first tokens of n answers to each prompt, shape (prompts * n, vocabulary)."""
        self.rows = [list(prompt) for prompt in prompts for _ in range(n)]
        return self.next_logits(prompts).repeat_interleave(n, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every answer, shape (rows,); returns the logits of the next, shape (rows, vocabulary)."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.next_logits(self.rows)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, in this order."""
        self.rows = [self.rows[i] for i in rows.tolist()]

    def next_logits(self, rows: list[list[int]]) -> torch.Tensor:
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        order, logits = [], []
        for length, own in by_length.items():
            for part in torch.tensor(own).split(max(1, MAX_TOKENS // length)):
                ids = torch.tensor([rows[i] for i in part.tolist()], device=self.model.device)
                logits.append(next_token_logits(self.model, ids))
                order += part.tolist()
        return torch.cat(logits)[torch.tensor(order).argsort().to(self.model.device)]


def decoder_of(model: PreTrainedModel, max_length: int) -> "Decoder | PlainDecoder":
    """The decoder with a cache, or the plain one if their logits differ for this model or the former raises an error.

    Args:
        max_length: of a prompt and its answer together.
    """
    settings = model.config.get_text_config(decoder=True)
    limits = [limit for name in COLUMN_LIMITS if (limit := getattr(settings, name, None))]
    if limits and 2 * max_length > min(limits):  # padding between columns would count as well
        return PlainDecoder(model)
    if model not in _cache_works:
        problem = _difference(model)
        if problem:
            log.warning("%s: its cache cannot be used here (%s); sampling is slow", type(model).__name__, problem)
        _cache_works[model] = not problem
    return decoder_with_cache(model) if _cache_works[model] else PlainDecoder(model)


@torch.no_grad()
def _difference(model: PreTrainedModel) -> str:
    """What is different where two prompts of unequal length are read, repeated, continued and dropped; "" if nothing."""
    size = model.get_input_embeddings().num_embeddings
    ids = [(size // 2 + i) % size for i in range(11)]  # special tokens have the lowest or the highest ids
    prompts = [ids[:5], ids[5:7]]
    logits = []
    for decoder in (PlainDecoder(model), Decoder(model)):
        try:
            found = [decoder.start(prompts, 2, 4)]
            for step in range(2):
                found.append(decoder.step(torch.tensor(ids[7:11][: len(found[-1])], device=model.device)))
                if step == 0:
                    kept = torch.tensor([0, 3, 2], device=model.device)
                    decoder.keep(kept)
                    found[-1] = found[-1][kept]
        except Exception as error:  # the model's code may raise any exception
            if isinstance(decoder, PlainDecoder):
                raise UserError(
                    f"{type(model).__name__}: its forward pass fails for token ids alone ({reason(error)}); name another model"
                ) from error
            return reason(error)[:100]
        logits.append(torch.cat(found).float())
    largest = difference(*logits, model.dtype)
    return f"logits differ by {largest:.2g} standard deviations" if largest else ""
