"""Weighted gradient ascent (WGA, arXiv 2502.19301): tokens that are still likely count more.

forget loss = -p^beta * NLL of a token, the mean over tokens; the weight has no gradient

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=wga
"""

import torch
from pydantic import NonNegativeFloat

from common.config import section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class WGASettings(MethodSettings):
    beta: NonNegativeFloat = 1.0
    """Exponent of a token's probability; 0: plain gradient ascent."""


class WGA(UnlearningTrainer):
    """Gradient ascent that weighs a token less as it becomes unlikely."""

    Settings = WGASettings
    logs_forget_nll = True

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        weights = self.token_weights((-forget.losses.detach()).exp())
        return forget.mean_over_tokens(-weights * forget.losses)

    def token_weights(self, p: torch.Tensor) -> torch.Tensor:
        """Weights of answer tokens of probability p, both of shape (tokens,)."""
        return p**self.settings.beta
