"""Forward passes outside of training: evaluation mode, the precision of the weights, and the comparison of logits."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

# The largest difference of equal logits, in standard deviations of the logits.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_16_BIT = 0.25


@contextlib.contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode (no dropout); its previous mode is restored afterwards."""
    was_training = model.training
    model.eval()
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
    return 0.0 if largest <= TOLERANCE.get(dtype, TOLERANCE_16_BIT) else largest
