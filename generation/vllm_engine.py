"""Answers from vLLM (generation.engine=vllm) instead of the project's own sampler: in the process of the stage, or by a server.

    pip install -r requirements-vllm.txt
    python unlearning/main.py -cd=configs -cn=PMC-unlearn-llama3 generation.engine=vllm

`generation.sampler.generate` calls `generate` here. vLLM keeps a second set of weights; before each call they are replaced by
those of the model, so that they are never older than the last optimizer step. docs/speed.md names what vLLM cannot do.

With several processes, each distinct request of all processes is answered once, and all get that answer: by the server that the
first process asks, or by one of the processes, each of which has an engine.
"""

import gc
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from common.forward import evaluation_mode, own_forward, tolerance
from common.losses import check_finite
from generation.token_sampling import SamplingSettings
from generation.vllm_server import FIRST_LOGPROBS, VLLMServer

CHECKED_PROMPTS = 4  # prompts of a call whose first token's log-probabilities are compared
IMPOSSIBLE = -9999.0  # a server sends lower log-probabilities as this
MIN_TEMPERATURE = 0.01  # vLLM raises lower ones to it

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What has weights of its own, and generates."""

    def load(self, model: PreTrainedModel, max_length: int) -> None:
        """Pass the current weights of `model`; `max_length`: maximum tokens of a prompt with its answer."""

    def answers(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
        """For each prompt its answers, as token ids; `params`: for each prompt the arguments of vllm.SamplingParams."""

    def first_logprobs(self, prompts: Sequence[list[int]]) -> list[dict[int, float]]:
        """For each prompt the log-probabilities of the 20 likeliest first tokens, by token id."""


class Request(NamedTuple):
    """A prompt with what differs between prompts. Equal requests have the same answers."""

    prompt: tuple[int, ...]
    temperature: float
    seed: int | None


_config: GenerationConfig | None = None  # None: the project's own sampler generates
_server: VLLMServer | None = None  # of the first process, if there is a server
_engine: tuple[Any, int, Any] | None = None  # of the engine in this process: what it is for, its max_length, and itself
_kept_cores: list[Any] = []  # of engines that were freed, with torchrun


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
        UserError: for a batch size, which vLLM chooses itself, a model with an adapter, or a temperature that vLLM raises; in
            all processes when one fails.
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
    if too_low := [request.temperature for request in wanted if 0 < request.temperature < MIN_TEMPERATURE]:
        raise UserError(
            f"generation.engine=vllm: vLLM raises a temperature of {too_low[0]:g} to {MIN_TEMPERATURE}; set one of 0, or of "
            f"{MIN_TEMPERATURE} or more, or use generation.engine=own"
        )
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
    _check_weights(engine, model, prompts)
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

    def first_logprobs(self, prompts: Sequence[list[int]]) -> list[dict[int, float]]:
        outputs = self._outputs(prompts, [FIRST_LOGPROBS] * len(prompts))
        found = [output.outputs[0].logprobs[0] for output in outputs]
        return [{token: entry.logprob for token, entry in of_prompt.items()} for of_prompt in found]

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
        if _engine is not None:
            previous, _engine = _engine[2], None
            _free(previous)
            del previous
            gc.collect()
        _engine = key, max_length, _new_engine(model, max_length, memory_fraction)
    engine = _engine[2]
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    with _errors_of_vllm(model, memory_fraction):
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if model.device.type == "cpu" and model.config.tie_word_embeddings:
            engine.apply_model(_pack_head)
        engine.reset_prefix_cache()  # keys and values of the previous weights
    return engine


def _free(engine: Any) -> None:
    """Free the memory of an engine. vLLM itself refers to it, so that deleting it is not enough."""
    if PartialState().num_processes > 1:
        # The whole shutdown would end torchrun's process group as well, also when Python deletes the engine's core.
        engine.llm_engine.model_executor.shutdown()
        _kept_cores.append(engine.llm_engine.engine_core)
    else:
        engine.llm_engine.engine_core.shutdown()


@contextmanager
def _errors_of_vllm(model: PreTrainedModel, memory_fraction: float) -> Iterator[None]:
    """Name the settings to change in an error of vLLM."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # vLLM raises errors of any type
        raise UserError(
            f"generation.engine=vllm: vLLM cannot compute this {type(model).__name__} ({type(error).__name__}: "
            f"{str(error).strip()[:600]}). If memory is too small, change generation.vllm_memory_fraction (now "
            f"{memory_fraction:g}); else use generation.engine=own"
        ) from error


@contextmanager
def _kept_random_states(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, numpy and torch: an engine in this process seeds them with 0."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _pack_head(copy: Any) -> None:
    """On a CPU vLLM packs weights; reloading leaves out a head that is tied to the embedding."""
    copy.lm_head.quant_method.process_weights_after_loading(copy.lm_head)


@torch.no_grad()
def _check_weights(engine: Engine, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Check that vLLM gives its likeliest first tokens the log-probabilities that the model gives them.

    Args:
        prompts: of all answers; at most CHECKED_PROMPTS of them are compared, evenly spread.
    Raises:
        UserError: if not, as the answers would be those of another model; or if the model's logits are not finite.
    """
    places = np.linspace(0, len(prompts) - 1, min(CHECKED_PROMPTS, len(prompts))).astype(int)
    checked = [prompts[place] for place in places]
    expected = []
    with evaluation_mode(model):
        for prompt in checked:
            ids = torch.tensor([prompt], device=model.device)
            logits = own_forward(model)(input_ids=ids, use_cache=False).logits[0, -1].float()
            check_finite(logits)
            expected.append(logits.log_softmax(-1).cpu())
    compared = [
        (abs(found - float(of_model[token])), token, float(of_model[token]), found)
        for of_model, of_vllm in zip(expected, engine.first_logprobs(checked), strict=True)
        for token, found in of_vllm.items()
        if not (found <= IMPOSSIBLE and of_model[token] <= IMPOSSIBLE)
    ]
    wrong = [one for one in compared if not one[0] <= tolerance(model.dtype)]
    if wrong:
        _, token, of_model, of_vllm = max(wrong)
        dtype = str(model.dtype).removeprefix("torch.")
        advice = (
            f"start the server with --dtype {dtype} and a folder of this model" if _server else "vLLM cannot compute it"
        )
        raise UserError(
            f"generation.engine=vllm: {type(model).__name__} has the log-probability {of_model:.4g} where vLLM has "
            f"{of_vllm:.4g} (token {token} after a prompt), so vLLM computes another model; {advice}, or use "
            "generation.engine=own"
        )


def _new_engine(model: PreTrainedModel, max_length: int, memory_fraction: float) -> Any:
    """An engine without weights for models of this configuration. It needs no tokenizer and no network.

    Raises:
        UserError: when vLLM cannot make it, or would compute the model with the classes of transformers.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where it can read the model's weights
    # torchrun's processes each have an engine of their own, in the process group that they have already.
    several = {"distributed_executor_backend": "external_launcher"} if PartialState().num_processes > 1 else {}
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # its own defaults, as there is no such file
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "gpu_memory_utilization": memory_fraction,
        "enforce_eager": model.device.type == "cpu",  # compiling takes minutes there
        # vLLM takes back a seeded draw after a part of a prompt, which generators on a CPU cannot.
        "enable_chunked_prefill": model.device.type != "cpu",
        "trust_remote_code": False,
        "disable_log_stats": True,
        **several,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        _errors_of_vllm(model, memory_fraction),
        _kept_random_states(model.device),
    ):
        from vllm import LLM, EngineArgs

        model.config.save_pretrained(folder)
        if EngineArgs(model=folder, **options).create_model_config().using_transformers_backend():
            raise UserError(
                f"generation.engine=vllm: vLLM has no {type(model).__name__} of its own, and would change the class that "
                "training uses in this process; name a server of this model in generation.vllm_server "
                "(docs/several-gpus.md), or use generation.engine=own"
            )
        return LLM(model=folder, **options)
