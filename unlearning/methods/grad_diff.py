"""Gradient difference (GD): loss = gamma * -CE(forget) + lambda_unlearning * CE(retain). TOFU, arXiv 2401.06121.

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=grad_diff
"""

import torch

from unlearning.token_losses import TokenLosses
from unlearning.trainer import UnlearningTrainer


class GradDiff(UnlearningTrainer):
    """Makes the forget answers less likely and the retain answers likelier."""

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        return -forget.cross_entropy
