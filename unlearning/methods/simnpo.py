"""SimNPO (arXiv 2410.07163): NPO with the length of the answer in place of the model before unlearning.

    forget loss = -(2/beta) log sigmoid(beta * (NLL/|y| - delta)), the mean over rows

The paper writes its margin outside the product; delta is that margin divided by beta.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=simnpo
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch.nn.functional import logsigmoid

from common.config import section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class SimNPOSettings(MethodSettings):
    gamma: NonNegativeFloat = 0.125
    """Weight of the forget loss."""
    beta: PositiveFloat = 4.5
    """Inverse temperature, the larger, the sooner forgotten answers are let alone."""
    delta: float = 0.0
    """NLL per token at the middle of the loss, the larger, the further answers are pushed."""


class SimNPO(UnlearningTrainer):
    """Makes the forget answers less likely, the less the more unlikely their tokens already are."""

    Settings = SimNPOSettings
    logged_terms = ("forget_nll",)

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        beta, delta = self.settings.beta, self.settings.delta
        self.add_to_epoch(forget_nll=forget.cross_entropy.detach())
        per_token = forget.nll / forget.lengths.clamp(min=1)  # an answer that max_length cut away has no tokens
        return forget.mean_over_rows(-2 / beta * logsigmoid(beta * (per_token - delta)))
