"""The name of a run's folder: its seed and the overrides that influence its result, each combination in one spelling."""

import hashlib
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException

# Keys that do not influence the result. They are not part of a folder's name, and a change does not make a result stale.
NOT_PART_OF_THE_RUN = ("overwrite", "output_dir", "models_dir", "keep_checkpoints")
# The same for keys of `training`: a finished run is pushed without training it again.
PUSH_KEYS = ("push_to_hub", "hub_model_id", "hub_private_repo")


def run_name(seed: int | str, overrides: list[str]) -> str:
    """A distinct folder name for every combination: the seed, then the overrides that influence the result.

    >>> run_name(0, ["method.num_samples=2", "seed=0", "overwrite=true"])
    'seed-0+method.num_samples-2'
    """
    words = [_normal(word.lstrip("+~")) for word in _in_normal_order(settings_of_the_result(overrides))]
    kept = [word for word in words if not re.match(r"seed([.=]|$)", word)]
    name = "+".join([f"seed-{seed}", *map(_as_file_name, kept)])
    if len(name) > 180:  # file systems allow 255 bytes
        name = f"{name[:160]}+{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _in_normal_order(overrides: list[str]) -> list[str]:
    """The overrides sorted, without those that a later one replaces.

    Of several values of a key Hydra takes the last one, but it merges mappings. So a mapping and all overrides of the same key
    and of keys in it stay together, in their order: `model.lora={...}`, `model.lora.r=4`.
    """
    keys = [word.partition("=")[0].lstrip("+~") for word in overrides]
    mappings = {key for key, word in zip(keys, overrides, strict=True) if word.partition("=")[2].startswith("{")}

    def mapping_of(key: str) -> str | None:
        return min((other for other in mappings if f"{key}.".startswith(f"{other}.")), key=len, default=None)

    together: dict[str, list[str]] = {}  # by the mapping, or the key of another override
    for key, word in zip(keys, overrides, strict=True):
        mapping = mapping_of(key)
        if mapping is None:
            together[key] = [word]
        elif word not in together.setdefault(mapping, [])[-1:]:
            together[mapping].append(word)
    return [word for words in sorted(together.values()) for word in words]


def settings_of_the_result(overrides: list[str]) -> list[str]:
    """The overrides that influence the result, the seed included."""
    keys = [*NOT_PART_OF_THE_RUN, *(f"training.{key}" for key in PUSH_KEYS)]
    ignored = re.compile(rf"[+~]*(hydra|({'|'.join(map(re.escape, keys))})([.=]|$)|generation)")
    engines = [engine for override in overrides if (engine := _engine_of(override))]
    # Of `generation` only another engine draws other samples. Of several values of a key Hydra takes the last one.
    other_engine = [engine for engine in engines[-1:] if engine != "generation.engine=own"]
    return [override for override in overrides if not ignored.match(override)] + other_engine


def _engine_of(override: str) -> str | None:
    """The engine that an override chooses, as an override: also for generation={engine:vllm}; None if it chooses none."""
    key = override.partition("=")[0].lstrip("+")
    if key not in ("generation", "generation.engine"):
        return None
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return override
    if isinstance(value, dict):
        value = value.get("engine")
    elif key == "generation":
        return None
    return override if isinstance(value, Sweep) else f"generation.engine={value}" if value else None


def _normal(override: str) -> str:
    """An override with its value written in one way: a sweep passes 0.001 and False on for 1e-3 and false."""
    try:
        value = OverridesParser.create().parse_override(override).get_value_element_as_str()
    except HydraException:
        return override
    return f"{override.partition('=')[0]}={value.lower() if value in ('True', 'False') else value}"


def _as_file_name(override: str) -> str:
    """An override as part of a folder name. If characters are replaced, a digest keeps names distinct."""
    name = override.replace("=", "-", 1)
    safe = re.sub(r"[^A-Za-z0-9._+\-]+", "-", name).strip("-")
    return name if safe == name else f"{safe}-{hashlib.sha256(override.encode()).hexdigest()[:6]}"
