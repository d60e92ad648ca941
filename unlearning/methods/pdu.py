"""Primal-dual unlearning (PDU, arXiv 2506.05314): flatten the logits of the forget answers while the retain loss is bounded.

    forget loss = (largest logit - mean logit)^2, the mean over the forget answers' tokens
    subject to CE(retain) <= (1 + retain_tolerance) * CE(retain) before unlearning

The weight of the retain loss is the dual variable of the constraint (`unlearning.dual_variable`). The loss is that of
src/trainer/unlearn/pdu.py in locuslab/open-unlearning, which takes its mean over the prompts and the padding, too. It is
hundreds of times a cross-entropy, so `gamma` and `dual_step_size` are small: their ratio is that of the authors' run on TOFU.
That run starts with a weight of 100, keeps it for five epochs, and bounds the retain loss by a fixed 0.3; here
the weight starts at 1 and rises from the first step, and the bound is relative to the loss before unlearning.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=pdu
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from common.config import section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class PDUSettings(MethodSettings):
    gamma: NonNegativeFloat = 0.01
    """Weight of the forget loss."""
    dual_step_size: PositiveFloat = 0.05
    """lambda_unlearning=auto: the weight changes at each step by this times the retain loss above its bound."""
    lambda_unlearning: NonNegativeFloat | Literal["auto"] = "auto"


class PDU(UnlearningTrainer):
    """Makes all tokens equally likely in the forget answers."""

    Settings = PDUSettings
    logs_forget_nll = True

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        logits = forget.logits
        return forget.mean_over_tokens((logits.max(dim=-1).values - logits.mean(dim=-1)).square())
