"""Negative preference optimization (arXiv 2404.05868).

forget loss = -(2/beta) log sigmoid(beta * (NLL_pi - NLL_pi0)), the mean over rows

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=npo
"""

import torch
from pydantic import PositiveFloat

from common.config import section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class NPOSettings(MethodSettings):
    beta: PositiveFloat = 0.1
    """Inverse temperature; the smaller, the closer to gradient ascent."""


class NPO(UnlearningTrainer):
    """Makes the forget answers less likely; the gradient vanishes as they become less likely than under the reference model."""

    Settings = NPOSettings
    needs_reference = True
    logs_forget_nll = True

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        return forget.preference_loss(forget.nll - forget.reference.nll, self.settings.beta)
