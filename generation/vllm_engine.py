"""Answers from vLLM (generation.engine=vllm) instead of the project's own sampler: in the process of the stage, or by a server.

    pip install -r requirements-vllm.txt
    python unlearning/main.py -cd=configs -cn=PMC-unlearn-phi generation.engine=vllm

`generation.sampler.generate` calls `generate` here. vLLM keeps a second set of weights; before each call they are replaced by
those of the model, so that they are never older than the last optimizer step. docs/speed.md names what vLLM cannot do.

With several processes, each distinct request of all processes is answered once, and all get that answer: by the server that the
first process asks, or by one of the processes, each of which has an engine.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from common.config import GenerationConfig
from common.errors import UserError
from common.files import is_first_process
from common.forward import evaluation_mode, own_forward
from generation.token_sampling import SamplingSettings
from generation.vllm_server import VLLMServer

# The largest difference of equal log-probabilities.
TOLERANCES = {torch.float32: 1e-3}
TOLERANCE_16_BIT = 0.25

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What has weights of its own, and generates."""

    def load(self, model: PreTrainedModel, max_length: int) -> None:
        """Pass the current weights of `model`; `max_length`: maximum tokens of a prompt with its answer."""

    def answers(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
        """For each prompt its answers, as token ids; `params`: for each prompt the arguments of vllm.SamplingParams."""

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        """The likeliest token after a prompt, and its log-probability."""


class Request(NamedTuple):
    """A prompt with what differs between prompts. Equal requests have the same answers."""

    prompt: tuple[int, ...]
    temperature: float
    seed: int | None


_config: GenerationConfig | None = None  # None: the project's own sampler generates
_server: VLLMServer | None = None  # of the first process, if there is a server
_engine: tuple[Any, int, Any] | None = None  # of the engine in this process: what it is for, its max_length, and itself


def use_vllm(config: GenerationConfig) -> None:
    """Choose whether vLLM generates, in this process or by a server.

    Raises:
        UserError: when vLLM is chosen and is not installed, or its server cannot be used.
    """
    global _config, _server
    _config = config if config.engine == "vllm" else None
    _server = None
    if _config is None:
        if config.vllm_server:
            raise UserError(
                "generation.vllm_server: it is used with generation.engine=vllm only; set that, or leave it out"
            )
        return
    if config.vllm_server is None and find_spec("vllm") is None:
        raise UserError("generation.engine=vllm: vLLM is not installed; pip install -r requirements-vllm.txt")
    if is_first_process():
        if config.vllm_server:
            _server = VLLMServer(config.vllm_server, config.vllm_weights_dir)
        warn_of_differences()


@cache
def warn_of_differences() -> None:
    """Log what vLLM does not do; once in a process."""
    log.warning(
        "generation.engine=vllm: samples differ from those of generation.engine=own, they may depend on the other rows of the "
        "batch, and none is stopped early"
    )


def is_used() -> bool:
    return _config is not None


def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    eos_token_ids: Sequence[int],
    rng_keys: Sequence[tuple[int, ...]] | None,
    temperatures: Sequence[float] | None,
) -> list[list[list[int]]]:
    """Answers to prompts, as `generation.sampler.generate` returns them. All processes must call it, also without prompts.

    Raises:
        UserError: for a batch size, which vLLM chooses itself, or a model with an adapter; in all processes when one fails.
    """
    if settings.batch_size:
        raise UserError(
            f"generation.engine=vllm: vLLM chooses the number of answers in a batch (now {settings.batch_size}); leave out "
            "method.sampling_batch_size and evaluation.batch_size, and set generation.vllm_memory_fraction"
        )
    if hasattr(model, "peft_config"):
        raise UserError(
            "generation.engine=vllm: weights of a LoRA adapter are not passed to vLLM; use generation.engine=own"
        )
    requests = [
        Request(
            tuple(prompt),
            temperatures[i] if temperatures else settings.temperature,
            seed_of(rng_keys[i]) if settings.temperature > 0 else None,
        )
        for i, prompt in enumerate(prompts)
    ]
    wanted = list(dict.fromkeys(gather_object(requests)))
    own = _share(wanted)
    try:
        done = [(_answers(model, own, settings, eos_token_ids) if wanted else [], None)]
    except UserError as error:
        done = [([], str(error))]
    of_processes = gather_object(done)
    if errors := [error for _, error in of_processes if error]:
        raise UserError(errors[0])
    answers = {request: found for part, _ in of_processes for request, found in part}
    return [[list(ids) for ids in answers[request]] for request in requests]


def current_engine() -> Engine | None:
    """The server or the engine in this process; None where the first process asks the server instead of this one."""
    return _server if _config.vllm_server else InProcess(_config.vllm_memory_fraction)


def _share(requests: list[Request]) -> list[Request]:
    """The requests that this process has answered: with a server, the first process has all of them answered."""
    state = PartialState()
    if _config.vllm_server:
        return requests if state.is_main_process else []
    return requests[state.process_index :: state.num_processes]


def _answers(
    model: PreTrainedModel, requests: list[Request], settings: SamplingSettings, eos_token_ids: Sequence[int]
) -> list[tuple[Request, list[list[int]]]]:
    """Each request of this process with its answers."""
    engine = current_engine()
    if engine is None:
        return []
    engine.load(model, settings.max_length)
    if not requests:
        return []
    prompts = [list(request.prompt) for request in requests]
    _check_weights(engine, model, prompts[0])
    params = [
        {
            "n": settings.num_samples,
            "temperature": request.temperature,
            "top_k": settings.top_k,  # 0: all tokens, as here
            "top_p": settings.top_p,
            "seed": request.seed,
            "max_tokens": settings.tokens_after(request.prompt),
            "stop_token_ids": list(eos_token_ids),
        }
        for request in requests
    ]
    return list(zip(requests, engine.answers(prompts, params), strict=True))


def seed_of(rng_key: tuple[int, ...]) -> int:
    """The seed of a prompt's samples, in [0, 2^32); vLLM adds a sample's index to it."""
    return int(np.random.SeedSequence(rng_key).generate_state(1)[0])


class InProcess:
    """vLLM in this process."""

    def __init__(self, memory_fraction: float):
        self.memory_fraction = memory_fraction

    def load(self, model: PreTrainedModel, max_length: int) -> None:
        self.llm = engine_with_weights_of(model, max_length, self.memory_fraction)

    def answers(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
        return [[list(answer.token_ids) for answer in output.outputs] for output in self._outputs(prompts, params)]

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        (output,) = self._outputs([prompt], [{"temperature": 0.0, "max_tokens": 1, "logprobs": 0}])
        (token,) = output.outputs[0].token_ids
        return token, output.outputs[0].logprobs[0][token].logprob

    def _outputs(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(requests, [SamplingParams(detokenize=False, **p) for p in params], use_tqdm=False)


def engine_with_weights_of(model: PreTrainedModel, max_length: int, memory_fraction: float) -> Any:
    """The engine (vllm.LLM) of models with this configuration, with the current weights of `model`.

    Args:
        max_length: maximum tokens of a prompt with its answer.
        memory_fraction: of the GPU's memory, for vLLM.
    """
    global _engine
    key = (model.config.to_json_string(), model.dtype)
    if _engine is None or _engine[0] != key or _engine[1] < max_length:
        _engine = None  # frees the previous one
        _engine = key, max_length, _new_engine(model, max_length, memory_fraction)
    engine = _engine[2]
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
def _check_weights(engine: Engine, model: PreTrainedModel, prompt: list[int]) -> None:
    """Check that vLLM gives its likeliest first token the log-probability that the model gives it.

    Raises:
        UserError: if not, as the answers would be those of another model.
    """
    token, found = engine.first_token(prompt)
    with evaluation_mode(model):
        ids = torch.tensor([prompt], device=model.device)
        logits = own_forward(model)(input_ids=ids, use_cache=False).logits[0, -1]
    expected = float(logits.float().log_softmax(-1)[token])
    if not abs(found - expected) <= TOLERANCES.get(model.dtype, TOLERANCE_16_BIT):
        dtype = str(model.dtype).removeprefix("torch.")
        advice = (
            f"start the server with --dtype {dtype} and a folder of this model" if _server else "vLLM cannot compute it"
        )
        raise UserError(
            f"generation.engine=vllm: {type(model).__name__} has the log-probability {expected:.4g} where vLLM has {found:.4g} "
            f"(token {token} after the first prompt), so vLLM computes another model; {advice}, or use generation.engine=own"
        )


def _new_engine(model: PreTrainedModel, max_length: int, memory_fraction: float) -> Any:
    """An engine without weights for models of this configuration. It needs no tokenizer and no network."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where it can read the model's weights
    from vllm import LLM

    # torchrun's processes each have an engine of their own, in the process group that they have already.
    several = {"distributed_executor_backend": "external_launcher"} if PartialState().num_processes > 1 else {}
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
            **several,
        )
