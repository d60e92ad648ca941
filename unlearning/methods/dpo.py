"""Direct preference optimization (DPO, arXiv 2305.18290) of a refusal over the forget answer, as in TOFU (arXiv 2401.06121).

forget loss = -(2/beta) log sigmoid(beta * [log pi/pi0 (refusal) - log pi/pi0 (forget answer)]), the mean over rows

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=dpo
"""

import torch
from pydantic import PositiveFloat

from common.config import section
from common.data import Row
from common.prompts import Example
from unlearning.methods.refusals import RefusalSettings, refusal_example
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

    def preferred_example(self, row: Row) -> Example:
        """The row's question with the answer that this optimizer step prefers to the forget answer."""
        return refusal_example(self, row)

    def forget_groups(self, rows: list[Row]) -> list[tuple[Example, ...]]:
        return [(self.preferred_example(row), self.example(row)) for row in rows]

    def buckets(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [batch]  # the two answers to a question stay together

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        # log pi/pi0 of the preferred answers, then of the forget answers
        preferred, dispreferred = (forget.reference.nll - forget.nll).chunk(2)
        margin = preferred - dispreferred
        self.add_to_epoch(preferred=forget.mean_over_rows((margin > 0).float()))
        return forget.preference_loss(margin, self.settings.beta)
