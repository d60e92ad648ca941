"""A whole copy of a model whose weights are sharded over processes by FSDP2, for generating answers and for saving.

Generation and evaluation need plain weights: every process generates its own number of tokens, so a forward pass must not
wait for the other processes.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class WholeModel:
    """A copy of a model that has weights only inside `gathered`.

    Args:
        source: the model that is trained; make the copy before its weights are sharded.
    """

    def __init__(self, source: PreTrainedModel):
        self.source = source
        placeholders = {id(p): torch.nn.Parameter(torch.empty(0), requires_grad=False) for p in source.parameters()}
        self.model = copy.deepcopy(source, placeholders).eval()  # tied weights stay tied

    @contextlib.contextmanager
    @torch.no_grad()
    def gathered(self, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[PreTrainedModel]:
        """A context in which the copy has the current weights. All processes must enter it, as each has a part of them.

        Args:
            device: where the copy is.
            dtype: of its floating-point parameters; None: that of the source.
        """
        parameters = list(self.model.parameters())
        self.model.to(device)  # the buffers
        try:
            for whole, own in zip(parameters, self.source.parameters(), strict=True):
                value = own.detach().full_tensor() if isinstance(own, DTensor) else own.detach()
                whole.data = value.to(device, dtype if value.is_floating_point() else None, copy=True)
            yield self.model
        finally:
            for whole in parameters:
                whole.data = torch.empty(0, device=device)
