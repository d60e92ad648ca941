"""The next token of each row: greedy, top-k and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

GROUP = 8  # tokens in a group of top_tokens
DRAWS = 8  # random numbers for each token where a draw may be rejected
MIN_TEMPERATURE = 1e-6  # lower ones are greedy as well, and divided by them logits can be infinite
REDRAW_KEY = 2  # rng key of the draws after a rejected one


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn.

    Attributes:
        max_length: maximum length of prompt and answer together, in tokens.
        num_samples: answers to each prompt.
        temperature: the logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens; 0: all.
        top_p: of those, the smallest set of likeliest tokens whose probability is at least p; 1: all.
        batch_size: maximum number of answers in a batch; None: as many as fit in a fraction of the memory.
        max_new_tokens: maximum length of an answer; None: only `max_length` limits it.
    """

    max_length: int
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int | None = None
    max_new_tokens: int | None = None

    def tokens_after(self, prompt: Sequence[int]) -> int:
        """Maximum length of an answer to the prompt, in tokens."""
        left = self.max_length - len(prompt)
        return left if self.max_new_tokens is None else min(left, self.max_new_tokens)


def random_numbers(key: tuple[int, ...], num_samples: int, positions: int) -> np.ndarray:
    """Uniforms in [0, 1) for the answers to one prompt, shape (num_samples, positions).

    The first samples' numbers do not depend on num_samples.
    """
    return np.random.default_rng(key).random((num_samples, positions), dtype=np.float32)


def uniforms_of(
    rng_keys: Sequence[tuple[int, ...]], samples: range, settings: SamplingSettings, positions: int
) -> torch.Tensor:
    """Random numbers of the prompts' answers, shape (prompts * samples, positions, draws of a token)."""

    def numbers(*key: int) -> np.ndarray:
        # Always max_length positions, so that an answer's numbers do not depend on the rest of its batch.
        of_prompts = [random_numbers((*own, *key), samples.stop, settings.max_length) for own in rng_keys]
        return np.concatenate([uniforms[samples.start :, :positions] for uniforms in of_prompts])

    redraws = DRAWS if settings.top_k == 0 and settings.top_p < 1 else 1
    return torch.from_numpy(np.stack([numbers(), *(numbers(REDRAW_KEY, draw) for draw in range(1, redraws))], axis=2))


def draw_tokens(logits: torch.Tensor, settings: SamplingSettings, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Draw one token per row.

    Temperature, then top_k, then top_p on the remaining tokens: the order of Hugging Face's `generate`.

    Args:
        logits: shape (rows, vocabulary).
        uniforms: shape (rows, draws), in [0, 1); unused when greedy.
    Returns:
        token ids, shape (rows,).
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    if settings.top_k:
        return _draw_sorted(logits, min(settings.top_k, logits.shape[-1]), settings, uniforms[:, 0])
    return _draw_from_all(logits, settings, uniforms)


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits.float() / max(temperature, MIN_TEMPERATURE)).softmax(dim=-1)


def _draw_sorted(logits: torch.Tensor, k: int, settings: SamplingSettings, uniform: torch.Tensor) -> torch.Tensor:
    """Pick from the k likeliest tokens by inverting their cumulative distribution, likeliest first.

    A tie at rank k keeps k tokens.
    """
    values, tokens = top_tokens(logits, k)
    probabilities = _probabilities(values, settings.temperature)
    cumulative = probabilities.cumsum(dim=-1)
    # A token stays while the mass of the likelier ones is below top_p; the first always stays.
    inside = (cumulative - probabilities) < settings.top_p
    mass = torch.where(inside, cumulative, 0).amax(dim=-1)
    picked = (cumulative <= (uniform * mass)[:, None]).sum(dim=-1)
    picked = picked.clamp(max=inside.sum(dim=-1) - 1)  # rounding at the upper end
    return tokens.gather(1, picked[:, None]).squeeze(1)


def top_tokens(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of each row, largest first, and their tokens, both of shape (rows, k): `torch.topk`, faster.

    On a CPU the vocabulary is split into groups of GROUP tokens. The k groups with the largest maxima
    contain the k largest logits: each of these groups has a logit at least as large as any in another group. So only these
    groups are searched.

    Args:
        logits: shape (rows, vocabulary).
    """
    rows, vocabulary = logits.shape
    groups = vocabulary // GROUP
    if logits.device.type != "cpu" or groups < 2 * k:
        return logits.topk(k)
    firsts = torch.arange(0, groups * GROUP, groups)  # group g is tokens g + firsts, which reads memory in order
    best = logits[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1).topk(k, sorted=False).indices
    left_over = torch.arange(groups * GROUP, vocabulary).expand(rows, -1)
    candidates = torch.cat(((best[:, None] + firsts[:, None]).flatten(1), left_over), 1)
    values, indices = logits.gather(1, candidates).topk(k)
    return values, candidates.gather(1, indices)


def _draw_from_all(logits: torch.Tensor, settings: SamplingSettings, uniforms: torch.Tensor) -> torch.Tensor:
    """Pick from the whole vocabulary without sorting it: draw again wherever the token lies outside top_p.

    A token is inside while the mass of the strictly likelier ones is below top_p, so at least the fraction top_p of draws
    is accepted. The few rows whose draws were all rejected are sorted for the last draw.
    """
    probabilities = _probabilities(logits, settings.temperature)
    cumulative = probabilities.cumsum(dim=-1)
    picked = _invert(cumulative, uniforms[:, 0])
    if settings.top_p >= 1:
        return picked
    rejected = _outside(probabilities, picked, settings.top_p).nonzero().squeeze(1)
    for draw in range(1, uniforms.shape[1] - 1):
        if len(rejected) == 0:
            return picked
        again = _invert(cumulative[rejected], uniforms[rejected, draw])
        picked[rejected] = again
        rejected = rejected[_outside(probabilities[rejected], again, settings.top_p)]
    if len(rejected):
        vocabulary = logits.shape[-1]
        picked[rejected] = _draw_sorted(logits[rejected], vocabulary, settings, uniforms[rejected, -1])
    return picked


def _invert(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability is above `uniform` times the total; shape (rows,)."""
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def _outside(probabilities: torch.Tensor, picked: torch.Tensor, top_p: float) -> torch.Tensor:
    """Whether the strictly likelier tokens already have probability top_p; shape (rows,)."""
    likelier = probabilities > probabilities.gather(1, picked[:, None])
    return (probabilities * likelier).sum(dim=-1) >= top_p
