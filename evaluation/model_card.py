"""The model card of a run, README.md: what was trained on what, its scores and what they do not show, how to load it.

It has the format of the Hugging Face hub, so that a folder can be uploaded as it is. Both training stages write it.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from yaml import YAMLError

from common.errors import UserError
from common.files import is_first_process, is_hub_id, read_json, write_text
from common.model import ADAPTER
from common.redaction import without_local_paths
from common.results import CARD, method_name, result_of, started_from
from common.runs import flattened
from evaluation.tables import as_text, headline_table, results_before

LIMITS = """- Unlearn quality and forget recall compare words of greedy answers. They do not show whether an answer is fluent,
  or what sampling, token probabilities or further training bring back.
- Utility and retain recall compare words of greedy answers, too. They do not show on which questions the answers became worse,
  or what the model can do beyond these questions.
- The fraction of empty forget answers does not show whether the other answers make sense."""
LOADING = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = "."  # this folder, or its id on the hub
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)"""


def write_model_card(folder: Path, stage: str, start: str | None) -> None:
    """Write README.md into a folder that holds a run's weights and result.json. Only the first process writes.

    Args:
        stage: finetuning or unlearning.
        start: the checkpoint that training started from, as a hub id or an absolute path; None for a new model.
    """
    if not is_first_process():
        return
    result = without_local_paths(result_of(folder))
    head = card_data(result["config"], stage, start, (folder / ADAPTER).is_file())
    results = results_before(folder)
    results[method_name(result["config"]) or "finetuned"] = result
    parts = [
        f"# {title(result['config'], stage, head.base_model)}",
        description(result["config"], stage, head),
        "## Scores",
        headline_table(results),
        LIMITS,
        *(["## Command", f"    {result['command']}"] if result.get("command") else []),
        "## Loading",
        LOADING,
        "## Settings",
        settings_table(result),
    ]
    if (folder / ADAPTER).is_file():
        loads = "These are the weights of a LoRA adapter. Loading them needs `pip install peft`, and reads the base model, too."
        parts.insert(parts.index(LOADING), loads)
    write_text(folder / CARD, str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")))


def card_data(config: dict[str, Any], stage: str, start: str | None, is_adapter: bool) -> ModelCardData:
    """The head of the card. Ids and the license are left out where they are not known."""
    base_model = base_model_id(start)
    data = config["data"]["path"]
    is_pmc = config.get("method", {}).get("_target_") == "unlearning.pmc.PMC"
    relation = {"base_model_relation": "adapter" if is_adapter else "finetune"} if base_model else {}
    return ModelCardData(
        base_model=base_model,
        datasets=[data] if is_hub_id(data) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*(["machine-unlearning"] if stage == "unlearning" else []), *(["arxiv:2507.04219"] if is_pmc else [])]
        or None,
        **relation,
        **license_of(start),
    )


def origins(start: str | None) -> list[str]:
    """The checkpoint that training started from, the one that this was trained from, and so on to the first known one."""
    found: list[str] = []
    with contextlib.suppress(UserError):  # a result.json that cannot be read: what is before it is not known
        while start and start not in found:
            found.append(start)
            start = started_from(start) if Path(start).exists() else None
    return found


def base_model_id(start: str | None) -> str | None:
    """The hub id of the model that training began with, through the runs in between; None if it is not known."""
    return next((path for path in reversed(origins(start)) if is_hub_id(path)), None)


def license_of(start: str | None) -> dict[str, str]:
    """license, license_name and license_link from the nearest model card or config.json of the checkpoints before this one.

    Of models on the hub, only files in the local cache are read.
    """
    for path in origins(start):
        local = Path(path).exists()
        card, config = (Path(path) / name if local else _cached(path, name) for name in (CARD, "config.json"))
        for file, read in ((card, metadata_load), (config, read_json)):
            head = None
            with contextlib.suppress(OSError, ValueError, YAMLError):  # not readable: the license is not known
                head = read(file) if file and file.is_file() else None
            if isinstance(head, dict) and isinstance(head.get("license"), str):
                keys = ("license", "license_name", "license_link")
                return {key: head[key] for key in keys if isinstance(head.get(key), str)}
    return {}


def _cached(hub_id: str, name: str) -> Path | None:
    with contextlib.suppress(ValueError):  # not a hub id, but a folder that is gone
        found = try_to_load_from_cache(hub_id, name)
        return Path(found) if isinstance(found, str) else None
    return None


def title(config: dict[str, Any], stage: str, base_model: str | None) -> str:
    done = f"unlearned with {as_text(method_name(config))}" if stage == "unlearning" else "finetuned"
    return f"{as_text(base_model)}, {done}" if base_model else done[0].upper() + done[1:]


def description(config: dict[str, Any], stage: str, head: ModelCardData) -> str:
    """What was trained on what, in a paragraph."""
    data, splits = as_text(config["data"]["path"]), config["data"]["splits"]
    from_what = f"Trained from {as_text(head.base_model)}" if head.base_model else "Trained"
    if stage == "finetuning":
        return f"{from_what} on questions and answers: the split {as_text(splits['train'])} of the data set {data}."
    return (
        f"{from_what} to forget the split {as_text(splits['forget'])} of the data set {data}, and to keep the split "
        f"{as_text(splits['retain'])}, by the method {as_text(config['method']['_target_'])} of Partial Model Collapse. "
        "Unlearning is not deletion: no score shows that nothing is left of what was to be forgotten."
    )


def settings_table(result: dict[str, Any]) -> str:
    """A row per setting that the weights depend on, and the versions that they were trained with."""
    config = result["config"]
    sections = {
        name: config[name] for name in ("seed", "finetuned", "model", "data", "method", "training") if name in config
    }
    rows = dotted({**sections, "versions": result["versions"], "git_commit": result["git_commit"]})
    lines = [f"| {as_text(key)} | {as_text(value)} |" for key, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def dotted(values: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> value as JSON, of nested dictionaries. Quotes around a text are kept where it has spaces at an end.

    >>> dotted({"a": {"b": 1, "c": None}, "d": "x", "e": " x"})
    {'a.b': '1', 'a.c': 'null', 'd': 'x', 'e': '" x"'}
    """
    return {key: _as_json(value) for key, value in flattened(values) if value != {}}


def _as_json(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown[1:-1] if isinstance(value, str) and value == value.strip() else shown
