"""Representation misdirection (RMU, arXiv 2403.03218): steer one layer's activations on forget tokens in a random direction.

    forget loss = mean squared distance of the activations on forget tokens to steering_coeff * u/|u|
    retain loss = the same distance to the activations of the reference model, on retain tokens

The vector u is random and fixed. Only some weights of the layer and of the two below it are trained. The forward pass also runs
the layers above.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=rmu
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from pydantic import Field, PositiveFloat, field_validator
from transformers import PreTrainedModel, TrainingArguments

from common.collate import IGNORED
from common.config import section
from common.errors import UserError
from common.losses import logits_of
from unlearning.token_losses import MicroBatchPart
from unlearning.trainer import LossWeights, UnlearningData, UnlearningTrainer, parts

TRAINED_LAYERS = 3  # the steered layer and the two below it


@section
class RMUSettings(LossWeights):
    steering_coeff: PositiveFloat = 10.0
    """Norm of the vector that activations are steered to."""
    layer: int | None = Field(None, ge=0)
    """Index of the steered layer, from 0; null: a third of the way up."""
    layers: str = r"\.(layers|h|blocks)\.\d+$"
    """Regular expression that matches the names of the model's layers."""
    trained: str = r"\.mlp\.(down_proj|fc2|c_proj)\b"
    """Regular expression that matches the names of the trained parameters."""

    @field_validator("layers", "trained")
    @classmethod
    def compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
        return pattern


@dataclass
class Activations(MicroBatchPart):
    """The steered layer's output on the answer tokens.

    Attributes:
        values: float32, shape (tokens, hidden).
    """

    values: torch.Tensor

    def distance(self, target: torch.Tensor) -> torch.Tensor:
        """Contribution to the step's mean squared distance to `target`, shape (hidden,) or (tokens, hidden)."""
        return self.mean_over_tokens((self.values - target).square().mean(dim=-1))


class RMU(UnlearningTrainer):
    """Replaces the activations of the forget tokens by a fixed vector, and keeps those of the retain tokens."""

    Settings = RMUSettings
    needs_reference = True

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: RMUSettings):
        names = steered_layers(model, settings)
        trained = trained_parameters(model, names, settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        super().__init__(model, args, data, settings)
        self.layer_name = names[-1]
        hidden_size = model.config.get_text_config().hidden_size
        direction = torch.rand(hidden_size, generator=torch.Generator().manual_seed(args.seed))
        self.target = (settings.steering_coeff * direction / direction.norm()).to(args.device)

    def forget_loss(self, forget: Activations) -> torch.Tensor:
        return forget.distance(self.target)

    def retain_loss(self, retain: Activations) -> torch.Tensor:
        return retain.distance(retain.reference.values)

    def token_losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Activations]:
        hidden = self.output_of_layer(model, batch)
        is_answer = batch["labels"] != IGNORED
        return {
            part: Activations(
                self.step_tokens[part],
                self.step_rows,
                partial(self.reference_losses, part, batch, examples),
                hidden[examples][is_answer[examples]].float(),
            )
            for part, examples in parts(batch["is_forget"])
        }

    def output_of_layer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The steered layer's output, shape (rows, length, hidden)."""
        owner = model if model is self.reference.model else self.model  # with FSDP2 the reference is a second model
        outputs = []
        handle = owner.get_submodule(self.layer_name).register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output)
        )
        try:
            logits_of(model, {name: batch[name] for name in ("input_ids", "attention_mask")}, keep=1)
        finally:
            handle.remove()
        if not outputs:
            raise UserError(f"method.layers={self.settings.layers}: the forward pass runs no module of that name")
        return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def steered_layers(model: PreTrainedModel, settings: RMUSettings) -> list[str]:
    """Names of the steered layer, last, and of the two below it.

    Raises:
        UserError: when no module's name matches `layers`, or the model has fewer layers than `layer`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = {id(module) for module in base.get_decoder().modules()}  # excludes the layers of a vision tower
    modules = [name for name, module in model.named_modules() if id(module) in decoder]
    layers = [name for name in modules if re.search(settings.layers, f".{name}")]
    if not layers:
        numbered = [name for name in modules if name[-1:].isdigit()]
        raise UserError(
            f"method.layers={settings.layers}: it matches no module of this model; candidates: {patterns(numbered)}"
        )
    chosen = len(layers) // 3 if settings.layer is None else settings.layer
    if chosen >= len(layers):
        raise UserError(f"method.layer={chosen}: this model has the layers 0 to {len(layers) - 1} ({layers[0]}, ...)")
    return layers[max(0, chosen - TRAINED_LAYERS + 1) : chosen + 1]


def trained_parameters(model: PreTrainedModel, layers: list[str], settings: RMUSettings) -> set[str]:
    """Names of the parameters in these layers that are trained; with LoRA those of the adapters there.

    Raises:
        UserError: when no name matches `trained`.
    """
    inside = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(name.startswith(f"{layer}.") for layer in layers)
    ]
    found = {name for name in inside if re.search(settings.trained, name)}
    if not found:
        raise UserError(
            f"method.trained={settings.trained}: it matches no trainable parameter of {', '.join(layers)}; "
            f"candidates: {patterns(inside)}"
        )
    return found


def patterns(names: Iterable[str]) -> str:
    """The names, with numbers replaced by N, without duplicates."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) for name in names)) or "none"
