"""Losses and logits of the answer tokens of a batch."""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from common.collate import IGNORED
from common.errors import UserError
from common.forward import own_forward


def answer_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every answer token, from one forward pass.

    Args:
        model: a causal language model.
        batch: the output of `collate`.
    Returns:
        the losses, float32, and the index of each one's row; both of shape (answer tokens of the batch,).
    """
    logits, targets, rows = answer_logits(model, batch)
    return cross_entropy(logits, targets, reduction="none"), rows


def answer_logits(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits that predict each answer token. The output layer is computed for these positions only.

    Returns:
        the logits, float32 for any dtype of the model, shape (answer tokens of the batch, vocabulary); what each is to
        predict, the labels of the batch; and the index of each one's row.
    """
    targets = batch["labels"][:, 1:]
    is_answer = targets != IGNORED
    predicts = torch.nn.functional.pad(is_answer, (0, 1))  # position t predicts token t + 1
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = logits_of(model, inputs, predicts)
    if logits.shape[:-1] == predicts.shape:  # the model does not know `logits_to_keep`
        logits = logits[predicts]
    return logits.reshape(-1, logits.shape[-1]).float(), targets[is_answer], is_answer.nonzero()[:, 0]


def next_token_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits after rows of equal length, without a cache: from shape (rows, length) to shape (rows, vocabulary)."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return logits_of(own_forward(model), inputs, keep=1)[:, -1]


def logits_of(forward: Callable, inputs: dict[str, torch.Tensor], keep: int | torch.Tensor) -> torch.Tensor:
    """The logits at the positions `keep`, or at all positions if the model does not know `logits_to_keep`."""
    try:
        return forward(**inputs, use_cache=False, logits_to_keep=keep).logits
    except TypeError as error:
        if "logits_to_keep" not in str(error):
            raise
        return forward(**inputs, use_cache=False).logits


def check_finite(logits: torch.Tensor) -> None:
    """Refuse logits with NaN or +infinity; -infinity marks an impossible token.

    Raises:
        UserError: saying that the weights of the model are not usable.
    """
    if not bool((logits < math.inf).all()):
        raise UserError(
            "the model's logits are NaN or infinite: its weights are not finite or far too large, as after training that "
            "diverged. Train it again with a lower training.learning_rate or more training.warmup_epochs, without "
            "model.dtype=float16, or name another checkpoint"
        )
