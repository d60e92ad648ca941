"""Cross-entropy unlearning (CE-U, arXiv 2503.01224): train towards the model's own distribution without the true token.

    forget loss = -sum over the vocabulary of target * log pi, the mean over tokens
    target = softmax(logits of pi, with the true token's at minus infinity)

The target has no gradient. The first tokens of an answer are left out (`skip_tokens`), as in a footnote of the paper and in
src/trainer/unlearn/ceu.py of locuslab/open-unlearning. The paper has no retain loss (lambda_unlearning=0).

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=ceu
"""

import logging
from typing import Any

import torch
from pydantic import NonNegativeInt

from common.config import section
from common.data import Row
from common.errors import UserError
from common.prompts import Example
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer

log = logging.getLogger(__name__)


@section
class CEUSettings(MethodSettings):
    skip_tokens: NonNegativeInt = 1
    """Number of tokens at the beginning of each answer that are not trained on."""


class CEU(UnlearningTrainer):
    """Moves the probability of the true tokens to the others, in proportion to the probabilities of these.

    Raises:
        UserError: when no forget answer has more than `skip_tokens` tokens.
    """

    Settings = CEUSettings
    logs_forget_nll = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        skipped = self.settings.skip_tokens
        short = sum(len(self.example(row).answer) <= skipped + 1 for row in self.data.forget)  # one is the EOS token
        rows = len(self.data.forget)
        if short == rows:
            raise UserError(f"method.skip_tokens={skipped}: no forget answer has more tokens; use fewer")
        if short:
            log.warning(
                "method.skip_tokens=%d: %d of %d forget answers have no token left to train on", skipped, short, rows
            )

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        examples = super().forget_examples(rows)
        trained = self.total(sum(max(0, len(example.answer) - self.settings.skip_tokens) for example in examples))
        self.trained_tokens = max(1.0, trained)  # without any, the loss is 0
        return examples

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        target = forget.logits.detach().clone()
        target[torch.arange(len(target)), forget.targets] = -torch.inf
        losses = -(target.softmax(dim=-1) * forget.log_probs).sum(dim=-1)
        return losses[forget.positions_in_answer >= self.settings.skip_tokens].sum() / self.trained_tokens
