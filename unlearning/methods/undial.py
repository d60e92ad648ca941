"""UNDIAL (arXiv 2402.10052): distillation of the reference model, with the true token's logit lowered.

forget loss = CE(forget) against softmax(logits of pi0, less beta at the true token), the mean over tokens

The paper has no retain loss (`method.lambda_unlearning=0`).

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
    """Amount subtracted from the true token's logit."""


class UNDIAL(UnlearningTrainer):
    """Distills the reference model's distribution with the true token made unlikely."""

    Settings = UNDIALSettings
    needs_reference = True
    logs_forget_nll = True

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        logits = forget.reference.logits
        logits[torch.arange(len(logits)), forget.targets] -= self.settings.beta
        teacher = logits.softmax(dim=-1)
        return forget.mean_over_tokens(-(teacher * forget.log_probs).sum(dim=-1))
