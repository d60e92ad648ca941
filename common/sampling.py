"""The one engine that generates text: PMC's samples, the initial responses and the evaluation's answers.

1. Every prompt goes through the model once, whatever the number of samples; its cache is then repeated. A beginning that
   many prompts share is read once for all of them.
2. Every answer has random numbers of its own, keyed by (seed, optimizer step, row index): neither the order of the
   prompts, nor the rows beside it, nor the number of processes changes what is drawn.
3. A finished answer leaves the batch as soon as a tenth of the rows are finished.
4. As many answers are drawn side by side as a share of the memory holds.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from common.decoding import Decoder, closed_up, decoder_of, packed_linears, rows_that_fit
from common.runtime import suitable_threads

KEEP_SHARE = 0.9  # rows are dropped from the batch when at most this share of them is unfinished
LOOK_EVERY = {"cpu": 1, "cuda": 8}  # tokens between two looks at what is finished; a look makes a GPU wait
GROUP = 8  # tokens of which only the likeliest is looked at first
DRAWS = 8  # random numbers for a token where a draw may be rejected
REDRAW_STREAM = 2  # keeps the numbers of later draws apart from those of first ones


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn.

    Attributes:
        max_length: tokens of prompt and answer together, at most.
        num_samples: answers to each prompt.
        temperature: the logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens; 0: all.
        top_p: of those, the smallest set of likeliest tokens whose probability is at least p; 1: all.
        batch_size: answers generated side by side, at most; None: as many as a share of the memory holds.
    """

    max_length: int
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int | None = None


class Draft(NamedTuple):
    """An answer while it is drawn: whose it is, by the places of prompt and sample, and its ids so far."""

    prompt: int
    sample: int
    ids: list[int]


class Watcher(Protocol):
    """Looks at answers while they are drawn, every `every` tokens, and says which need not be finished."""

    every: int

    def look(self, finished: Sequence[Draft], running: Sequence[Draft]) -> Sequence[bool]:
        """For each running answer whether to stop it; `finished` are those that ended since the last look."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    end_token_ids: Sequence[int],
    keys: Sequence[tuple[int, ...]] | None = None,
    description: str | None = None,
    limits: Sequence[Sequence[int]] | None = None,
    watcher: Watcher | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Answers to prompts, as token ids.

    Args:
        model: a causal language model; left in the mode (train or eval) that it came in.
        prompts: token ids of each prompt, of any lengths below `max_length`.
        settings: how to draw.
        end_token_ids: tokens that end an answer.
        keys: for each prompt the integers that its random numbers are keyed by; needed unless greedy.
        description: text of a progress bar that counts finished answers; None: no bar.
        limits: for each prompt the most tokens of each of its answers; None: what `max_length` leaves.
        watcher: may stop answers half-way.
        temperatures: for each prompt, instead of the one in `settings`, which must be above 0 as these must.
    Returns:
        for each prompt `num_samples` answers. An answer ends with its end token unless its limit or the watcher cut it off.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    total = len(prompts) * settings.num_samples
    # disable=None: a bar on a terminal only
    bar = tqdm(total=total, desc=description, unit="answer", leave=False, disable=None if description else True)
    with bar, suitable_threads(model), evaluation_mode(model), packed_linears(model):
        decoder = decoder_of(model)
        batch_size = settings.batch_size or rows_that_fit(model, settings.max_length)
        for chunk, samples in _chunks(prompts, settings.num_samples, batch_size):
            room = [settings.max_length - len(prompts[i]) for i in chunk for _ in samples]
            if limits:
                room = [limits[i][sample] for i in chunk for sample in samples]
            batch = _Batch(
                decoder, [(i, sample) for i in chunk for sample in samples], room, end_token_ids, watcher, bar
            )
            uniforms = _uniforms(keys, chunk, samples, settings, max(room)) if settings.temperature > 0 else None
            own = torch.tensor([temperatures[i] for i in chunk for _ in samples]) if temperatures else None
            rows = batch.generate([prompts[i] for i in chunk], settings, uniforms, own)
            for position, i in enumerate(chunk):
                answers[i] += rows[position * len(samples) : (position + 1) * len(samples)]
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


def _chunks(prompts: Sequence[list[int]], num_samples: int, batch_size: int) -> Iterator[tuple[list[int], range]]:
    """Which prompts and which of their samples go side by side: at most `batch_size` answers, prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, num_samples, batch_size):
        samples = range(first, min(first + batch_size, num_samples))
        per_chunk = batch_size // len(samples)
        for start in range(0, len(order), per_chunk):
            yield order[start : start + per_chunk], samples


def random_numbers(key: tuple[int, ...], num_samples: int, positions: int) -> np.ndarray:
    """Uniforms in [0, 1) for the answers to one prompt, shape (num_samples, positions).

    The first samples stay the same when more are asked for.
    """
    return np.random.default_rng(key).random((num_samples, positions), dtype=np.float32)


def _uniforms(
    keys: Sequence[tuple[int, ...]], chunk: list[int], samples: range, settings: SamplingSettings, positions: int
) -> torch.Tensor:
    """Random numbers of the chunk's answers, shape (rows, positions, draws of a token)."""

    def drawn(*stream: int) -> np.ndarray:
        # Shape (max_length) for every key, so that an answer's limit does not change its numbers.
        of_each = [random_numbers((*keys[i], *stream), samples.stop, settings.max_length) for i in chunk]
        return np.concatenate([numbers[samples.start :, :positions] for numbers in of_each])

    draws = [drawn()]
    if settings.top_k == 0 and settings.top_p < 1:
        draws += [drawn(REDRAW_STREAM, draw) for draw in range(1, DRAWS)]
    return torch.from_numpy(np.stack(draws, axis=2))


class _Batch:
    """Answers drawn side by side, in a batch that shrinks as they end.

    `drawn`, `lengths` and `names` have all answers by their place; `rows` are the places of those still in the batch,
    and `finished` and `room` belong to these.
    """

    def __init__(
        self,
        decoder: Decoder,
        names: list[tuple[int, int]],
        room: list[int],
        end_token_ids: Sequence[int],
        watcher: Watcher | None,
        bar: tqdm,
    ):
        device = decoder.model.device
        self.decoder, self.names, self.watcher, self.bar = decoder, names, watcher, bar
        self.ends = torch.tensor(list(end_token_ids), dtype=torch.long, device=device)
        self.columns = max(room)
        self.drawn = torch.zeros((len(names), self.columns), dtype=torch.long, device=device)
        self.lengths = torch.zeros(len(names), dtype=torch.long, device=device)
        self.rows = torch.arange(len(names), device=device)
        self.room = torch.tensor(room, device=device)
        self.finished = torch.zeros(len(names), dtype=torch.bool, device=device)
        self.unreported = set(range(len(names)))  # places that the watcher has not seen the end of
        self.ended = 0

    def generate(
        self,
        prompts: list[list[int]],
        settings: SamplingSettings,
        uniforms: torch.Tensor | None,
        temperatures: torch.Tensor | None = None,
    ) -> list[list[int]]:
        """The answers, those to one prompt together; `temperatures` has shape (answers,)."""
        if uniforms is not None:
            uniforms = uniforms.to(self.rows.device)
        if temperatures is not None:
            temperatures, settings = temperatures.to(self.rows.device), replace(settings, temperature=1.0)
        every = LOOK_EVERY.get(self.rows.device.type, 1)
        logits = self.decoder.start(prompts, len(self.names) // len(prompts), self.columns)
        for position in range(self.columns):
            if temperatures is not None:
                logits = logits.float() / temperatures[self.rows, None]
            tokens = draw_tokens(logits, settings, None if uniforms is None else uniforms[self.rows, position])
            self.drawn[self.rows, position] = tokens
            self.lengths[self.rows] += ~self.finished
            self.finished |= (tokens[:, None] == self.ends).any(1) | (self.room <= position + 1)
            if (position + 1) % every == 0 or position + 1 == self.columns:
                kept = self.look(position + 1)
                if kept is not None:
                    tokens = tokens[kept]
                if len(tokens) == 0:
                    break
            logits = self.decoder.step(tokens)
        lengths, drawn = self.lengths.tolist(), self.drawn.tolist()
        return [ids[:length] for ids, length in zip(drawn, lengths, strict=True)]

    def look(self, position: int) -> torch.Tensor | None:
        """Note what has ended, and drop it when that pays; returns the rows that were kept, None for all."""
        if self.watcher and (position % self.watcher.every == 0 or bool(self.finished.all())):
            self.watch()
        alive = ~self.finished
        unfinished = int(alive.sum())
        self.bar.update(len(self.names) - unfinished - self.ended)
        self.ended = len(self.names) - unfinished
        if unfinished > KEEP_SHARE * len(self.rows):
            return None
        kept = closed_up(alive)
        self.rows, self.room, self.finished = self.rows[kept], self.room[kept], self.finished[kept]
        if len(kept):
            self.decoder.keep(kept)
        return kept

    def watch(self) -> None:
        """Let the watcher see what is new, and stop what it says."""
        lengths, drawn = self.lengths.tolist(), self.drawn.tolist()
        running_rows = [] if bool(self.finished.all()) else self.rows[~self.finished].tolist()
        ended_rows = sorted(self.unreported - set(running_rows))
        self.unreported.intersection_update(running_rows)
        ended, running = (
            [Draft(*self.names[row], drawn[row][: lengths[row]]) for row in rows] for rows in (ended_rows, running_rows)
        )
        stop = self.watcher.look(ended, running)
        stopped = {row for row, stops in zip(running_rows, stop, strict=True) if stops}
        self.unreported -= stopped
        if stopped:
            self.finished |= torch.tensor([row in stopped for row in self.rows.tolist()], device=self.finished.device)


def draw_tokens(logits: torch.Tensor, settings: SamplingSettings, uniforms: torch.Tensor | None) -> torch.Tensor:
    """One token a row.

    Temperature, then top_k, then top_p on what top_k left, as Hugging Face's `generate` orders them.

    Args:
        logits: shape (rows, vocabulary).
        uniforms: shape (rows, draws), in [0, 1); not looked at when greedy.
    Returns:
        token ids, shape (rows,).
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    if settings.top_k:
        return _draw_sorted(logits, min(settings.top_k, logits.shape[-1]), settings, uniforms[:, 0])
    return _draw_from_all(logits, settings, uniforms)


def _draw_sorted(logits: torch.Tensor, k: int, settings: SamplingSettings, uniform: torch.Tensor) -> torch.Tensor:
    """Pick from the k likeliest tokens by inverting their cumulative distribution, likeliest first.

    A tie at the k-th place keeps k tokens.
    """
    values, tokens = top_tokens(logits, k)
    probabilities = (values.float() / settings.temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token stays while the mass of the likelier ones is below top_p; the first always stays.
    inside = (cumulative - probabilities) < settings.top_p
    mass = torch.where(inside, cumulative, 0).amax(dim=-1)
    picked = (cumulative <= (uniform * mass)[:, None]).sum(dim=-1)
    picked = picked.clamp(max=inside.sum(dim=-1) - 1)  # rounding at the upper end
    return tokens.gather(1, picked[:, None]).squeeze(1)


def top_tokens(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of each row, largest first, and their tokens, both of shape (rows, k): `torch.topk`, sooner.

    On a CPU the vocabulary is looked at in groups of GROUP tokens. The k largest logits lie in the k groups with the
    largest maxima: any other group has k groups before it, each with a logit at least as large. So only these are sorted.

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
    values, places = logits.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)


def _draw_from_all(logits: torch.Tensor, settings: SamplingSettings, uniforms: torch.Tensor) -> torch.Tensor:
    """Pick from the whole vocabulary without sorting it: draw, and draw again where the token lies outside top_p.

    A token is inside while the mass of the strictly likelier ones is below top_p, so at least a share top_p of the draws
    is accepted. The few rows that are refused all draws but one are sorted for the last.
    """
    probabilities = (logits.float() / settings.temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    picked = _invert(cumulative, uniforms[:, 0])
    if settings.top_p >= 1:
        return picked
    open_rows = _outside(probabilities, picked, settings.top_p).nonzero().squeeze(1)
    for draw in range(1, uniforms.shape[1] - 1):
        if len(open_rows) == 0:
            return picked
        again = _invert(cumulative[open_rows], uniforms[open_rows, draw])
        picked[open_rows] = again
        open_rows = open_rows[_outside(probabilities[open_rows], again, settings.top_p)]
    if len(open_rows):
        vocabulary = logits.shape[-1]
        picked[open_rows] = _draw_sorted(logits[open_rows], vocabulary, settings, uniforms[open_rows, -1])
    return picked


def _invert(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability is above `uniform` times the total; shape (rows,)."""
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def _outside(probabilities: torch.Tensor, picked: torch.Tensor, top_p: float) -> torch.Tensor:
    """Whether the strictly likelier tokens have top_p of the probability already; shape (rows,)."""
    likelier = probabilities > probabilities.gather(1, picked[:, None])
    return (probabilities * likelier).sum(dim=-1) >= top_p
