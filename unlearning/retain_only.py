"""Retain-only finetuning: loss = CE(retain), the baseline that shows what a method's retain rows do alone.

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=retain_only
"""

from dataclasses import dataclass

from unlearning.trainer import UnlearningTrainer


@dataclass
class RetainOnlySettings:
    """No knobs: the learning rate and the number of epochs are all there is."""

    def problems(self) -> list[str]:
        return []


class RetainOnly(UnlearningTrainer):
    """Trains on the retain rows that another method would pair with its forget rows, and on nothing else."""

    Settings = RetainOnlySettings

    def loss_weights(self) -> tuple[float, float]:
        return 0.0, 1.0
