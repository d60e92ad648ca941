"""The reference model: the model before unlearning. Many losses compare the current model with it."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from transformers import PreTrainedModel

from common.forward import evaluation_mode


class ReferenceModel:
    """Keeps the weights that training starts from, and swaps them in while `active`.

    Only trained parameters are stored twice: all of them in full training, those of the adapter with LoRA. (With
    the adapter disabled, the model would be the base model and not the finetuned one, if finetuning trained the adapter.)

    Args:
        model: the model to be trained, with the `requires_grad` of training.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """Inside, the model has the reference weights, is in evaluation mode and computes no gradients."""
        current = [parameter.data for parameter in self.trained]
        # DeepSpeed moves the model to its device when training begins.
        self.start = [value.to(parameter.device) for parameter, value in zip(self.trained, self.start, strict=True)]
        try:
            self._load(self.start)
            with torch.no_grad(), evaluation_mode(self.model):
                yield self.model
        finally:
            self._load(current)

    def _load(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()  # its keys are the parameters, which stay the same when their data changes


class ShardedReferenceModel:
    """A second model with the weights that training starts from, sharded over processes like the trained one.

    Each forward pass gathers weights, so all processes must run the same number of them.

    Args:
        model: the model to be trained, before its weights are sharded.
        accelerator: that of the trainer, with FSDP2.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        self.accelerator = accelerator
        self.model = fsdp2_prepare_model(accelerator, copy.deepcopy(model).requires_grad_(False).eval())

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """Inside, the reference model can be used; no gradients are computed."""
        with torch.no_grad(), self.accelerator.autocast():
            yield self.model
