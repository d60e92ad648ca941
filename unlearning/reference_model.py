"""The reference model: the model before unlearning, which many losses compare the current model with."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from generation.sampler import evaluation_mode


class ReferenceModel:
    """Keeps the weights that training starts from, and swaps them in while `active`.

    Only trained parameters are stored twice: all of them in full training, those of the adapter with LoRA. (Switching the
    adapter off would give the base model where unlearning continues with the adapter of the finetuning stage.)

    Args:
        model: the model to be trained, on its device, with the `requires_grad` of training.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """Inside, the model has the reference weights, is in evaluation mode and computes no gradients."""
        current = [parameter.data for parameter in self.trained]
        try:
            self._load(self.start)
            with torch.no_grad(), evaluation_mode(self.model):
                yield self.model
        finally:
            self._load(current)

    def _load(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()  # its key is the parameter, which stays the same when the data changes
