"""IDK (I don't know; TOFU, arXiv 2401.06121): train on refusals.

loss = gamma * CE(forget question, refusal) + lambda_unlearning * CE(retain)

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=idk
"""

from common.data import Row
from common.prompts import Example
from unlearning.methods.refusals import RefusalSettings, refusal_example
from unlearning.trainer import UnlearningTrainer


class IDK(UnlearningTrainer):
    """Trains the forget questions on refusals drawn from a list; the true answers are never read."""

    Settings = RefusalSettings

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        return [refusal_example(self, row) for row in rows]
