"""Answers from vLLM in the process of the stage (generation.engine=vllm), instead of the project's own sampler.

    pip install -r requirements-vllm.txt
    python unlearning/main.py -cd=configs -cn=PMC-unlearn-phi generation.engine=vllm

`generation.sampler.generate` calls `generate` here. vLLM keeps a second set of weights; before each call they are replaced by
those of the model, so that they are never older than the last optimizer step. docs/speed.md names what vLLM cannot do.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from common.config import GenerationConfig
from common.errors import UserError
from common.forward import evaluation_mode, own_forward
from generation.token_sampling import SamplingSettings

# The largest difference of equal log-probabilities.
TOLERANCES = {torch.float32: 1e-3}
TOLERANCE_16_BIT = 0.25

log = logging.getLogger(__name__)

_memory_fraction: float | None = None  # None: the project's own sampler generates
_engine: tuple[Any, Any] | None = None  # the current engine's key, and the engine


def use_vllm(config: GenerationConfig) -> None:
    """Choose whether vLLM generates, in this process.

    Raises:
        UserError: when vLLM is chosen and is not installed, or there are several processes.
    """
    global _memory_fraction
    _memory_fraction = config.vllm_memory_fraction if config.engine == "vllm" else None
    if _memory_fraction is None:
        return
    if find_spec("vllm") is None:
        raise UserError("generation.engine=vllm: vLLM is not installed; pip install -r requirements-vllm.txt")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("generation.engine=vllm: works in one process only; use generation.engine=own with torchrun")
    warn_of_differences()


@cache
def warn_of_differences() -> None:
    """Log what vLLM does not do; once in a process."""
    log.warning(
        "generation.engine=vllm: samples differ from those of generation.engine=own, they may depend on the other rows of the "
        "batch, and none is stopped early"
    )


def is_used() -> bool:
    return _memory_fraction is not None


def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    eos_token_ids: Sequence[int],
    rng_keys: Sequence[tuple[int, ...]] | None,
    temperatures: Sequence[float] | None,
) -> list[list[list[int]]]:
    """Answers to prompts, as `generation.sampler.generate` returns them.

    Raises:
        UserError: for a batch size, which vLLM chooses itself, or a model with an adapter.
    """
    from vllm import SamplingParams

    if settings.batch_size:
        raise UserError(
            f"generation.engine=vllm: vLLM chooses the number of answers in a batch (now {settings.batch_size}); leave out "
            "method.sampling_batch_size and evaluation.batch_size, and set generation.vllm_memory_fraction"
        )
    engine = engine_with_weights_of(model, settings.max_length, _memory_fraction)
    if prompts:
        _check_weights(engine, model, prompts[0])
    params = [
        SamplingParams(
            n=settings.num_samples,
            temperature=temperatures[i] if temperatures else settings.temperature,
            top_k=settings.top_k,  # 0: all tokens, as here
            top_p=settings.top_p,
            seed=seed_of(rng_keys[i]) if settings.temperature > 0 else None,
            max_tokens=settings.tokens_after(prompt),
            stop_token_ids=list(eos_token_ids),
            detokenize=False,
        )
        for i, prompt in enumerate(prompts)
    ]
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = engine.generate(requests, params, use_tqdm=False)
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def seed_of(rng_key: tuple[int, ...]) -> int:
    """The seed of a prompt's samples, in [0, 2^32); vLLM adds a sample's index to it."""
    return int(np.random.SeedSequence(rng_key).generate_state(1)[0])


def engine_with_weights_of(model: PreTrainedModel, max_length: int, memory_fraction: float) -> Any:
    """The engine (vllm.LLM) of models with this configuration, with the current weights of `model`.

    Args:
        max_length: maximum tokens of a prompt with its answer.
        memory_fraction: of the GPU's memory, for vLLM.
    Raises:
        UserError: for a model with an adapter.
    """
    global _engine
    if hasattr(model, "peft_config"):
        raise UserError(
            "generation.engine=vllm: weights of a LoRA adapter are not passed to vLLM; use generation.engine=own"
        )
    key = (model.config.to_json_string(), model.dtype, max_length)
    if _engine is None or _engine[0] != key:
        _engine = None  # frees the previous one
        _engine = key, _new_engine(model, max_length, memory_fraction)
    engine = _engine[1]
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if model.device.type == "cpu" and model.config.tie_word_embeddings:
        engine.apply_model(_pack_head)
    engine.reset_prefix_cache()  # keys and values of the previous weights
    return engine


def _pack_head(copy: Any) -> None:
    """On a CPU vLLM packs weights; reloading leaves out a head that is tied to the embedding."""
    copy.lm_head.quant_method.process_weights_after_loading(copy.lm_head)


@torch.no_grad()
def _check_weights(engine: Any, model: PreTrainedModel, prompt: list[int]) -> None:
    """Check that vLLM gives its likeliest first token the log-probability that the model gives it.

    Raises:
        UserError: if not, as the answers would be those of another model.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    answer = output.outputs[0]
    (token,) = answer.token_ids
    with evaluation_mode(model):
        ids = torch.tensor([list(prompt)], device=model.device)
        logits = own_forward(model)(input_ids=ids, use_cache=False).logits[0, -1]
    expected = float(logits.float().log_softmax(-1)[token])
    found = answer.logprobs[0][token].logprob
    if not abs(found - expected) <= TOLERANCES.get(model.dtype, TOLERANCE_16_BIT):
        raise UserError(
            f"generation.engine=vllm: {type(model).__name__} has the log-probability {expected:.4g} where vLLM has {found:.4g} "
            f"(token {token} after the first prompt), so vLLM computes another model; use generation.engine=own"
        )


def _new_engine(model: PreTrainedModel, max_length: int, memory_fraction: float) -> Any:
    """An engine without weights for models of this configuration. It needs no tokenizer and no network."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where it can read the model's weights
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # its own defaults, as there is no such file
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_length,
            gpu_memory_utilization=memory_fraction,
            enforce_eager=model.device.type == "cpu",  # compiling takes minutes there
            # vLLM takes back a seeded draw after a part of a prompt, which generators on a CPU cannot.
            enable_chunked_prefill=model.device.type != "cpu",
            trust_remote_code=False,
            disable_log_stats=True,
        )
