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
    """Exponent of a token's probability, 0: plain gradient ascent."""


class WGA(UnlearningTrainer):
    """Gradient ascent that lets go of a token as it becomes unlikely."""

    Settings = WGASettings
    logged_terms = ("forget_nll",)

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        self.add_to_epoch(forget_nll=forget.cross_entropy.detach())
        weight = (-forget.losses.detach()).exp() ** self.settings.beta
        return forget.mean_over_tokens(-weight * forget.losses)
