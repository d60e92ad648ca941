"""The device: its name, peak memory and bfloat16 support, and the number of CPU threads."""

import contextlib
import logging
import os
import platform
import resource
from collections.abc import Iterator
from functools import cache
from timeit import timeit

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from common.errors import UserError
from common.files import is_first_process

log = logging.getLogger(__name__)
TINY = 2_000_000  # a model with fewer parameters runs on one CPU thread


def settle_processes(one_only: bool = False) -> None:
    """Settle the device and the number of processes, before a library does.

    Without this, the processes of a launcher on a machine without an accelerator would be independent runs.

    Args:
        one_only: whether this program runs in one process only.
    Raises:
        UserError: if a launcher started several processes, and the program cannot use them.
    """
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if not world_size.isdecimal():
        raise UserError(f"WORLD_SIZE={world_size}: expected the number of processes; unset it")
    processes = int(world_size)
    if processes > 1 and one_only:
        raise UserError(
            f"WORLD_SIZE={processes}: this program runs in one process; start it with python, without a launcher"
        )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if processes > 1 and (missing or PartialState(cpu=not torch.accelerator.is_available()).num_processes != processes):
        raise UserError(
            f"WORLD_SIZE={processes}: {processes} processes are announced, but they do not find each other (missing: "
            f"{', '.join(missing) or 'none'}); start them with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    if not is_first_process():
        logging.disable(logging.INFO)  # the first process logs the same


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


@cache
def has_fast_bf16() -> bool:
    """Whether bfloat16 is supported (GPUs since Ampere; CPUs with AVX512-BF16 or AMX) and on a CPU also faster.

    A matmul is timed on the CPU: with AVX512-BF16, some CPUs are twice as fast as in float32, others half as fast. The first
    process decides for all.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ratio = 0.0
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        seconds = matmul_seconds(torch.float32, torch.bfloat16)
        ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    decision = [ratio > 1]
    if PartialState().num_processes > 1:
        broadcast_object_list(decision)  # all processes come here, whatever their CPUs support
    if ratio:
        log.info("bfloat16 products are %.2g times as fast as float32 on this CPU: bf16=auto is %s", ratio, decision[0])
    return decision[0]


def matmul_seconds(*dtypes: torch.dtype) -> dict[torch.dtype, float]:
    """Seconds of a CPU matmul per dtype, the minimum of ten. Dtypes alternate, so that other load slows all of them."""
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in dtypes}
    linear = torch.nn.functional.linear
    rounds = [
        {dtype: timeit(lambda matrix=matrix: linear(matrix, matrix), number=1) for dtype, matrix in matrices.items()}
        for _ in range(10)
    ]
    return {dtype: min(seconds[dtype] for seconds in rounds) for dtype in dtypes}


def peak_memory_bytes() -> int:
    """Peak memory of the GPU, or of this process if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def suitable_threads(model: torch.nn.Module) -> Iterator[None]:
    """A context in which a tiny model runs on one CPU thread, unless OMP_NUM_THREADS is set.

    Its operations take microseconds, and all threads synchronize after each one. On busy cores this waiting takes ten
    times as long as the computation.
    """
    before = torch.get_num_threads()
    parameters = list(model.parameters())
    tiny = sum(parameter.numel() for parameter in parameters) < TINY and parameters[0].device.type == "cpu"
    if tiny and before > 1 and "OMP_NUM_THREADS" not in os.environ:
        log_once("this small model runs on one CPU thread; OMP_NUM_THREADS sets another number")
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def log_once(message: str) -> None:
    log.info(message)
