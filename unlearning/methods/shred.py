"""SHRED (arXiv 2605.07482): distill the reference model (pi0) on the forget answers, with the surprising tokens demoted.

    loss = KL(target || pi), the mean over the forget answers' tokens
    target = softmax(the top_k highest logits of pi0)

At the forget positions, the tokens of an answer that are least likely under pi0, the true token's logit is lowered by
`beta` first. The other positions keep the proportions of the model's top_k tokens, which get the probability of all
others, so there is no retain loss and no retain row is read. The paper describes the selection and the targets; lowering by a
constant is what UNDIAL does (`unlearning.methods.undial`). The authors' project page also leaves the first tokens of an answer
as they are, which is not done here.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=shred
"""

import torch
from pydantic import NonNegativeFloat, PositiveInt

from common.config import Fraction, section
from unlearning.token_losses import TokenLosses
from unlearning.trainer import UnlearningTrainer


@section
class SHREDSettings:
    forget_fraction: Fraction = 0.5
    """Fraction of each answer's tokens that are forgotten, rounded up: those least likely before unlearning."""
    beta: NonNegativeFloat = 10.0
    """Amount subtracted from the logit of those tokens."""
    top_k: PositiveInt = 50
    """Only the k highest logits of the model before unlearning are distilled."""


class SHRED(UnlearningTrainer):
    """Makes the least likely tokens of the forget answers unlikelier, and keeps the distributions of the others."""

    Settings = SHREDSettings
    needs_reference = True
    logs_forget_nll = True

    def loss_weights(self) -> tuple[float, float]:
        return 1.0, 0.0

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        logits = forget.reference.logits
        demoted = is_forgotten(forget.reference, self.settings.forget_fraction)
        logits[demoted, forget.targets[demoted]] -= self.settings.beta
        highest, tokens = logits.topk(min(self.settings.top_k, logits.shape[1]), dim=-1)
        target = highest.log_softmax(dim=-1)
        return forget.mean_over_tokens((target.exp() * (target - forget.log_probs.gather(1, tokens))).sum(dim=-1))


def is_forgotten(answers: TokenLosses, fraction: float) -> torch.Tensor:
    """Which tokens are among the given fraction of their answer, rounded up, that is least likely; shape (tokens,)."""
    by_loss = answers.losses.argsort(descending=True, stable=True)
    order = by_loss[answers.rows[by_loss].argsort(stable=True)]  # by answer, then from the least likely token on
    rank = torch.empty_like(order)
    rank[order] = answers.positions_in_answer  # the tokens of an answer are consecutive
    # In float64, less a rounding error: 0.3 of 50 tokens are 15, not 16.
    return rank < (fraction * answers.lengths.double() - 1e-9).ceil()[answers.rows]
