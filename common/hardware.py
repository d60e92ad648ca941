"""The device: its name, memory and number types, and the number of CPU threads."""

import contextlib
import logging
import math
import os
import platform
import resource
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
TINY = 2_000_000  # parameters below which a model runs on one CPU thread


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


@cache
def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 natively (a GPU since Ampere; a CPU with AVX512-BF16 or AMX) and sooner.

    On a CPU one matmul per dtype is timed: AVX512-BF16 is twice as fast as float32 on one, half as fast on another.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    seconds = seconds_of_a_product(torch.float32, torch.bfloat16)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    log.info("bfloat16 products are %.2g times as fast as float32 on this CPU: bf16=auto is %s", ratio, ratio > 1)
    return ratio > 1


def seconds_of_a_product(*dtypes: "torch.dtype") -> dict["torch.dtype", float]:
    """Seconds of a matmul in each dtype on the CPU: the minimum of ten, interleaved."""
    import torch

    found = dict.fromkeys(dtypes, math.inf)
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in dtypes}
    for _ in range(10):
        for dtype, matrix in matrices.items():
            started = time.perf_counter()
            torch.nn.functional.linear(matrix, matrix)
            found[dtype] = min(found[dtype], time.perf_counter() - started)
    return found


def peak_memory_bytes() -> int:
    """Peak memory of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def suitable_threads(model: "torch.nn.Module") -> Iterator[None]:
    """Run a tiny model on one CPU thread inside the context.

    Its operations take microseconds, and all threads synchronize after each; on busy cores the wait is ten times the work.
    OMP_NUM_THREADS, where it is set, decides instead.
    """
    import torch

    before = torch.get_num_threads()
    parameters = list(model.parameters())
    tiny = sum(parameter.numel() for parameter in parameters) < TINY and parameters[0].device.type == "cpu"
    if tiny and before > 1 and "OMP_NUM_THREADS" not in os.environ:
        log_once("a model this small runs on one CPU thread; OMP_NUM_THREADS sets another number")
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def log_once(message: str) -> None:
    log.info(message)
