"""Push the folder of a finished run to the Hugging Face hub: training.push_to_hub=true training.hub_model_id=OWNER/NAME.

Pushed are the weights, the tokenizer, the model card and result.json, in one commit. Files with texts of the data set
(generations.jsonl and others) stay here. Checkpoints are never pushed. The token is read from the environment alone.
"""

import logging
import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from omegaconf import DictConfig, OmegaConf

from common.config import RunConfig
from common.errors import UserError, reason
from common.files import is_first_process, is_hub_id, read_json, resolve_path, write_json
from common.job import is_in_sweep
from common.model import ADAPTER
from common.redaction import without_local_paths, without_secrets
from common.results import CARD, RESULT
from common.runs import WEIGHTS

log = logging.getLogger(__name__)
# Whatever a tokenizer needs; no code, and no file with texts of the data set.
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
PUSHED = (*WEIGHTS, *TOKENIZER, "chat_template.jinja", "config.json", "generation_config.json", CARD, RESULT)


def check_push(cfg: DictConfig, config: RunConfig) -> None:
    """Check before training that the finished run can be pushed, if training.push_to_hub is set.

    Raises:
        UserError: names what is missing.
    """
    training = config.training
    if not training.get("push_to_hub"):
        return
    hub_id = training.get("hub_model_id")
    if not hub_id:
        raise UserError("training.hub_model_id: missing; name the model on the hub, OWNER/NAME, that is pushed to")
    try:
        validate_repo_id(hub_id)
    except ValueError as error:
        raise UserError(f"training.hub_model_id={hub_id}: {reason(error)}; expected OWNER/NAME") from error
    if hub_id.count("/") != 1:
        raise UserError(f"training.hub_model_id={hub_id}: expected OWNER/NAME")
    if not config.save_model:
        raise UserError("training.push_to_hub=true: there is nothing to push with save_model=false")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "training.push_to_hub=true: needs a token with write access; put HUGGINGFACE_LOGIN_TOKEN into "
            "environment.local.env, a copy of environment.env"
        )
    if config.model.lora and not config.model.lora.merge and not is_hub_id(base := _adapter_base(config)):
        raise UserError(
            f"training.push_to_hub=true: the adapter belongs to the weights in {base}, which are not on the hub; use "
            "model.lora.merge=true"
        )
    if is_in_sweep() and "${" not in str(OmegaConf.to_container(cfg.training, resolve=False).get("hub_model_id")):
        raise UserError(
            f"training.hub_model_id={hub_id}: the runs of a sweep would replace each other on the hub; give each a name of its "
            "own, as in 'training.hub_model_id=OWNER/NAME-${seed}'"
        )
    if is_first_process():
        _check_token()


def _check_token() -> None:
    """Raises UserError if the hub refuses the token; warns if it does not answer, as it may after training."""
    try:
        HfApi(token=os.environ["HF_TOKEN"]).whoami()
    except HfHubHTTPError as error:
        raise UserError(
            f"training.push_to_hub=true: the hub refuses the token ({without_secrets(reason(error))})"
        ) from error
    except Exception as error:  # it may be back after training
        log.warning("training.push_to_hub=true: the hub does not answer now (%s)", without_secrets(reason(error)))


def _adapter_base(config: RunConfig) -> str | None:
    """Hub id or folder of the weights that the run's LoRA adapter belongs to; None for those of a new model."""
    saved = Path(resolve_path(config.model.path or "")) / ADAPTER
    return read_json(saved)["base_model_name_or_path"] if saved.is_file() else config.model.path


def push_if_wanted(folder: Path, config: RunConfig) -> None:
    """Push the folder of a finished run if training.push_to_hub is set. Only the first process does.

    Raises:
        UserError: if the folder has no weights or no model card, or the hub refuses. The folder is unchanged.
    """
    if not config.training.get("push_to_hub") or not is_first_process():
        return
    hub_id = config.training["hub_model_id"]
    missing = [name for name in (CARD, "*.safetensors") if not any(folder.glob(name))]
    if missing:
        raise UserError(f"training.push_to_hub=true: {folder} has no {missing[0]}; overwrite=true makes it")
    try:
        with tempfile.TemporaryDirectory() as copy:
            _link_pushed_files(folder, Path(copy))
            api = HfApi(token=os.environ["HF_TOKEN"])
            api.create_repo(hub_id, private=config.training.get("hub_private_repo"), exist_ok=True)
            # Weights of an earlier push in other files would be loaded instead of these, or beside them.
            api.upload_folder(
                repo_id=hub_id, folder_path=copy, commit_message="Push a finished run", delete_patterns=list(WEIGHTS)
            )
    except Exception as error:  # of the hub, the network or the disk
        raise UserError(
            f"training.push_to_hub=true: could not push to {hub_id} ({without_secrets(reason(error))}). The run is complete "
            f"in {folder}; the same command pushes it again without training"
        ) from error
    log.info("pushed %s to https://huggingface.co/%s", folder, hub_id)


def _link_pushed_files(folder: Path, target: Path) -> None:
    """Links to the files that are pushed, and a copy of result.json without paths of this machine."""
    for path in {path for pattern in PUSHED for path in folder.glob(pattern) if path.is_file()}:
        (target / path.name).symlink_to(path.resolve())
    (target / RESULT).unlink()
    write_json(target / RESULT, without_local_paths(read_json(folder / RESULT)))
