"""Finetuning on retain rows: loss = CE(retain), the baseline that shows the effect of the retain rows by themselves.

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=retain_finetuning
"""

from unlearning.trainer import NoSettings, UnlearningTrainer


class RetainFinetuning(UnlearningTrainer):
    """Trains on the retain rows that another method would pair with its forget rows, and on nothing else."""

    Settings = NoSettings

    def loss_weights(self) -> tuple[float, float]:
        return 0.0, 1.0
