"""Gradient ascent (GA) on the forget answers alone: loss = -CE(forget). TOFU, arXiv 2401.06121.

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=grad_ascent
"""

import torch

from unlearning.token_losses import TokenLosses
from unlearning.trainer import NoSettings, UnlearningTrainer


class GradAscent(UnlearningTrainer):
    """Makes the forget answers less likely, without a retain loss."""

    Settings = NoSettings

    def loss_weights(self) -> tuple[float, float]:
        return 1.0, 0.0

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        return -forget.cross_entropy
