"""Gradient ascent (GA) on the forget answers alone: loss = -CE(forget). TOFU, arXiv 2401.06121.

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=grad_ascent
"""

import torch

from unlearning.answers import Answers
from unlearning.trainer import NoKnobs, UnlearningTrainer


class GradAscent(UnlearningTrainer):
    """Makes the forget answers less likely, without a retain loss."""

    Settings = NoKnobs

    def loss_weights(self) -> tuple[float, float]:
        return 1.0, 0.0

    def forget_loss(self, forget: Answers) -> torch.Tensor:
        return -forget.cross_entropy
