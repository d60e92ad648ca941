"""Direct preference optimization (arXiv 2305.18290) of a refusal over the forget answer, as TOFU (arXiv 2401.06121) uses it.

forget loss = -(2/beta) log sigmoid(beta * [log pi/pi0 (refusal) - log pi/pi0 (forget answer)]), the mean over rows

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=dpo
"""

import torch
from pydantic import PositiveFloat
from torch.nn.functional import logsigmoid

from common.config import section
from common.data import Row
from common.prompts import Example
from unlearning.methods.refusals import RefusalSettings, refusal_examples
from unlearning.token_losses import TokenLosses
from unlearning.trainer import UnlearningTrainer


@section
class DPOSettings(RefusalSettings):
    beta: PositiveFloat = 0.1
    """Inverse temperature; the smaller, the further a pair may move from the reference model."""


class DPO(UnlearningTrainer):
    """Prefers another answer, here a refusal, over the forget answer."""

    Settings = DPOSettings
    needs_reference = True
    logged_terms = ("preferred",)  # fraction of the pairs with a margin above 0

    def preferred_examples(self, rows: list[Row]) -> list[Example]:
        """The answer that is preferred to each row's forget answer in this optimizer step."""
        return refusal_examples(self, rows)

    def forget_groups(self, rows: list[Row]) -> list[tuple[Example, ...]]:
        return list(zip(self.preferred_examples(rows), self.forget_examples(rows), strict=True))

    def buckets(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [batch]  # the two answers to a question stay together

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        beta = self.settings.beta
        # log pi/pi0 of the preferred answers, then of the forget answers
        preferred, forgotten = (forget.reference.nll - forget.nll).chunk(2)
        margin = preferred - forgotten
        self.add_to_epoch(preferred=forget.mean_over_rows((margin > 0).float()))
        return forget.mean_over_rows(-2 / beta * logsigmoid(beta * margin))
