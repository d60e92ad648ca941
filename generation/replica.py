"""A copy of the model in the dtype that it is sampled in."""

import copy

import torch
from transformers import PreTrainedModel


class Replica:
    """A copy of a model with its parameters in the dtype that samples are drawn in.

    Sampling reads every weight once per token, so half the bytes double the speed. Training stays in float32.
    Buffers such as the rotary frequencies keep their dtype.

    Args:
        source: the model that is trained; make the replica before it is wrapped for training.
        dtype: of the copy's parameters.
    """

    def __init__(self, source: PreTrainedModel, dtype: torch.dtype):
        self.source = source
        copies = {
            id(parameter): torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
            for parameter in source.parameters()
            if parameter.is_floating_point()
        }
        self.model = copy.deepcopy(source, copies).eval()

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """The copy, on the source's device and with its current weights."""
        self.model.to(self.source.device)
        torch._foreach_copy_(list(self.model.parameters()), list(self.source.parameters()))
        return self.model
