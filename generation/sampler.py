"""Generates all text: PMC's samples, the initial responses and the evaluation's answers.

1. Each prompt is processed once, whatever the number of samples; its cache is then repeated. If the prompts need several
   forward passes, their common prefix is processed once.
2. Each answer has its own random numbers, keyed by (seed, optimizer step, row index). So the samples do not depend on the
   order of the prompts, the other rows of the batch or the number of processes.
3. Finished answers are removed from the batch once they make up a tenth of it.
4. A batch has as many answers as fit in a fraction of the memory.

With generation.engine=vllm, `generation.vllm_engine` generates instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from common.config import GenerationConfig
from common.forward import evaluation_mode
from common.hardware import suitable_threads
from common.losses import check_finite
from generation import vllm_engine
from generation.batch_size import rows_that_fit
from generation.cuda_graphs import use_cuda_graphs
from generation.decoder import Decoder
from generation.kv_cache import compact_indices
from generation.plain_decoder import PlainDecoder, decoder_of
from generation.prepacked_linear import prepacked_linears
from generation.token_sampling import MIN_TEMPERATURE, SamplingSettings, draw_tokens, uniforms_of

COMPACT_THRESHOLD = 0.9  # finished rows are dropped when at most this fraction of the batch is unfinished
CHECK_INTERVAL = {"cpu": 1, "cuda": 8}  # tokens between two checks for finished rows; a check synchronizes with the GPU


class PartialSample(NamedTuple):
    """An answer during sampling: the indices of its prompt and sample, and its token ids so far."""

    prompt: int
    sample: int
    ids: list[int]


class StoppingCriteria(Protocol):
    """Checks answers during sampling, every `every` tokens, and decides which ones to stop."""

    every: int

    def check(self, finished: Sequence[PartialSample], running: Sequence[PartialSample]) -> Sequence[bool]:
        """For each running answer whether to stop it; `finished` are those that finished since the last check."""


def use_engine(config: GenerationConfig) -> None:
    """Apply the configuration's `generation` section to this process.

    Raises:
        UserError: when vLLM is chosen and cannot be used.
    """
    use_cuda_graphs(config.cuda_graphs)
    vllm_engine.use_vllm(config)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    eos_token_ids: Sequence[int],
    rng_keys: Sequence[tuple[int, ...]] | None = None,
    description: str | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Answers to prompts, as token ids.

    Args:
        model: a causal language model; its mode (train or eval) is restored afterwards.
        prompts: token ids of each prompt, of any lengths below `max_length`.
        settings: sampling settings.
        eos_token_ids: tokens that end an answer.
        rng_keys: for each prompt the integers that its random numbers are keyed by; needed unless greedy.
        description: text of a progress bar that counts finished answers; None: no bar.
        stopping_criteria: may stop answers early.
        temperatures: one for each prompt, replacing the one in `settings`; all must be above 0, the replaced one too.
    Returns:
        for each prompt `num_samples` answers. An answer ends with its EOS token unless `max_length` or `stopping_criteria`
        cut it short.
    """
    if vllm_engine.is_used():
        answers = vllm_engine.generate(model, prompts, settings, eos_token_ids, rng_keys, temperatures)
        if stopping_criteria:  # it scores the answers; none is still running
            finished = [PartialSample(i, j, ids) for i, drawn in enumerate(answers) for j, ids in enumerate(drawn)]
            stopping_criteria.check(finished, [])
        return answers
    if not prompts:
        return []
    answers: list[list[list[int]]] = [[] for _ in prompts]
    total = len(prompts) * settings.num_samples
    # disable=None: a bar on a terminal only
    bar = tqdm(total=total, desc=description, unit="answer", leave=False, disable=None if description else True)
    with bar, suitable_threads(model), evaluation_mode(model), prepacked_linears(model):
        decoder = decoder_of(model, settings.max_length)
        batch_size = settings.batch_size or rows_that_fit(model, settings.max_length)
        for chunk, samples in _chunks(prompts, settings.num_samples, batch_size):
            names = [(i, sample) for i in chunk for sample in samples]
            max_new_tokens = [settings.tokens_after(prompts[i]) for i, _ in names]
            batch = _Batch(decoder, names, max_new_tokens, eos_token_ids, stopping_criteria, bar)
            uniforms = row_temperatures = None
            if settings.temperature > 0:
                keys = [rng_keys[i] for i in chunk]
                uniforms = uniforms_of(keys, samples, settings, max(max_new_tokens)).to(model.device)
            if temperatures:
                of_rows = torch.tensor([temperatures[i] for i, _ in names], device=model.device)
                row_temperatures = of_rows.clamp(min=MIN_TEMPERATURE)
            batch.draw([prompts[i] for i in chunk], settings, uniforms, row_temperatures)
            for (i, _), ids in zip(names, batch.answers(), strict=True):
                answers[i].append(ids)
    return answers


def _chunks(prompts: Sequence[list[int]], num_samples: int, batch_size: int) -> Iterator[tuple[list[int], range]]:
    """The prompts and sample numbers of each batch: at most `batch_size` answers, to prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, num_samples, batch_size):
        samples = range(first, min(first + batch_size, num_samples))
        per_chunk = batch_size // len(samples)
        for start in range(0, len(order), per_chunk):
            yield order[start : start + per_chunk], samples


class _Batch:
    """A batch of answers that shrinks as they finish.

    `drawn`, `lengths` and `names` (prompt, sample) have an entry for every answer. `rows` are the indices of the answers
    still in the batch; `finished` and `max_new_tokens` have an entry for each of these. `running` are the indices of the
    answers that were unfinished at the last check.
    """

    def __init__(
        self,
        decoder: Decoder | PlainDecoder,
        names: list[tuple[int, int]],
        max_new_tokens: list[int],
        eos_token_ids: Sequence[int],
        stopping_criteria: StoppingCriteria | None,
        bar: tqdm,
    ):
        device = decoder.model.device
        self.decoder, self.names, self.stopping_criteria, self.bar = decoder, names, stopping_criteria, bar
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        self.drawn = torch.zeros((len(names), max(max_new_tokens)), dtype=torch.long, device=device)
        self.lengths = torch.zeros(len(names), dtype=torch.long, device=device)
        self.rows = torch.arange(len(names), device=device)
        self.max_new_tokens = torch.tensor(max_new_tokens, device=device)
        self.finished = torch.zeros(len(names), dtype=torch.bool, device=device)
        self.running = set(range(len(names)))

    def draw(
        self,
        prompts: list[list[int]],
        settings: SamplingSettings,
        uniforms: torch.Tensor | None,
        temperatures: torch.Tensor | None,
    ) -> None:
        """Draw all answers.

        Args:
            prompts: token ids; the answers to a prompt are adjacent.
            uniforms: shape (answers, positions, draws); None: greedy.
            temperatures: shape (answers,), instead of the one in `settings`.
        """
        if temperatures is not None:
            settings = replace(settings, temperature=1.0)
        interval = CHECK_INTERVAL.get(self.rows.device.type, 1)
        last = self.drawn.shape[1] - 1
        logits = self.decoder.start(prompts, len(self.names) // len(prompts), last + 1)
        check_finite(logits)
        for position in range(last + 1):
            if temperatures is not None:
                logits = logits.float() / temperatures[self.rows, None]
            tokens = draw_tokens(logits, settings, None if uniforms is None else uniforms[self.rows, position])
            self.drawn[self.rows, position] = tokens
            self.lengths[self.rows] += ~self.finished
            self.finished |= (tokens[:, None] == self.eos_token_ids).any(1) | (self.max_new_tokens <= position + 1)
            if (position + 1) % interval == 0 or position == last:
                self.check(position + 1)
                tokens = self.compact(tokens)
                if len(tokens) == 0:
                    break
            logits = self.decoder.step(tokens)

    def answers(self) -> list[list[int]]:
        return [ids[:length] for ids, length in zip(self.drawn.tolist(), self.lengths.tolist(), strict=True)]

    def compact(self, tokens: torch.Tensor) -> torch.Tensor:
        """Remove finished rows if there are enough; returns the remaining rows' tokens (none if all are finished)."""
        unfinished = ~self.finished
        count = int(unfinished.sum())
        if count > COMPACT_THRESHOLD * len(self.rows):
            return tokens
        self.bar.update(len(self.rows) - count)
        kept = compact_indices(unfinished)
        self.rows, self.max_new_tokens, self.finished = self.rows[kept], self.max_new_tokens[kept], self.finished[kept]
        if count:
            self.decoder.keep(kept)
        return tokens[kept]

    def check(self, length: int) -> None:
        """Apply the stopping criteria at this length: the rows that they stop become finished."""
        criteria = self.stopping_criteria
        if criteria is None or (length % criteria.every and not self.finished.all()):
            return
        answers, running = self.answers(), self.rows[~self.finished].tolist()
        finished = sorted(self.running.difference(running))
        samples = [[PartialSample(*self.names[i], answers[i]) for i in indices] for indices in (finished, running)]
        stopped = [i for i, stops in zip(running, criteria.check(*samples), strict=True) if stops]
        self.finished |= torch.isin(self.rows, torch.tensor(stopped, dtype=torch.long, device=self.rows.device))
        self.running = set(running).difference(stopped)
