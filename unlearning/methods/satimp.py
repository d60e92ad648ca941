"""SatImp (arXiv 2505.11953): gradient ascent weighted by each token's saturation and importance.

forget loss = -p^beta1 * (1 - p)^beta2 * NLL of a token, the mean over tokens; the weight has no gradient

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=satimp
"""

import torch
from pydantic import NonNegativeFloat

from common.config import section
from unlearning.methods.wga import WGA
from unlearning.trainer import MethodSettings


@section
class SatImpSettings(MethodSettings):
    gamma: NonNegativeFloat = 0.1
    """Weight of the forget loss."""
    beta1: NonNegativeFloat = 5.0
    """Exponent of p; the larger, the smaller the weight of unlikely tokens."""
    beta2: NonNegativeFloat = 1.0
    """Exponent of 1 - p; the larger, the smaller the weight of likely tokens."""


class SatImp(WGA):
    """Gradient ascent on the tokens that are likely, but not certain."""

    Settings = SatImpSettings

    def token_weights(self, p: torch.Tensor) -> torch.Tensor:
        return p**self.settings.beta1 * (1 - p) ** self.settings.beta2
