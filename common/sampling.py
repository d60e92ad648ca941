"""The one engine that generates text: PMC's samples, the initial responses and the evaluation's answers.

1. Every prompt goes through the model once, whatever the number of samples; its cache is then repeated.
2. Every answer has random numbers of its own, keyed by (seed, optimizer step, row index): neither the order of the
   prompts, nor the rows beside it, nor the number of processes changes what is drawn.
3. A finished answer leaves the batch as soon as a tenth of the rows are finished.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

KEEP_SHARE = 0.9  # rows are dropped from the batch when at most this share of them is unfinished


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn.

    Attributes:
        max_length: tokens of prompt and answer together, at most.
        num_samples: answers to each prompt.
        temperature: the logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens; 0: all.
        top_p: of those, the smallest set of likeliest tokens whose probability is at least p; 1: all.
        batch_size: answers generated side by side, at most.
    """

    max_length: int
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 256


class Replica:
    """A copy of a model with its parameters in the type that samples are drawn in.

    Sampling reads every weight once a token, so half the bytes are twice the speed, while the optimizer keeps float32.
    Buffers such as the rotary frequencies keep their type.

    Args:
        source: the model that is trained; make the replica before it is wrapped for training.
        dtype: type of the copy's parameters.
    """

    def __init__(self, source: PreTrainedModel, dtype: torch.dtype):
        self.source = source
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """The copy, on the source's device and with its present weights."""
        self.model.to(self.source.device)
        torch._foreach_copy_(list(self.model.parameters()), list(self.source.parameters()))
        return self.model


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    end_token_ids: Sequence[int],
    keys: Sequence[tuple[int, ...]] | None = None,
    description: str | None = None,
) -> list[list[list[int]]]:
    """Answers to prompts, as token ids.

    Args:
        model: a causal language model; left in the mode (train or eval) that it came in.
        prompts: token ids of each prompt, of any lengths below `max_length`.
        settings: how to draw.
        end_token_ids: tokens that end an answer.
        keys: for each prompt the integers that its random numbers are keyed by; needed unless greedy.
        description: text of a progress bar that counts finished answers; None: no bar.
    Returns:
        for each prompt `num_samples` answers. An answer ends with its end token unless `max_length` cut it off.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    total = len(prompts) * settings.num_samples
    # disable=None: a bar on a terminal only
    bar = tqdm(total=total, desc=description, unit="answer", leave=False, disable=None if description else True)
    with bar, evaluation_mode(model):
        for chunk, samples in _chunks(prompts, settings):
            uniforms = None
            if settings.temperature > 0:
                drawn = [random_numbers(keys[i], samples.stop, settings.max_length)[samples.start :] for i in chunk]
                uniforms = torch.from_numpy(np.concatenate(drawn))
            n = len(samples)
            rows = _generate_chunk(model, [prompts[i] for i in chunk], n, settings, end_token_ids, uniforms, bar)
            for position, i in enumerate(chunk):
                answers[i] += rows[position * n : (position + 1) * n]
    return answers


@contextlib.contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout inside; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _chunks(prompts: Sequence[list[int]], settings: SamplingSettings) -> Iterator[tuple[list[int], range]]:
    """Which prompts and which of their samples go side by side: at most `batch_size` answers, prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, settings.num_samples, settings.batch_size):
        samples = range(first, min(first + settings.batch_size, settings.num_samples))
        per_chunk = settings.batch_size // len(samples)
        for start in range(0, len(order), per_chunk):
            yield order[start : start + per_chunk], samples


def random_numbers(key: tuple[int, ...], num_samples: int, positions: int) -> np.ndarray:
    """Uniforms in [0, 1) for the answers to one prompt, shape (num_samples, positions).

    The first samples stay the same when more are asked for.
    """
    return np.random.default_rng(key).random((num_samples, positions), dtype=np.float32)


def _generate_chunk(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int,
    settings: SamplingSettings,
    end_token_ids: Sequence[int],
    uniforms: torch.Tensor | None,
    bar: tqdm,
) -> list[list[int]]:
    """`n` answers to each of some prompts, in one shrinking batch; answers of one prompt lie together."""
    device = model.device
    input_ids, mask = _pad_left(prompts, device)
    cache = DynamicCache(config=model.config)
    logits = _forward(model, input_ids, mask, cache)
    if n > 1:
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    rows = len(prompts) * n
    room = torch.tensor([settings.max_length - len(prompt) for prompt in prompts], device=device).repeat_interleave(n)
    ends = torch.tensor(end_token_ids, device=device)
    if uniforms is not None:
        uniforms = uniforms.to(device)
    drawn = torch.zeros((rows, int(room.max())), dtype=torch.long, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # the rows of the batch, by their place in `drawn`
    finished = torch.zeros(rows, dtype=torch.bool, device=device)  # of the rows in the batch
    for position in range(drawn.shape[1]):
        uniform = None if uniforms is None else uniforms[alive, position]
        tokens = draw_tokens(logits, settings, uniform)
        drawn[alive, position] = tokens
        lengths[alive[~finished]] += 1
        before = finished
        finished = before | torch.isin(tokens, ends) | (room[alive] <= position + 1)
        bar.update(int((finished & ~before).sum()))
        if bool(finished.all()):
            break
        keep = ~finished
        if keep.sum() <= KEEP_SHARE * len(keep):
            index = keep.nonzero().squeeze(1)
            cache.batch_select_indices(index)
            alive, tokens, mask, finished = alive[index], tokens[index], mask[index], finished[index]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _forward(model, tokens[:, None], mask, cache)
    lengths, drawn = lengths.tolist(), drawn.tolist()
    return [ids[:length] for ids, length in zip(drawn, lengths, strict=True)]


def _pad_left(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, shape (prompts, longest), with the prompts' ends aligned."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _forward(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits of the next token, float32, shape (rows, vocabulary); the cache grows by `input_ids`."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    # Under mixed precision accelerate wraps `forward` in autocast, which would cast every weight again at every token.
    forward = model.__dict__.get("_original_forward", model)
    output = forward(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def draw_tokens(logits: torch.Tensor, settings: SamplingSettings, uniform: torch.Tensor | None) -> torch.Tensor:
    """One token a row.

    Temperature, then top_k, then top_p on what top_k left, as Hugging Face's `generate` orders them; the token is picked
    by inverting the cumulative distribution of the kept tokens at `uniform`. A tie at the k-th place keeps k tokens.

    Args:
        logits: shape (rows, vocabulary), float32.
        uniform: shape (rows,), in [0, 1); not looked at when greedy.
    Returns:
        token ids, shape (rows,).
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    kept = settings.top_k if 0 < settings.top_k < logits.shape[-1] else logits.shape[-1]
    values, tokens = torch.topk(logits / settings.temperature, kept, dim=-1)  # sorted, likeliest first
    probabilities = values.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token stays while the mass of the likelier ones is below top_p; the first always stays.
    inside = (cumulative - probabilities) < settings.top_p
    mass = torch.where(inside, cumulative, 0).amax(dim=-1)
    picked = (cumulative <= (uniform * mass)[:, None]).sum(dim=-1)
    picked = picked.clamp(max=inside.sum(dim=-1) - 1)  # rounding at the upper end
    return tokens.gather(1, picked[:, None]).squeeze(1)
