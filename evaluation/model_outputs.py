"""The passes that metrics share: a model answers, samples and is asked for token probabilities, each question once.

A metric asks a `ModelOutputs` for what it needs; what another metric asked for before is not computed again. On several
processes (torchrun, accelerate) each takes a part of the rows, and all of them get all results.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from common.collate import collate
from common.config import EvaluationConfig
from common.data import Row
from common.hardware import has_fast_bf16, suitable_threads
from common.losses import answer_logits
from common.model import eos_token_ids
from common.prompts import Example, PromptFormat, check_prompt_lengths
from generation.replica import Replica
from generation.sampler import evaluation_mode, generate
from generation.token_sampling import SamplingSettings

T = TypeVar("T")
TOKENS_A_PASS = 4096  # of a batch that goes through the model at once, padding included
TOKENS_A_PART = 256  # whose probabilities over the whole vocabulary are in memory at once


@dataclass(frozen=True)
class TokenLogProbs:
    """What a model makes of the tokens of one text. All arrays have shape (tokens,); float32 whatever the model's type.

    Attributes:
        log_probs: log-probability of each token after those before it.
        is_argmax: whether no other token was likelier there.
        expected: mean of log p under the model's own distribution p over the next token, at each place.
        deviation: standard deviation of log p under p.
        ends: whether the last token is the EOS token.
    """

    log_probs: np.ndarray
    is_argmax: np.ndarray
    expected: np.ndarray
    deviation: np.ndarray
    ends: bool

    def words(self) -> "TokenLogProbs":
        """The same without the EOS token, which says nothing of what the text is about."""
        if not self.ends:
            return self
        kept = (array[:-1] for array in (self.log_probs, self.is_argmax, self.expected, self.deviation))
        return TokenLogProbs(*kept, ends=False)

    @property
    def mean_log_prob(self) -> float | None:
        """Mean log-probability of a token, -NLL/|y|; None without a token."""
        return float(self.log_probs.mean(dtype=np.float64)) if len(self.log_probs) else None


class ModelOutputs:
    """A model under evaluation, and everything that was asked of it so far.

    Args:
        load: gives the model when a pass needs it.
        prompts: how it is asked.
        evaluation: longest answer, rows side by side, and whether a bfloat16 copy generates.
        max_length: tokens of a question with its given answer, at most; longer answers are cut as in training.

    Attributes:
        seconds: kind of pass -> time that it took.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        prompts: PromptFormat,
        evaluation: EvaluationConfig,
        max_length: int,
    ):
        self.load = load
        self.prompts = prompts
        self.evaluation = evaluation
        self.max_length = max_length
        self._in_bf16 = has_fast_bf16() if evaluation.bf16 == "auto" else evaluation.bf16
        self.seconds: dict[str, float] = {}
        self._answers: dict[tuple[int, ...], str] = {}
        self._tokens: dict[tuple[tuple[int, ...], tuple[int, ...]], TokenLogProbs] = {}

    def with_weights(self, model: PreTrainedModel) -> "ModelOutputs":
        """Another model that is asked in the same way: a copy whose weights were changed."""
        return ModelOutputs(lambda: model, self.prompts, self.evaluation, self.max_length)

    # --- text ---

    def answers(self, questions: Sequence[str], beginning: str = "") -> list[str]:
        """The greedy answer to every question.

        Args:
            beginning: words that are put into the model's mouth; the answer is what it says after them.
        """
        begun = self.prompts.answer(beginning)[:-1] if beginning else []
        asked = [(*self.prompts.prompt(question), *begun) for question in questions]
        new = [ids for ids in dict.fromkeys(asked) if ids not in self._answers]
        if new:
            settings = SamplingSettings(self.evaluation.max_length, batch_size=self.evaluation.batch_size)
            with self._timed("greedy answers"):
                texts = self._generate(new, settings, None)
            self._answers.update((ids, text) for ids, (text,) in zip(new, texts, strict=True))
        return [self._answers[ids] for ids in asked]

    def samples(self, questions: Sequence[str], settings: SamplingSettings, seed: int) -> list[list[str]]:
        """`settings.num_samples` sampled answers to every question, drawn with random numbers of their own."""
        asked = [tuple(self.prompts.prompt(question)) for question in questions]
        with self._timed("samples"):
            return self._generate(asked, settings, [(seed, index) for index in range(len(asked))])

    def _generate(
        self, prompts: list[tuple[int, ...]], settings: SamplingSettings, keys: list[tuple[int, ...]] | None
    ) -> list[list[str]]:
        check_prompt_lengths([list(ids) for ids in prompts], settings.max_length, "evaluation.max_length")
        model = self.load()
        if self._in_bf16 and model.dtype == torch.float32:
            model = Replica(model, torch.bfloat16).model
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))

        def of_places(places: list[int]) -> list[list[str]]:
            ends = eos_token_ids(model, self.prompts.eos_token_id)
            own = [keys[place] for place in places] if keys else None
            ids = [list(prompts[place]) for place in places]
            found = generate(model, ids, settings, ends, rng_keys=own, description="answering")
            return [[self.prompts.text(answer) for answer in answers] for answers in found]

        return _by_place(order, of_places)

    # --- token probabilities ---

    def tokens_of_answers(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogProbs]:
        """Token probabilities of given answers, the EOS token's last, after (question, answer) pairs' questions."""
        return self.tokens([self.prompts.example(Row(0, *pair), self.max_length) for pair in pairs])

    def tokens(self, examples: Sequence[Example]) -> list[TokenLogProbs]:
        """Token probabilities of the answers of examples; an answer without a token has empty arrays."""
        asked = [(tuple(example.prompt), tuple(example.answer)) for example in examples]
        new = [key for key in dict.fromkeys(asked) if key not in self._tokens]
        if new:
            with self._timed("token probabilities"):
                self._tokens.update(zip(new, self._read(new), strict=True))
        return [self._tokens[key] for key in asked]

    def _read(self, keys: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[TokenLogProbs]:
        model = self.load()
        examples = [Example(list(prompt), list(answer)) for prompt, answer in keys]
        batches = batches_by_length([len(example) for example in examples], self.evaluation.batch_size)
        rows = [[examples[i] for i in batch] for batch in batches]
        end = self.prompts.eos_token_id
        with suitable_threads(model):
            read = _by_place(
                list(range(len(rows))), lambda own: [read_tokens(model, rows[place], end) for place in own]
            )
        found = dict(zip(chain(*batches), chain(*read), strict=True))
        return [found[i] for i in range(len(examples))]

    def each(self, what: str, examples: Sequence[Example], measure: Callable[[PreTrainedModel, Example], T]) -> list[T]:
        """What `measure` says of the model and each example, one at a time, timed as `what`."""
        model = self.load()
        with self._timed(what), suitable_threads(model):
            places = list(range(len(examples)))
            return _by_place(places, lambda own: [measure(model, examples[place]) for place in own])

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def batches_by_length(lengths: Sequence[int], most_rows: int | None) -> list[list[int]]:
    """Places of rows that go through the model together, of like length: at most TOKENS_A_PASS with their padding.

    >>> batches_by_length([4000, 3, 2000, 2000], None)
    [[1, 2], [3], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for i in order:
        rows = len(batches[-1]) + 1 if batches else 0
        if batches and rows * lengths[i] <= TOKENS_A_PASS and (most_rows is None or rows <= most_rows):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def read_tokens(model: PreTrainedModel, examples: Sequence[Example], eos_token_id: int) -> list[TokenLogProbs]:
    """Token probabilities of a batch of examples, from one forward pass."""
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples).items()}
    if not any(example.answer for example in examples):
        empty = np.zeros(0, dtype=np.float32)
        return [TokenLogProbs(empty, empty.astype(bool), empty, empty, ends=False) for _ in examples]
    with evaluation_mode(model):
        logits, targets, rows = answer_logits(model, batch)
    # In parts: each intermediate is as large as the logits, gigabytes with a vocabulary of 100,000 tokens.
    parts = zip(logits.split(TOKENS_A_PART), targets.split(TOKENS_A_PART), strict=True)
    arrays = [
        torch.cat(of_parts).cpu().numpy() for of_parts in zip(*(_of_logits(*part) for part in parts), strict=True)
    ]
    rows = rows.cpu().numpy()
    return [
        TokenLogProbs(*(array[rows == row] for array in arrays), ends=example.answer[-1:] == [eos_token_id])
        for row, example in enumerate(examples)
    ]


def _of_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first four attributes of `TokenLogProbs` from logits, shape (tokens, vocabulary)."""
    # A token that can never come has log-probability -inf, and 0 times -inf is not a number.
    log_probs = logits.log_softmax(-1).clamp(min=-1e4)
    probabilities = log_probs.exp()
    expected = (probabilities * log_probs).sum(-1)
    deviation = (probabilities * (log_probs - expected[:, None]).square()).sum(-1).sqrt()
    of_target = log_probs.gather(1, targets[:, None]).squeeze(1)
    return of_target, of_target == log_probs.amax(-1), expected, deviation


def _by_place(places: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
    """`work` done on all places, in their numerical order; each process does a share and gets everything."""
    state = PartialState()
    own = places[state.process_index :: state.num_processes]
    done = gather_object(list(zip(own, work(own), strict=True)))
    return [result for _, result in sorted(done, key=lambda pair: pair[0])]
