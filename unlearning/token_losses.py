"""Losses and logits of the answers in a micro-batch: the methods' losses are computed from these."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch.nn.functional import logsigmoid


@dataclass
class MicroBatchPart:
    """The forget examples, or the retain examples, of a micro-batch.

    Attributes:
        step_tokens: number of their answer tokens in the whole optimizer step, over all micro-batches and processes.
        step_rows: number of forget rows in the whole optimizer step.
        compute_reference: returns `reference`.
    """

    step_tokens: float
    step_rows: float
    compute_reference: Callable[[], Self]

    @cached_property
    def reference(self) -> Self:
        """The same examples under the reference model, the model before unlearning; without gradients."""
        return self.compute_reference()

    def mean_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """This micro-batch's contribution to the mean of `values`, shape (tokens,), over the optimizer step."""
        return values.sum() / self.step_tokens

    def mean_over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """This micro-batch's contribution to the mean of `values`, one per forget row, over the optimizer step."""
        return values.sum() / self.step_rows

    def preference_loss(self, margins: torch.Tensor, beta: float) -> torch.Tensor:
        """Contribution to the mean of -(2/beta) log sigmoid(beta * margin), the loss of DPO, NPO and SimNPO; one per row."""
        return self.mean_over_rows(-2 / beta * logsigmoid(beta * margins))


@dataclass
class TokenLosses(MicroBatchPart):
    """The losses of the answer tokens.

    Attributes:
        losses: -log p of each answer token, or of the label in its place, float32, shape (tokens,).
        rows: index of the example that each token belongs to, 0 to `size` - 1, shape (tokens,).
        size: number of examples.
        targets: the answer tokens, or the labels in their place, shape (tokens,).
        position: position of each example in its row's tuple of `forget_groups`, shape (size,); 0 for retain examples.
        weights: weight of each example (`common.prompts.Example`), float32, shape (size,).
        compute_logits: returns `logits`.
    """

    losses: torch.Tensor
    rows: torch.Tensor
    size: int
    targets: torch.Tensor
    position: torch.Tensor
    weights: torch.Tensor
    compute_logits: Callable[[], torch.Tensor]

    @property
    def logits(self) -> torch.Tensor:
        """Logits that predict each answer token, float32, shape (tokens, vocabulary); a new tensor each time."""
        return self.compute_logits()

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """log p of every token of the vocabulary, shape (tokens, vocabulary)."""
        return self.logits.log_softmax(dim=-1)

    @cached_property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihood of each example's answer, summed over its tokens, shape (size,)."""
        return self.losses.new_zeros(self.size).index_add(0, self.rows, self.losses)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Number of tokens of each example's answer, shape (size,)."""
        return torch.bincount(self.rows, minlength=self.size)

    @cached_property
    def positions_in_answer(self) -> torch.Tensor:
        """Position of each token in its answer, from 0, shape (tokens,). The tokens of an example are consecutive."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(len(self.rows), device=self.rows.device) - starts[self.rows]

    @property
    def cross_entropy(self) -> torch.Tensor:
        """-log p, the mean over tokens."""
        return self.mean_over_tokens(self.losses)

    @property
    def divergence_from_reference(self) -> torch.Tensor:
        """KL(pi0 || pi) in nats, pi0 being the reference model: the mean over tokens."""
        reference = self.reference.log_probs
        # KL of every answer token: the sum over the vocabulary of p0 * (log p0 - log p)
        return self.mean_over_tokens((reference.exp() * (reference - self.log_probs)).sum(dim=-1))
