"""UNDO (unlearn, noise, distill on outputs; arXiv 2506.06278): distill an unlearned model into a noised copy of itself.

The weights of a model that was unlearned often still have what its answers no longer show. UNDO starts from such a model
(pi0), of any method, adds noise to its weights, and trains them to give the outputs of pi0 again:

    weights = (1 - alpha) * weights + alpha * beta * noise
    loss = gamma * KL(pi0 || pi) on own answers to forget questions + lambda_unlearning * KL(pi0 || pi) on retain answers

The noise is Xavier uniform for matrices and 0 for vectors, as in the authors' code. Both losses are means over tokens.
The authors distill on pretraining text, half of it from the domain to be forgotten, until the loss on the other half is
within 5% of that of pi0. Here the number of epochs is set, and in place of the forget answers, which are not read, the
unlearned model's own greedy answers are trained on: at the tokens of the true answers pi0 may still predict them. Retain
rows are far less than pretraining text, so what neither they nor the forget questions ask about is lost where alpha is
large.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=undo finetuned=models/unlearned/PMC-unlearn-tiny/seed-0
"""

import torch
from peft import PeftModel
from pydantic import NonNegativeFloat, PositiveFloat
from torch.nn.init import xavier_uniform_
from transformers import PreTrainedModel, TrainingArguments

from common.config import Fraction, section
from common.data import Row
from common.errors import UserError
from common.prompts import Example
from unlearning.sampling import GenerationLimits, InitialResponseTrainer
from unlearning.token_losses import TokenLosses
from unlearning.trainer import LossWeights, UnlearningData


@section
class UNDOSettings(GenerationLimits, LossWeights):
    gamma: PositiveFloat = 1.0
    alpha: Fraction = 0.5
    """Fraction of each weight that is replaced by noise; 1: all of it."""
    beta: NonNegativeFloat = 0.1
    """Scale of the noise; 0: the weights only shrink."""


class UNDO(InitialResponseTrainer):
    """Distills an unlearned model into a noised copy of itself.

    Raises:
        UserError: with an adapter, since the weights of the base model would get no noise.
    """

    Settings = UNDOSettings
    needs_reference = True
    starts_unlearned = True

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: UNDOSettings):
        if isinstance(model, PeftModel):
            raise UserError(
                "method=undo with model.lora: the base model would get no noise and keep what it knows; use model.lora=null "
                "and a finetuned=FOLDER without an adapter"
            )
        super().__init__(model, args, data, settings)

    def before_training(self) -> None:
        """The unlearned model's answers to the forget questions; then noise, unless a run is resumed."""
        super().before_training()
        add_noise(self.model, self.settings.alpha, self.settings.beta, self.args.seed)

    def forget_examples(self, rows: list[Row]) -> list[Example]:
        return [Example(self.prompt_ids[row.index], self.initial_tokens[row.index]) for row in rows]

    def forget_loss(self, forget: TokenLosses) -> torch.Tensor:
        return forget.divergence_from_reference

    def retain_loss(self, retain: TokenLosses) -> torch.Tensor:
        return retain.divergence_from_reference


@torch.no_grad()
def add_noise(model: torch.nn.Module, alpha: float, beta: float, seed: int) -> None:
    """Replace every weight by (1 - alpha) * weight + alpha * beta * noise; the noise depends on the seed alone.

    The noise of a matrix is Xavier uniform, of shape and scale of a new layer's weights; that of a vector is 0. The matrices of
    several experts in one tensor, of shape (experts, rows, columns), have noise one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.zeros(parameter.shape)
        if parameter.ndim > 1:
            for matrix in noise.view(-1, *parameter.shape[-2:]):
                xavier_uniform_(matrix, generator=generator)
        parameter.mul_(1 - alpha).add_(noise.to(parameter), alpha=alpha * beta)
