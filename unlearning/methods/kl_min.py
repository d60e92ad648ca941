"""KL minimization: gradient ascent that stays close to the model before unlearning. TOFU, arXiv 2401.06121.

loss = gamma * -CE(forget) + lambda_unlearning * KL(pi0 || pi) on the retain tokens

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=kl_min
"""

import torch

from unlearning.methods.grad_diff import GradDiff
from unlearning.token_losses import TokenLosses


class KLMin(GradDiff):
    """Makes the forget answers less likely and keeps what is said of the retain rows."""

    needs_reference = True

    def retain_loss(self, retain: TokenLosses) -> torch.Tensor:
        return retain.mean_over_tokens(divergence(retain))


def divergence(answers: TokenLosses) -> torch.Tensor:
    """KL(pi0 || pi) = sum over the vocabulary of p0 * (log p0 - log p), for every answer token, shape (tokens,)."""
    before = answers.reference.log_probs
    return (before.exp() * (before - answers.log_probs)).sum(dim=-1)
