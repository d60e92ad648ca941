"""Forward passes outside of training: the mode, the precision of the weights, and the comparison of logits."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference of equal logits, in their standard deviations, and of equal log-probabilities, in nats."""
    return 1e-3 if dtype == torch.float32 else 0.25


def evaluation_mode(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """The model in evaluation mode (no dropout); its previous mode is restored afterwards."""
    return _mode(model, training=False)


def training_mode(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """The model in training mode (with dropout); its previous mode is restored afterwards."""
    return _mode(model, training=True)


@contextlib.contextmanager
def _mode(model: PreTrainedModel, training: bool) -> Iterator[None]:
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


def own_forward(model: torch.nn.Module) -> Callable:
    """The forward pass in the precision of the weights.

    Under mixed precision accelerate wraps `forward` in autocast, which casts every weight each time.
    """
    return model.__dict__.get("_original_forward", model)


def difference(logits: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference in standard deviations of `logits`; 0 if no more than the dtype's rounding, NaN for NaN."""
    largest = float((logits - others).abs().max() / logits.std())
    return 0.0 if largest <= tolerance(dtype) else largest
