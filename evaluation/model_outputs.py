"""The outputs of one model that several metrics use: greedy answers, samples and token log-probabilities.

Greedy answers and token log-probabilities are cached, so that none is computed twice. With several processes (torchrun,
accelerate), each computes a part of the rows, and all of them get all results.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from common.collate import batches_by_length, collate
from common.config import EvaluationConfig
from common.data import Row
from common.forward import evaluation_mode
from common.hardware import has_fast_bf16, suitable_threads
from common.losses import answer_logits, check_finite
from common.model import eos_token_ids
from common.prompts import Example, PromptFormat, check_prompt_lengths, warn_if_cut
from generation.replica import Replica
from generation.sampler import generate
from generation.token_sampling import SamplingSettings

T, K = TypeVar("T"), TypeVar("K")
VOCABULARY_CHUNK = 256  # tokens whose probabilities over the whole vocabulary are in memory at once


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities of the tokens of one text, and statistics that attacks use. All arrays have shape (tokens,).

    Attributes:
        log_probs: log-probability of each token given those before it; float32 for every dtype of the model.
        is_argmax: whether it was the most likely token at its position; of several that are, only the first is.
        logp_mean: expected value of log p at each position, where p is the model's distribution over the next token.
        logp_std: standard deviation of log p under p.
        has_eos: whether the last token is the EOS token.
    """

    log_probs: np.ndarray
    is_argmax: np.ndarray
    logp_mean: np.ndarray
    logp_std: np.ndarray
    has_eos: bool

    def without_eos(self) -> "TokenLogProbs":
        """A copy without the EOS token, which is not part of the text."""
        if not self.has_eos:
            return self
        kept = (array[:-1] for array in (self.log_probs, self.is_argmax, self.logp_mean, self.logp_std))
        return TokenLogProbs(*kept, has_eos=False)

    @property
    def mean_log_prob(self) -> float | None:
        """Mean log-probability of a token, -NLL/|y|; None if there are no tokens."""
        return float(self.log_probs.mean(dtype=np.float64)) if len(self.log_probs) else None


@dataclass(eq=False)
class ModelOutputs:
    """Computes a model's outputs when they are first needed.

    Attributes:
        load: returns the model.
        prompts: its prompt format.
        evaluation: `max_length`, `batch_size` and `bf16` are used.
        max_length: most tokens of a question with a given answer; longer answers are cut, as in training.
        seconds: kind of output -> seconds spent computing it.
    """

    load: Callable[[], PreTrainedModel]
    prompts: PromptFormat
    evaluation: EvaluationConfig
    max_length: int
    seconds: dict[str, float] = field(default_factory=dict)
    _warned: bool = False
    _answers: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    _tokens: dict[tuple[tuple[int, ...], tuple[int, ...]], TokenLogProbs] = field(default_factory=dict)

    def with_weights(self, model: PreTrainedModel) -> "ModelOutputs":
        """The outputs of a copy of the model with changed weights; none is computed yet."""
        return ModelOutputs(lambda: model, self.prompts, self.evaluation, self.max_length, _warned=self._warned)

    # --- text ---

    def answers(self, questions: Sequence[str], beginning: str = "") -> list[str]:
        """The greedy answer to every question.

        Args:
            beginning: text to which the prompt is extended: the response starts with it, and the answer is what follows.
        """
        begun = self.prompts.answer(beginning)[:-1] if beginning else []
        prompts = [(*self.prompts.prompt(question), *begun) for question in questions]
        settings = SamplingSettings(self.evaluation.max_length, batch_size=self.evaluation.batch_size)
        answers = self._cached(
            "greedy answers", self._answers, prompts, lambda new: self._texts(new, settings, begun=bool(beginning))
        )
        return [text for (text,) in answers]

    def completions(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Token ids of the greedy continuation of each prompt's token ids, at most `max_new_tokens`, EOS included."""
        max_length = max(map(len, prompts)) + max_new_tokens
        settings = SamplingSettings(max_length, batch_size=self.evaluation.batch_size, max_new_tokens=max_new_tokens)
        with self._timed("completions"):
            return [ids for (ids,) in self._generate([tuple(prompt) for prompt in prompts], settings)]

    def samples(self, questions: Sequence[str], settings: SamplingSettings, seed: int) -> list[list[str]]:
        """`settings.num_samples` sampled answers to every question, each question with its own rng key."""
        prompts = [tuple(self.prompts.prompt(question)) for question in questions]
        with self._timed("samples"):
            return self._texts(prompts, settings, [(seed, index) for index in range(len(prompts))])

    def _texts(self, *arguments: Any, begun: bool = False) -> list[list[str]]:
        return [[self.prompts.text(answer, begun) for answer in answers] for answers in self._generate(*arguments)]

    def _generate(
        self, prompts: list[tuple[int, ...]], settings: SamplingSettings, rng_keys: list[tuple[int, ...]] | None = None
    ) -> list[list[list[int]]]:
        ids = [list(prompt) for prompt in prompts]
        check_prompt_lengths(ids, settings.max_length, "evaluation.max_length")
        model = self.load()
        in_bf16 = has_fast_bf16() if self.evaluation.bf16 == "auto" else self.evaluation.bf16
        if in_bf16 and model.dtype == torch.float32:
            model = Replica(model, torch.bfloat16).model
        eos_ids = eos_token_ids(model, self.prompts.eos_token_id)

        def answers_of(rows: list[int]) -> list[list[list[int]]]:
            own_ids, own_keys = [ids[row] for row in rows], [rng_keys[row] for row in rows] if rng_keys else None
            return generate(model, own_ids, settings, eos_ids, rng_keys=own_keys, description="answering")

        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        return _in_order(by_length, _distributed(by_length, answers_of))

    # --- token log-probabilities ---

    def tokens_of_answers(self, pairs: Sequence[tuple[str, str]], with_tag: bool = False) -> list[TokenLogProbs]:
        """Token log-probabilities of the answers, including the EOS token, of (question, answer) pairs.

        Warns once if an answer is cut at `max_length`.

        Args:
            with_tag: whether what `model.prompt.answer` puts before an answer ("Answer: ") belongs to it, as in training.
        """
        examples = [self.prompts.example(Row(0, *pair), self.max_length) for pair in pairs]
        if not self._warned and any(map(self.prompts.is_cut, examples)):
            warn_if_cut(self.prompts, pairs, self.max_length, "data.max_length", given=True)
            self._warned = True
        return self.tokens(examples if with_tag else list(map(self.prompts.without_tag, examples)))

    def example(self, row: Row) -> Example:
        """The row as it is measured: its answer has the EOS token, unless it is cut, and no tag."""
        return self.prompts.without_tag(self.prompts.example(row, self.max_length))

    def text_of_answer(self, row: Row) -> str:
        """The row's answer as it is measured: without what `max_length` cuts."""
        example = self.example(row)
        return self.prompts.text(example.answer) if self.prompts.is_cut(example) else row.answer

    def tokens(self, examples: Sequence[Example]) -> list[TokenLogProbs]:
        """Token log-probabilities of the examples' answers; an answer without tokens has empty arrays."""
        keys = [(tuple(example.prompt), tuple(example.answer)) for example in examples]
        return self._cached("token probabilities", self._tokens, keys, self._token_log_probs)

    def _token_log_probs(self, keys: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[TokenLogProbs]:
        model, eos = self.load(), self.prompts.eos_token_id
        examples = [Example(list(prompt), list(answer)) for prompt, answer in keys]
        batches = batches_by_length([len(example) for example in examples], self.evaluation.batch_size)
        with suitable_threads(model):
            of_batches = _distributed(
                batches, lambda own: [token_log_probs(model, [examples[i] for i in batch], eos) for batch in own]
            )
        return _in_order(list(chain(*batches)), list(chain(*of_batches)))

    def each(self, kind: str, items: Sequence[K], output: Callable[[PreTrainedModel, K], T]) -> list[T]:
        """Another output for each item, such as an example or the number of a batch, computed one at a time and not cached.

        Args:
            kind: its key in `seconds`.
        """
        model = self.load()
        with self._timed(kind), suitable_threads(model):
            return _distributed(items, lambda own: [output(model, item) for item in own])

    def _cached(self, kind: str, cache: dict[K, T], keys: list[K], compute: Callable[[list[K]], list[T]]) -> list[T]:
        """The value of each key; values that are not in the cache are computed and added."""
        new = [key for key in dict.fromkeys(keys) if key not in cache]
        if new:
            with self._timed(kind):
                cache.update(zip(new, compute(new), strict=True))
        return [cache[key] for key in keys]

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, examples: Sequence[Example], eos_token_id: int) -> list[TokenLogProbs]:
    """Token log-probabilities of the answers of a batch, from one forward pass."""
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples).items()}
    if not any(example.answer for example in examples):
        empty = np.zeros(0, dtype=np.float32)
        return [TokenLogProbs(empty, empty.astype(bool), empty, empty, has_eos=False) for _ in examples]
    with evaluation_mode(model):
        logits, targets, rows = answer_logits(model, batch)
    # In chunks, because each intermediate is as large as the logits: gigabytes for a vocabulary of 100,000 tokens.
    chunks = zip(logits.split(VOCABULARY_CHUNK), targets.split(VOCABULARY_CHUNK), strict=True)
    columns = zip(*(_of_logits(*chunk) for chunk in chunks), strict=True)
    arrays = [torch.cat(column).cpu().numpy() for column in columns]
    rows = rows.cpu().numpy()
    return [
        TokenLogProbs(*(array[rows == row] for array in arrays), has_eos=example.answer[-1:] == [eos_token_id])
        for row, example in enumerate(examples)
    ]


def _of_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first four attributes of `TokenLogProbs` from logits, shape (tokens, vocabulary)."""
    check_finite(logits)
    # Clamped because an impossible token has log-probability -inf, and 0 times -inf is NaN.
    log_probs = logits.log_softmax(-1).clamp(min=-1e4)
    probabilities = log_probs.exp()
    mean = (probabilities * log_probs).sum(-1)
    std = (probabilities * (log_probs - mean[:, None]).square()).sum(-1).sqrt()
    of_target = log_probs.gather(1, targets[:, None]).squeeze(1)
    return of_target, log_probs.argmax(-1) == targets, mean, std


def _distributed(items: Sequence[K], work: Callable[[list[K]], list[T]]) -> list[T]:
    """The result of `work` for each item, in their order. Each process computes a part of the results and gets all."""
    state = PartialState()
    own = list(range(len(items)))[state.process_index :: state.num_processes]
    done = gather_object(list(zip(own, work([items[index] for index in own]), strict=True)))
    return _in_order(*zip(*done, strict=True)) if done else []


def _in_order(indices: Sequence[int], results: Sequence[T]) -> list[T]:
    """The results sorted by their indices."""
    return [result for _, result in sorted(zip(indices, results, strict=True), key=lambda pair: pair[0])]
