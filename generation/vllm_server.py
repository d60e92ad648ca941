"""A vLLM server that generates for the stage (generation.vllm_server), on another GPU or machine.

    VLLM_SERVER_DEV_MODE=1 vllm serve models/finetuned/phi/seed-0 --host 127.0.0.1 --dtype bfloat16 --tokens-only
    python unlearning/main.py -cd=configs -cn=PMC-unlearn-phi generation.engine=vllm generation.vllm_server=http://127.0.0.1:8000

Prompts and answers are token ids. Weights are passed as safetensors in a folder that the server reads, by vLLM's
`reload_weights`. Each passing has a random version; vLLM labels every token with the version that it was drawn under, so that
answers under weights that another run passed are refused. docs/several-gpus.md has the commands and options of the server.
"""

import json
import os
import secrets
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedModel

from common.errors import UserError

KEY = "generation.vllm_server"
FOLDER_KEY = "generation.vllm_weights_dir"
API_KEY = "VLLM_API_KEY"  # the environment variable that the server reads as well
ANSWERS = "/inference/v1/generate"
FIRST_LOGPROBS = {"n": 1, "temperature": 0.0, "max_tokens": 1, "logprobs": 20}  # of the 20 likeliest first tokens
IN_MEMORY = "/dev/shm"
MIN_VERSION = (0, 32)
QUESTIONS_AT_ONCE = 256  # requests that the server has at the same time
CONNECT_SECONDS, ANSWER_SECONDS = 10, 3600
COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --tokens-only (docs/several-gpus.md)"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The API key must not be sent to another address."""

    def redirect_request(self, *args, **kwargs):
        return None


class VLLMServer:
    """Client of a server that has this process's weights.

    Args:
        address: such as http://127.0.0.1:8000.
        weights_dir: folder that the server's machine has under the same path; None: a folder in this machine's memory.
    Attributes:
        name: what the server serves, for messages.
        max_length: maximum tokens of a prompt with its answer, there.
        version: of the weights that were passed last.
    Raises:
        UserError: when the server cannot be used; it says why, and what to do.
    """

    def __init__(self, address: str, weights_dir: str | None):
        if not _is_address(address):
            raise UserError(
                f"{KEY}: expected an address such as http://127.0.0.1:8000, with a port up to 65535, and without a user name "
                f"or a key: the key of a server comes from the environment variable {API_KEY}"
            )
        self.address = address.rstrip("/")
        self.weights_dir = weights_dir or IN_MEMORY
        if not Path(self.weights_dir).is_dir():
            raise UserError(
                f"{FOLDER_KEY}: there is no folder {self.weights_dir}; name one that the server has as well"
            )
        self.headers = {"Content-Type": "application/json", **_authorization()}
        # Without a proxy, which would get the key.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
        self.check_version()
        try:
            (model,) = self.call("/v1/models", seconds=CONNECT_SECONDS)["data"]
            self.name, self.max_length = model["root"], int(model["max_model_len"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.error("does not serve one model; start it without LoRA modules") from error
        self.version = self.call("/weight_info", seconds=CONNECT_SECONDS).get("weight_version", "")
        self.first_logprobs([[0]])

    def check_version(self) -> None:
        found = self.call("/version", seconds=CONNECT_SECONDS).get("version")
        if not isinstance(found, str):
            raise self.error("names no version, so it is not vLLM's; the address may be wrong")
        number = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
        if number < MIN_VERSION:
            needed = ".".join(map(str, MIN_VERSION))
            raise self.error(f"runs vLLM {found or 'of an unknown version'}; {needed} or later is needed")

    # --- requests ---

    def call(self, path: str, body: Any = None, seconds: int = ANSWER_SECONDS) -> dict[str, Any]:
        """The JSON object that the server answers: to GET without a body, else to POST.

        Raises:
            UserError: when there is no such answer.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, self.headers)
        try:
            with self.opener.open(request, timeout=seconds) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise self.error(_meaning(error, path)) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise self.error(f"does not answer ({reason}); start it with {COMMAND}") from error
        try:
            content = json.loads(text)
        except ValueError as error:
            raise self.error(f"answers {path} without JSON, so it is not vLLM's") from error
        if not isinstance(content, dict):
            raise self.error(f"answers {path} without a JSON object, so it is not vLLM's")
        return content

    def error(self, problem: str) -> UserError:
        return UserError(f"{KEY}: the server at {self.address} {problem}")

    # --- weights ---

    def load(self, model: PreTrainedModel, max_length: int) -> None:
        """Pass the weights of `model`, and forget keys and values of the previous ones.

        Args:
            max_length: maximum tokens of a prompt with its answer.
        Raises:
            UserError: when answers of that length are cut, the folder has no room, or the server cannot load the weights.
        """
        if max_length > self.max_length:
            raise self.error(f"cuts answers at {self.max_length} tokens; start it with --max-model-len {max_length}")
        size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
        if (free := shutil.disk_usage(self.weights_dir).free) < 1.05 * size:
            raise UserError(
                f"{FOLDER_KEY}: the weights need {size / 1e9:.1f} GB, and {self.weights_dir} has {free / 1e9:.1f} GB; name a "
                "folder with more room that the server has as well"
            )
        # First the version: tokens that another run's requests get from now on do not have theirs.
        self.version = secrets.token_hex(8)
        self.call("/update_weight_version", {"new_version": self.version})
        # A new name each time: no cache of a network disk has an older file of that name.
        with tempfile.TemporaryDirectory(prefix="pmc-weights-", dir=self.weights_dir) as folder:
            _save(model, folder)
            try:
                kwargs = {"weights_path": str(Path(folder).resolve())}
                self.call("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
            except UserError as error:
                raise UserError(
                    f"{error}\nIt could not load the weights of this {type(model).__name__} from {self.weights_dir}. It serves "
                    f"{self.name}: start it with a folder of the same model, and {FOLDER_KEY} must be a folder that its "
                    "machine has under the same path"
                ) from error
        if self.call("/reset_prefix_cache", {}).get("success") is not True:
            raise self.error("answers requests of others; each run needs a server of its own")

    # --- text ---

    def answers(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
        """For each prompt its answers, as token ids.

        Args:
            params: for each prompt the arguments of vllm.SamplingParams.
        """
        with ThreadPoolExecutor(QUESTIONS_AT_ONCE) as pool:
            choices = pool.map(self.choices, prompts, params)
            return [[choice["token_ids"] for choice in of_prompt] for of_prompt in choices]

    def first_logprobs(self, prompts: Sequence[list[int]]) -> list[dict[int, float]]:
        """For each prompt the log-probabilities of the 20 likeliest first tokens, by token id."""
        answers = [self.choices(prompt, FIRST_LOGPROBS)[0] for prompt in prompts]
        try:
            of_prompts = [answer["logprobs"]["content"][0]["top_logprobs"] for answer in answers]
            found = [{int(one["token_id"]): float(one["logprob"]) for one in of_prompt} for of_prompt in of_prompts]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self.error("gives no log-probabilities, so that its weights cannot be checked") from error
        if not all(found):
            raise self.error("gives no log-probabilities, so that its weights cannot be checked")
        return found

    def choices(self, prompt: list[int], params: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to a prompt in their order, as the server gives them: whole ones, under the weights that were passed."""
        # Without ignore_eos, tokens of the served folder's generation config would end answers as well.
        body = {"token_ids": list(prompt), "sampling_params": {**params, "ignore_eos": True, "detokenize": False}}
        found = self.call(ANSWERS, body)
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            versions = {span["version"] for choice in choices for span in choice["weight_versions"]}
            whole = [
                len(choice["token_ids"]) == params["max_tokens"]
                or choice["token_ids"][-1] in params.get("stop_token_ids", ())
                for choice in choices
            ]
        except (KeyError, TypeError, IndexError) as error:
            problem = f"gives answers of another form ({type(error).__name__}: {error})"
            raise self.error(f"{problem}; requirements-vllm.txt has a version that works") from error
        if versions != {self.version}:
            raise self.error("has weights that another run passed; each run needs a server of its own")
        if len(whole) != params["n"] or not all(whole):
            raise self.error("gave fewer or shorter answers than were asked for; its log may say why")
        return choices


def _is_address(address: str) -> bool:
    """Whether it is an HTTP address with a usable host and port, and without anything secret."""
    try:
        parts = urlsplit(address)
        port = parts.port  # raises for a port that is none
    except ValueError:
        return False
    secret = parts.username or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not secret


def _authorization() -> dict[str, str]:
    """The header with the key of the environment, if there is one.

    Raises:
        UserError: for a key that a header cannot have. It does not show the key.
    """
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{API_KEY}: the key has characters that an HTTP header cannot have; use printable ASCII")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _save(model: PreTrainedModel, folder: str) -> None:
    """Write the weights as a checkpoint of the Hugging Face format, with tied weights once.

    The generation config is left out: it may be one that transformers refuses to save, and the server does not read it.
    """
    own = model.generation_config
    model.generation_config = type(own)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = own


def _meaning(error: urllib.error.HTTPError, path: str) -> str:
    """What an HTTP error of a path means, and what to do."""
    if error.code == 403 and path == ANSWERS:
        return f"takes no token ids, as it was started without --tokens-only; start it with {COMMAND}"
    if error.code in (401, 403):
        return (
            f"refuses the key ({error.code}); set the environment variable {API_KEY} to that of the server's --api-key"
        )
    if error.code == 404 and path in (
        "/weight_info",
        "/update_weight_version",
        "/collective_rpc",
        "/reset_prefix_cache",
    ):
        return f"takes no weights, as it was started without VLLM_SERVER_DEV_MODE=1; start it with {COMMAND}"
    if error.code in (404, 405):
        return f"has no {path}, so it is not vLLM's; the address is without a path such as /v1"
    try:
        message = str(json.loads(error.read())["error"]["message"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        message = "its log says why"
    return f"failed at {path} ({error.code}): {message[:300]}"
