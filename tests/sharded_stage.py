"""Runs a stage as its command does, with the processes of a launcher on a CPU taken for GPUs, so that FSDP2 shards weights.

    torchrun --nproc-per-node 2 tests/sharded_stage.py finetuning -cn=tiny training.fsdp=true

Accelerate shards on GPUs only. The weights are DTensors on the CPU here, and all else is its own path.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parent.parent
start = PartialState.__init__


def start_as_gpus(state, *args, **kwargs):
    start(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU


PartialState.__init__ = start_as_gpus
sys.argv[:2] = [str(ROOT / sys.argv[1] / "main.py")]
runpy.run_path(sys.argv[0], run_name="__main__")
