"""Linear layers with weights prepacked for the CPU's kernels."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

PREPACK_ROWS = 64  # number of rows that the layout is optimized for; others work too


@contextlib.contextmanager
def prepacked_linears(model: PreTrainedModel) -> Iterator[None]:
    """Inside, on a CPU, linear layers use weights in the layout of oneDNN's kernels; the layers are restored afterwards.

    Otherwise PyTorch reorders the weight at every call, which for a few rows takes longer than the product. The weights must
    not change inside.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear and _can_prepack(module)]
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), PREPACK_ROWS)
            layer.forward = partial(_prepacked_forward, packed, layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _prepacked_forward(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _can_prepack(layer: torch.nn.Linear) -> bool:
    """Whether oneDNN has kernels for the layer here, and its forward is not already patched (for example by offloading)."""
    weight = layer.weight
    if "forward" in vars(layer) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32
