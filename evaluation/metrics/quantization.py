"""Attack: quantize the weights. The headline scores of quantized copies of the model.

Rounding the weights can undo unlearning that changed them only a little (Zhang et al. 2024, arXiv 2410.16454).

Scores:
    quantization/* (as the headline score): unlearn quality, utility and forget recall with weights of 8 and 4 bits,
        rounded to nearest or by bitsandbytes. Not shown: other quantization methods.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from accelerate import PartialState
from pydantic import Field, field_validator
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.config import section
from common.errors import UserError
from common.files import resolve_path
from evaluation.context import EvaluationContext
from evaluation.metrics.headline import load_questions, score_outputs
from evaluation.scores import Scores

BLOCK = 64  # weights of a row that share a scale
SCORES = ("unlearn_quality", "utility", "rougeL_recall/forget")


@section
class Quantization:
    bits: list[Literal[8, 4]] = Field(default_factory=lambda: [8, 4])
    """Bits of a weight: 8, 4 or both."""
    method: Literal["round", "bitsandbytes"] = "round"
    """round: to the nearest value; bitsandbytes: LLM.int8() and NF4 with the kernels of that package, which must be
    installed."""

    @field_validator("method")
    @classmethod
    def is_installed(cls, method: str) -> str:
        if method == "bitsandbytes" and find_spec("bitsandbytes") is None:
            raise ValueError("not installed; pip install bitsandbytes, or method=round")
        return method


def measure(context: EvaluationContext, scores: Scores) -> None:
    """Unlearn quality, utility and forget recall of a quantized copy, for each number of bits."""
    settings: Quantization = context.config.sections["quantization"]
    questions = load_questions(context.config.data, context.config.evaluation)
    for bits in settings.bits:
        # No variable refers to the copy, so its memory is freed before the next copy is made.
        measured = score_outputs(context.outputs.with_weights(quantized(context, settings.method, bits)), questions)
        for name in SCORES:
            scores.add(f"quantization/{bits}bit/{name}", measured[name].value, measured[name].higher_is_better)


def quantized(context: EvaluationContext, method: str, bits: int) -> PreTrainedModel:
    """A fresh copy of the model with quantized weights."""
    if method == "bitsandbytes":
        return load_with_bitsandbytes(context, bits)
    return round_linear_layers(context.loader.fresh(context.model.config, context.model.tokenizer), bits)


@torch.no_grad()
def round_linear_layers(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Round the weights of every linear layer except the head, and those of experts, in place, to simulate quantization.

    Raises:
        UserError: when the model has no torch.nn.Linear layer.
    """
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise UserError("quantization: the model has no torch.nn.Linear layer; leave quantization out of metrics")
    for layer in layers:
        round_to_nearest(layer.weight, bits)
    for matrix in expert_matrices(model):
        round_to_nearest(matrix, bits)
    return model


def expert_matrices(model: nn.Module) -> list[torch.Tensor]:
    """The weight matrices of experts, each of shape (outputs, inputs): views of parameters that hold all of a layer's."""
    return [
        matrix.mT if getattr(module, "is_transposed", False) else matrix
        for module in model.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape[1:]) > 1
        for matrix in parameter
    ]


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, bits: int) -> None:
    """Round a weight matrix, shape (outputs, inputs), in place to 2^bits - 1 evenly spaced values, symmetric around 0.

    Each BLOCK of a row has its own scale, by which its largest absolute value becomes the largest integer, 2^(bits-1) - 1.
    Computed in float32, because bfloat16 has too few digits beyond 64 to be rounded to the nearest integer.
    """
    largest = 2 ** (bits - 1) - 1
    for block in weight.split(BLOCK, dim=1):
        exact = block.float()
        scale = (exact.abs().amax(dim=1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        block.copy_((exact / scale).round() * scale)


def load_with_bitsandbytes(context: EvaluationContext, bits: int) -> PreTrainedModel:
    """The checkpoint loaded by bitsandbytes: LLM.int8() at 8 bits, NF4 at 4.

    Raises:
        UserError: when the model has experts, whose weights that package leaves as they are.
    """
    from transformers import BitsAndBytesConfig

    path = resolve_path(context.model.config.path)
    context.loader.clear()
    kinds = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=BitsAndBytesConfig(**kinds[bits]),
        dtype=getattr(torch, context.model.config.dtype),
        device_map={"": PartialState().device},
        use_safetensors=True,
        revision=context.model.config.revision,
        trust_remote_code=context.model.config.trust_remote_code,
    )
    if expert_matrices(model):
        raise UserError(
            "quantization.method=bitsandbytes: it leaves the weights of this model's experts as they are; use "
            "quantization.method=round"
        )
    return model
