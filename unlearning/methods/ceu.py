"""Cross-entropy unlearning (CE-U, arXiv 2503.01224): train towards the model's own distribution without the true token.

    forget loss = CE(pi, softmax(logits of pi, with the true token's at minus infinity)), the mean over tokens

The target has no gradient. The first tokens of an answer are left out (`skip_tokens`), as in a footnote of the paper and in
src/trainer/unlearn/ceu.py of locuslab/open-unlearning. The paper has no retain loss (lambda_unlearning=0).

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=ceu
"""

import torch
from pydantic import NonNegativeInt

from common.config import section
from common.data import Row
from common.prompts import Example
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningTrainer


@section
class CEUSettings(MethodSettings):
    skip_tokens: NonNegativeInt = 1
    """Number of tokens at the beginning of each answer that are not trained on."""


class CEU(UnlearningTrainer):
    """Moves the probability of the true tokens to the others, in proportion to the probabilities of these."""

    Settings = CEUSettings
    logs_forget_nll = True

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
