"""The model before unlearning, which many methods compare the present one with."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from generation.sampler import evaluation_mode


class ReferenceModel:
    """The weights that training starts from, put in place of the present ones while they are asked.

    Only what is trained is kept twice: a second set of all parameters in full training, a second adapter with LoRA (not
    "the adapter switched off", which would be the base model where unlearning goes on with the adapter of a finetuning).

    Args:
        model: the model that is going to be trained, on its device, with `requires_grad` as it will be.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model before unlearning, inside: in evaluation mode, without gradients."""
        present = [parameter.data for parameter in self.trained]
        try:
            self._put(self.start)
            with torch.no_grad(), evaluation_mode(self.model):
                yield self.model
        finally:
            self._put(present)

    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()  # it knows a parameter's cast by the parameter, whatever its data
