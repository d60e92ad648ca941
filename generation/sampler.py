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
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from common.hardware import suitable_threads
from generation.batch_size import rows_that_fit
from generation.decoder import Decoder, decoder_of
from generation.kv_cache import compact_indices
from generation.prepacked_linear import prepacked_linears
from generation.token_sampling import SamplingSettings, _uniforms, draw_tokens

COMPACT_THRESHOLD = 0.9  # rows are dropped from the batch when at most this share of them is unfinished
CHECK_INTERVAL = {"cpu": 1, "cuda": 8}  # tokens between two looks at what is finished; a look makes a GPU wait


class PartialSample(NamedTuple):
    """An answer while it is drawn: whose it is, by the places of prompt and sample, and its ids so far."""

    prompt: int
    sample: int
    ids: list[int]


class StoppingCriteria(Protocol):
    """Looks at answers while they are drawn, every `every` tokens, and says which need not be finished."""

    every: int

    def check(self, finished: Sequence[PartialSample], running: Sequence[PartialSample]) -> Sequence[bool]:
        """For each running answer whether to stop it; `finished` are those that ended since the last look."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    eos_token_ids: Sequence[int],
    keys: Sequence[tuple[int, ...]] | None = None,
    description: str | None = None,
    limits: Sequence[Sequence[int]] | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """TokenLosses to prompts, as token ids.

    Args:
        model: a causal language model; left in the mode (train or eval) that it came in.
        prompts: token ids of each prompt, of any lengths below `max_length`.
        settings: how to draw.
        eos_token_ids: tokens that end an answer.
        keys: for each prompt the integers that its random numbers are keyed by; needed unless greedy.
        description: text of a progress bar that counts finished answers; None: no bar.
        limits: for each prompt the most tokens of each of its answers; None: what `max_length` leaves.
        stopping_criteria: may stop answers half-way.
        temperatures: for each prompt, instead of the one in `settings`, which must be above 0 as these must.
    Returns:
        for each prompt `num_samples` answers. An answer ends with its EOS token unless its limit or `stopping_criteria` cut it short.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    total = len(prompts) * settings.num_samples
    # disable=None: a bar on a terminal only
    bar = tqdm(total=total, desc=description, unit="answer", leave=False, disable=None if description else True)
    with bar, suitable_threads(model), evaluation_mode(model), prepacked_linears(model):
        decoder = decoder_of(model)
        batch_size = settings.batch_size or rows_that_fit(model, settings.max_length)
        for chunk, samples in _chunks(prompts, settings.num_samples, batch_size):
            room = [settings.max_length - len(prompts[i]) for i in chunk for _ in samples]
            if limits:
                room = [limits[i][sample] for i in chunk for sample in samples]
            batch = _Batch(
                decoder, [(i, sample) for i in chunk for sample in samples], room, eos_token_ids, stopping_criteria, bar
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


class _Batch:
    """TokenLosses drawn side by side, in a batch that shrinks as they end.

    `drawn`, `lengths` and `names` have all answers by their place; `rows` are the places of those still in the batch,
    and `finished` and `room` belong to these.
    """

    def __init__(
        self,
        decoder: Decoder,
        names: list[tuple[int, int]],
        room: list[int],
        eos_token_ids: Sequence[int],
        stopping_criteria: StoppingCriteria | None,
        bar: tqdm,
    ):
        device = decoder.model.device
        self.decoder, self.names, self.stopping_criteria, self.bar = decoder, names, stopping_criteria, bar
        self.ends = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        self.columns = max(room)
        self.drawn = torch.zeros((len(names), self.columns), dtype=torch.long, device=device)
        self.lengths = torch.zeros(len(names), dtype=torch.long, device=device)
        self.rows = torch.arange(len(names), device=device)
        self.room = torch.tensor(room, device=device)
        self.finished = torch.zeros(len(names), dtype=torch.bool, device=device)
        self.unreported = set(range(len(names)))  # places that the stopping_criteria has not seen the end of
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
        every = CHECK_INTERVAL.get(self.rows.device.type, 1)
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
        if self.stopping_criteria and (position % self.stopping_criteria.every == 0 or bool(self.finished.all())):
            self.watch()
        alive = ~self.finished
        unfinished = int(alive.sum())
        self.bar.update(len(self.names) - unfinished - self.ended)
        self.ended = len(self.names) - unfinished
        if unfinished > COMPACT_THRESHOLD * len(self.rows):
            return None
        kept = compact_indices(alive)
        self.rows, self.room, self.finished = self.rows[kept], self.room[kept], self.finished[kept]
        if len(kept):
            self.decoder.keep(kept)
        return kept

    def watch(self) -> None:
        """Let the stopping_criteria see what is new, and stop what it says."""
        lengths, drawn = self.lengths.tolist(), self.drawn.tolist()
        running_rows = [] if bool(self.finished.all()) else self.rows[~self.finished].tolist()
        ended_rows = sorted(self.unreported - set(running_rows))
        self.unreported.intersection_update(running_rows)
        ended, running = (
            [PartialSample(*self.names[row], drawn[row][: lengths[row]]) for row in rows]
            for rows in (ended_rows, running_rows)
        )
        stop = self.stopping_criteria.check(ended, running)
        stopped = {row for row, stops in zip(running_rows, stop, strict=True) if stops}
        self.unreported -= stopped
        if stopped:
            self.finished |= torch.tensor([row in stopped for row in self.rows.tolist()], device=self.finished.device)
