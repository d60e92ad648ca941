"""RepSelect (arXiv 2606.17168): collapse the top principal components of the forget gradient before each optimizer step.

    gradient of a matrix = collapse(gradient of gamma * forget loss) + gradient of lambda_unlearning * retain loss
    collapse(G): with G = U diag(s) V', each of the k largest singular values s_i becomes s_k^2 / s_i

The largest components are directions that the forget rows share with all text: changing them damages what is to be retained
and is soon undone by finetuning. The forget loss, of any method, changes the matrices of the MLPs alone. The formula and the
choice of matrices are those of src/trainer/unlearn/repselect_simple.py in filyp/RepSelect: dividing by s_i / s_k on the
side of the inputs and on that of the outputs of a matrix ("soft" collapse, as in the paper's runs). That code takes the
gradient once, of a model with an adapter that was trained on the forget rows, and adds it with plain SGD and no retain
loss; here it is the gradient of every step, for the Trainer's optimizer.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=npo method.collapsed_components=8
"""

import re
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from common.errors import UserError

if TYPE_CHECKING:
    from unlearning.trainer import UnlearningTrainer

MATRICES = r"\.mlp\..*weight$"  # names of the parameters that the forget loss changes
MIN_SINGULAR_VALUE = 1e-5  # as a fraction of the largest; smaller ones are rounding errors


class GradientCollapse:
    """Keeps the forget gradient of an optimizer step apart from the retain gradient, and adds it collapsed.

    Args:
        trainer: the trainer whose forget loss is collapsed.
        components: number of collapsed components, above 0.
    Raises:
        UserError: with an adapter, sharded weights, float16 or reentrant checkpoints, or for a model without matrices in
            MLPs, or with several in one parameter.
    """

    def __init__(self, trainer: "UnlearningTrainer", components: int):
        key = f"method.collapsed_components={components}"
        if isinstance(trainer.model, PeftModel):
            raise UserError(f"{key}: the components are those of whole weight matrices; leave out model.lora")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UserError(f"{key}: needs whole gradients in every process; leave out FSDP and DeepSpeed")
        checkpointing = trainer.args.gradient_checkpointing and trainer.args.gradient_checkpointing_kwargs
        if checkpointing and checkpointing.get("use_reentrant"):
            raise UserError(
                f"{key}: the gradient of the forget loss alone would be 0 with training.gradient_checkpointing_kwargs="
                "{use_reentrant: true}; set it to false"
            )
        if trainer.args.fp16:
            raise UserError(f"{key}: the gradients of training.fp16=true are scaled; use training.bf16=true")
        named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        if stacked := [name for name, p in named if p.ndim > 2 and ".mlp." in name]:
            raise UserError(
                f"{key}: {stacked[0]} holds the matrices of several experts, which are not collapsed; use "
                "collapsed_components=0"
            )
        self.matrices = [p for name, p in named if p.ndim == 2 and re.search(MATRICES, name)]
        if not self.matrices:
            raise UserError(f"{key}: no trained matrix of this model matches {MATRICES}; use collapsed_components=0")
        self.trainer, self.components = trainer, components
        self.gradients: list[torch.Tensor | None] = [None] * len(self.matrices)

    def collect(self, loss: torch.Tensor) -> torch.Tensor:
        """Add the gradient of a micro-batch's forget loss to that of the step; returns the loss, with a gradient of 0."""
        found = torch.autograd.grad(loss, self.matrices, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(found):
            if gradient is not None:
                known = self.gradients[index]
                self.gradients[index] = gradient if known is None else known + gradient
        return loss.detach() + 0 * loss

    def add_to_gradients(self) -> None:
        """Add the collapsed gradient of the step, summed over processes, to the gradients of the matrices."""
        for index, (matrix, gradient) in enumerate(zip(self.matrices, self.gradients, strict=True)):
            self.gradients[index] = None
            if gradient is None:
                gradient = torch.zeros_like(matrix)
            collapsed = collapse(self.trainer.accelerator.reduce(gradient, "sum"), self.components)
            matrix.grad = collapsed if matrix.grad is None else matrix.grad + collapsed


@torch.no_grad()
def collapse(gradient: torch.Tensor, components: int) -> torch.Tensor:
    """The matrix with each of its largest singular values s_i replaced by s_k^2 / s_i, s_k being the smallest of them.

    Approximately: the singular vectors are found by a randomized SVD, with the same random numbers in each call.

    Args:
        gradient: shape (outputs, inputs).
        components: k; fewer if the matrix has fewer singular values above rounding errors.
    """
    whole = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    devices = [gradient.device] if gradient.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(whole, q=min(components, *gradient.shape))
    kept = s > MIN_SINGULAR_VALUE * s[0]
    u, s, v = u[:, kept], s[kept], v[:, kept]
    return (whole - (u * (s - s[-1:] ** 2 / s)) @ v.mT).to(gradient)
