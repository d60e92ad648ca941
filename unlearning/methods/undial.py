"""UNDIAL (arXiv 2402.10052): learn from the model before unlearning, with the true token's logit turned down.

forget loss = CE(forget) against softmax(logits of pi0, less beta at the true token), the mean over tokens

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=undial
"""

import torch
from pydantic import NonNegativeFloat

from common.config import section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class UNDIALSettings(MethodSettings):
    beta: NonNegativeFloat = 10.0
    """What is subtracted from the true token's logit."""


class UNDIAL(UnlearningTrainer):
    """Distils what the model before unlearning would say if it had to avoid the true token."""

    Settings = UNDIALSettings
    needs_reference = True
    logged_terms = ("forget_nll",)

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        self.add_to_epoch(forget_nll=forget.cross_entropy.detach())
        before = forget.reference.logits
        before[torch.arange(len(before)), forget.targets] -= self.settings.beta
        teacher = before.softmax(dim=-1)
        return forget.mean_over_tokens(-(teacher * forget.log_probs).sum(dim=-1))
