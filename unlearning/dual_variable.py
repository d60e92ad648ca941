"""The weight of the retain loss with `method.lambda_unlearning=auto`: a dual variable that bounds the retain loss.

    minimize the forget loss subject to CE(retain) <= bound = (1 + retain_tolerance) * CE(retain) before unlearning
    after each optimizer step: lambda = max(0, lambda + dual_step_size * (CE(retain) of the step - bound))

The constraint and its primal-dual solution are those of arXiv 2506.05314; the update is that of src/trainer/unlearn/pdu.py
in locuslab/open-unlearning. While the retain loss is above its bound, its weight rises, and below it falls. The loss is thus
pushed back to the bound, and may exceed it for many steps.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=npo method.lambda_unlearning=auto
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from common.collate import collate
from common.forward import training_mode
from common.losses import answer_losses

if TYPE_CHECKING:
    from unlearning.trainer import UnlearningTrainer

log = logging.getLogger(__name__)


class DualVariable(TrainerCallback):
    """Updates the weight of the retain loss at the end of each optimizer step, before a checkpoint is saved.

    Args:
        trainer: the trainer whose retain loss is bounded.
    Attributes:
        value: the weight, 0 or more.
        bound: largest retain loss that is allowed, in nats; None until it is measured before the first step.
        retain_loss: contributions of this process to the retain loss of the step.
    """

    def __init__(self, trainer: "UnlearningTrainer"):
        self.trainer = trainer
        self.value = 1.0
        self.bound: float | None = None
        self.retain_loss: torch.Tensor | float = 0.0

    def start_step(self) -> float:
        """The weight for this step; measures the bound before the first one."""
        if self.bound is None:
            tolerance = self.trainer.settings.retain_tolerance
            before = mean_retain_loss(self.trainer)
            self.bound = (1 + tolerance) * before
            log.info("the retain loss is %.4g before unlearning; it may rise to %.4g", before, self.bound)
        self.retain_loss = 0.0
        return self.value

    def on_step_end(self, args, state, control, **kwargs):
        excess = self.trainer.total(float(self.retain_loss)) - self.bound
        self.value = max(0.0, self.value + self.trainer.settings.dual_step_size * excess)

    def state_to_save(self) -> dict[str, Any]:
        return {"value": self.value, "bound": self.bound}

    def load_state(self, state: dict[str, Any]) -> None:
        self.value, self.bound = state["value"], state["bound"]


@torch.no_grad()
def mean_retain_loss(trainer: "UnlearningTrainer") -> float:
    """Cross-entropy of all retain answers under the present model, the mean over tokens, in nats.

    With dropout and noise (NEFTune) as in training: without them it would be lower than the steps' losses from the start.
    """
    examples = sorted(trainer.retain_examples, key=len)
    size = 2 * trainer.args.per_device_train_batch_size  # the rows of a training pass
    total = tokens = 0.0
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with training_mode(trainer.model), torch.random.fork_rng(devices):
        for start in range(0, len(examples), size):
            losses, _ = answer_losses(trainer.model, trainer._prepare_inputs(collate(examples[start : start + size])))
            total, tokens = total + losses.double().sum().item(), tokens + len(losses)
    return total / tokens
