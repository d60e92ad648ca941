"""What a model says of a micro-batch's answers: the quantities that the methods' losses are written in."""

from collections.abc import Callable
from functools import cached_property

import torch


class TokenLosses:
    """The answer tokens of the forget rows, or of the retain rows, of a micro-batch.

    Args:
        losses: -log p of every answer token, float32, shape (tokens,).
        rows: the place of the example that each token belongs to, 0 to `size` - 1, shape (tokens,).
        size: how many examples there are.
        targets: the answer tokens, shape (tokens,).
        logits: makes what the model says before each, float32, shape (tokens, vocabulary).
        step_tokens: how many such tokens the whole optimizer step has, over all its micro-batches and processes.
        step_rows: the same of the rows of the data.
        reference: makes the same answers as the model before unlearning sees them.
    """

    def __init__(
        self,
        losses: torch.Tensor,
        rows: torch.Tensor,
        size: int,
        targets: torch.Tensor,
        logits: Callable[[], torch.Tensor],
        step_tokens: float,
        step_rows: float,
        reference: Callable[[], "TokenLosses"],
    ):
        self.losses, self.rows, self.size, self.targets = losses, rows, size, targets
        self.step_tokens, self.step_rows = step_tokens, step_rows
        self._logits, self._reference = logits, reference

    @property
    def logits(self) -> torch.Tensor:
        """What the model says before every answer token, shape (tokens, vocabulary)."""
        return self._logits()

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """log p of every token of the vocabulary, shape (tokens, vocabulary)."""
        return self.logits.log_softmax(dim=-1)

    @cached_property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihood of each example's answer, the sum over its tokens, shape (size,)."""
        return self.losses.new_zeros(self.size).index_add(0, self.rows, self.losses)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """TokenLogProbs of each example's answer, shape (size,)."""
        return torch.bincount(self.rows, minlength=self.size)

    @cached_property
    def reference(self) -> "TokenLosses":
        """The same answers under the model before unlearning; without gradients."""
        return self._reference()

    def mean_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share in the mean of `values`, shape (tokens,), over the optimizer step."""
        return values.sum() / self.step_tokens

    def mean_over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share in the mean of `values`, one of each row of the data, over the optimizer step."""
        return values.sum() / self.step_rows

    @property
    def cross_entropy(self) -> torch.Tensor:
        """-log p, the mean over tokens."""
        return self.mean_over_tokens(self.losses)
