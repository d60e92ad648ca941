"""SimNPO (arXiv 2410.07163): NPO that divides by the answer's length instead of using the reference model.

    forget loss = -(2/beta) log sigmoid(beta * (NLL/|y| - delta)), the mean over rows

The paper writes its margin outside the product; delta is that margin divided by beta.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=simnpo
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from common.config import section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class SimNPOSettings(MethodSettings):
    gamma: NonNegativeFloat = 0.125
    """Weight of the forget loss."""
    beta: PositiveFloat = 4.5
    """Inverse temperature; the larger, the sooner the gradient of unlikely answers vanishes."""
    delta: float = 0.0
    """NLL per token where the sigmoid is 1/2; the larger, the less likely answers become."""


class SimNPO(UnlearningTrainer):
    """Makes the forget answers less likely; the gradient vanishes as their tokens become unlikely."""

    Settings = SimNPOSettings
    logs_forget_nll = True

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        mean_nll = forget.nll / forget.lengths.clamp(min=1)  # an answer that max_length cut away has no tokens
        return forget.preference_loss(mean_nll - self.settings.delta, self.settings.beta)
