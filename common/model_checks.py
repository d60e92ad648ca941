"""Checks of a loaded model: whether it predicts from left to right, and how many positions it has."""

import logging

import torch
from transformers import PretrainedConfig, PreTrainedModel

from common.config import RunConfig
from common.errors import UserError
from common.forward import difference, evaluation_mode

log = logging.getLogger(__name__)

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rotary embeddings that depend on the longest row
PADDING = 2  # tokens after a padded row
CPU_ATTENTION = ("eager", "sdpa")  # other implementations run on a GPU only, and a model is loaded on the CPU


@torch.no_grad()
def check_causal(model: PreTrainedModel, key: str) -> None:
    """Check on a few tokens that logits depend on earlier tokens only, and not on padding at the end of a row.

    Args:
        key: the configuration key and value by which an error names the model.
    Raises:
        UserError: if the model is bidirectional, or computes a padded row otherwise than a single one.
    """
    if model.config._attn_implementation not in CPU_ATTENTION:
        return
    middle = model.get_input_embeddings().num_embeddings // 2  # special tokens have the lowest or the highest ids
    ids = torch.arange(middle, middle + 4, device=model.device)[None]
    changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, PADDING))
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, PADDING)), "attention_mask": mask}
    try:
        with evaluation_mode(model):
            logits, of_changed = (model(input_ids=row, use_cache=False).logits.float() for row in (ids, changed))
            of_padded = model(**padded, use_cache=False).logits.float()[:, :-PADDING]
    except Exception as error:  # an operation without a CPU kernel; an error of the model itself shows in training
        log.warning("%s: not checked for left-to-right prediction (%s)", key, error)
        return
    # The last logits, which do depend on the last token, are compared with themselves.
    of_earlier = torch.cat([of_changed[:, :-1], logits[:, -1:]], 1)
    if difference(logits, of_earlier, model.dtype) > 0:  # NaN is named with its own message when answers are generated
        raise UserError(
            f"{key}: {type(model).__name__} is bidirectional, its prediction of a token depends on later tokens, so it cannot "
            "generate text; name a causal language model"
        )
    if difference(logits, of_padded, model.dtype) > 0:
        raise UserError(
            f"{key}: {type(model).__name__} computes a row with padding at its end otherwise than a single row, so its losses "
            "would depend on the batch; name another model"
        )


def check_positions(model: PreTrainedModel, config: RunConfig) -> None:
    """`check_lengths` of the longest rows that the run may make."""
    lengths = {
        "data.max_length": config.data.max_length,
        "evaluation.max_length": config.evaluation.max_length,
        "method.max_length": getattr(config.settings, "max_length", 0),
    }
    check_lengths(model, lengths)


def check_lengths(model: PreTrainedModel, lengths: dict[str, int]) -> None:
    """Check that the model has a position for every token of rows of these lengths, given by their names.

    Rotary embeddings go on past `max_position_embeddings`, where the model was not trained: a warning.

    Raises:
        UserError: names each length that is larger than the model's table of positions, or beyond which its rotary embeddings
            depend on the longest row of the batch.
    """
    settings = model.config.get_text_config(decoder=True)
    limit = getattr(settings, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1  # of the RoBERTa kind: positions start after the padding index

    def beyond(positions: int | None) -> str:
        return ", ".join(f"{key}={length}" for key, length in lengths.items() if positions and length > positions)

    if longer := beyond(original := length_dependent_beyond(settings)):
        raise UserError(
            f"{longer}: beyond {original} tokens the model's rotary embeddings depend on the longest row of a batch, and "
            f"so would the losses and samples of the others; set it to at most {original}"
        )
    longer = beyond(limit)
    if longer and getattr(settings, "rope_parameters", None):
        log.warning("%s: the model was made for at most %d tokens (max_position_embeddings)", longer, limit)
    elif longer:
        raise UserError(f"{longer}: the model has positions for {limit} tokens only; set it to at most {limit}")


def length_dependent_beyond(settings: PretrainedConfig) -> int | None:
    """The number of tokens beyond which rotary embeddings depend on the longest row of a batch; None if they never do."""
    parameters = getattr(settings, "rope_parameters", None) or {}
    of_layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        of_layer.get("original_max_position_embeddings") or settings.max_position_embeddings
        for of_layer in of_layers
        if of_layer.get("rope_type") in LENGTH_DEPENDENT_ROPE
    ]
    return min(limits, default=None)
