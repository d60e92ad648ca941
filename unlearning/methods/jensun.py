"""JensUn (arXiv 2509.02820): Jensen-Shannon divergences, which are bounded, in both losses.

    forget loss = JSD(pi, one-hot at a token of the refusal), the mean over the forget answer's tokens
    retain loss = JSD(pi, pi0), the mean over the retain answer's tokens

The model reads the forget answer. Its t-th token is to be predicted as the t-th token of the refusal, which is repeated to
the length of the answer, after what `model.prompt.answer` puts before an answer. (src/trainer/utils.py of
nmndeep/JensUn-Unlearning gives every token of the refusal a probability of 1 at every position, which is no distribution;
the paper's formula is used here.)

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=jensun
"""

import math
from typing import Any

import torch

from common.config import section
from common.errors import UserError
from common.prompts import Example
from unlearning.token_losses import TokenLosses
from unlearning.trainer import LossWeights, UnlearningTrainer


@section
class JensUnSettings(LossWeights):
    refusal: str = "No idea"
    """Its tokens are the targets of the forget answers' tokens, repeated."""


class JensUn(UnlearningTrainer):
    """Makes the model predict a refusal where it predicted the forget answers, and keeps its retain distributions.

    Attributes:
        tag_ids: token ids of what stands before each answer ("Answer: "); most prompts have none.
        refusal_ids: token ids of the refusal, without an EOS token.
    Raises:
        UserError: when the refusal has no tokens.
    """

    Settings = JensUnSettings
    needs_reference = True
    logs_forget_nll = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        prompts = self.data.prompts
        refusal = prompts.without_tag(Example([], prompts.answer(self.settings.refusal)[:-1]))
        self.tag_ids, self.refusal_ids = refusal.prompt, refusal.answer
        if not self.settings.refusal.strip() or not self.refusal_ids:
            raise UserError(f"method.refusal={self.settings.refusal!r}: it has no tokens; give it a text")

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        expected = torch.tensor(self.tag_ids + self.refusal_ids, device=forget.targets.device)
        positions, tag = forget.positions_in_answer, len(self.tag_ids)
        repeated = tag + (positions - tag) % len(self.refusal_ids)
        targets = expected[torch.where(positions < tag, positions, repeated)]
        log_p = forget.log_probs.gather(1, targets[:, None])[:, 0]
        return forget.mean_over_tokens(divergence_from_one_hot(log_p))

    def retain_loss(self, retain: TokenLosses) -> torch.Tensor:
        return retain.mean_over_tokens(divergence(retain.log_probs, retain.reference.log_probs))


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in nats, between 0 and log 2.

    Args:
        log_p, log_q: log-probabilities, shape (tokens, vocabulary).
    Returns:
        Shape (tokens,).
    """
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)).sum(dim=-1) / 2


def divergence_from_one_hot(log_p: torch.Tensor) -> torch.Tensor:
    """`divergence` of a distribution from the one-hot distribution at a token that has log-probability `log_p`.

    All but one of the terms are p log 2 each, so that log 2 + (p log p - (1 + p) log(1 + p)) / 2 is left.
    """
    p = log_p.exp()
    return math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2
