"""What Hydra knows of the command that is running; functions called from Python, without a command, are no sweep."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def is_in_sweep() -> bool:
    """Whether this is one of the jobs of a sweep (-m)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def typed_overrides() -> list[str]:
    """The overrides of the command line; in a sweep those of this job."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
