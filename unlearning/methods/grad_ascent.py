"""Gradient ascent (GA) on the forget answers only: loss = -CE(forget). TOFU, arXiv 2401.06121.

python unlearning/main.py -cd=configs -cn=unlearn-tiny method=grad_ascent
"""

from unlearning.methods.grad_diff import GradDiff
from unlearning.trainer import NoSettings


class GradAscent(GradDiff):
    """Makes the forget answers less likely, without a retain loss."""

    Settings = NoSettings

    def loss_weights(self) -> tuple[float, float]:
        return 1.0, 0.0
