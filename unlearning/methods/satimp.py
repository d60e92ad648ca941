"""SatImp (arXiv 2505.11953): gradient ascent weighted by saturation and importance of a token.

forget loss = -p^beta1 * (1 - p)^beta2 * NLL of a token, the mean over tokens; the weight has no gradient

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=satimp
"""

from dataclasses import dataclass

import torch

from common.config import at_least
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@dataclass
class SatImpSettings(MethodSettings):
    gamma: float = 0.1
    """Weight of the forget loss."""
    beta1: float = 5.0
    """Exponent of p: the larger, the sooner a token that has become unlikely is let alone."""
    beta2: float = 1.0
    """Exponent of 1 - p: the larger, the less a token counts that is known by heart."""

    def problems(self) -> list[str]:
        return super().problems() + at_least(self, 0, "beta1", "beta2")


class SatImp(UnlearningTrainer):
    """Gradient ascent on the tokens that are likely, but not certain."""

    Settings = SatImpSettings
    logged_terms = ("forget_nll",)

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        self.add_to_epoch(forget_nll=forget.cross_entropy.detach())
        p = (-forget.losses.detach()).exp()
        weight = p**self.settings.beta1 * (1 - p) ** self.settings.beta2
        return forget.mean_over_tokens(-weight * forget.losses)
