"""KL minimization: gradient ascent, with a KL divergence from the reference model (pi0). TOFU, arXiv 2401.06121.

loss = gamma * -CE(forget) + lambda_unlearning * KL(pi0 || pi) on the retain tokens

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=kl_min
"""

import torch

from unlearning.methods.grad_diff import GradDiff
from unlearning.token_losses import TokenLosses
from unlearning.trainer import LossWeights


class KLMin(GradDiff):
    """Makes the forget answers less likely and keeps the distribution of the retain answers."""

    Settings = LossWeights
    needs_reference = True

    def retain_loss(self, retain: TokenLosses) -> torch.Tensor:
        return retain.divergence_from_reference
