"""Runs a stage in the processes of a launcher on a CPU as on GPUs, so that FSDP2 shards weights. No test in itself.

    torchrun --nproc-per-node 2 tests/sharded_stage.py finetuning -cn=tiny +sharding=fsdp

Accelerate uses FSDP2 on GPUs only: here the processes are called those of another accelerator, and the rest is its own code,
with DTensors on the CPU. DeepSpeed (+sharding=zero2) runs on CPUs, with DS_ACCELERATOR=cpu; only its collectives in shared
memory, which it would compile for minutes, are left out, so that those of gloo are used. SIGNAL=NUMBER@PASS sends a signal to
the second process alone, in that forward pass of training.
"""

import importlib
import os
import runpy
import sys
from itertools import count
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

ROOT = Path(__file__).resolve().parent.parent
start, training_step, passes = PartialState.__init__, Trainer.training_step, count(1)


def start_as_gpus(state, *args, **kwargs):
    start(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU


def signaled_step(trainer, *args, **kwargs):
    number, _, at = os.environ["SIGNAL"].partition("@")
    if next(passes) == int(at):
        os.kill(os.getpid(), int(number))
    return training_step(trainer, *args, **kwargs)


if "+sharding=fsdp" in sys.argv or "ACCELERATE_USE_FSDP" in os.environ:
    PartialState.__init__ = start_as_gpus
if "+sharding=zero2" in sys.argv:
    # By import_module, as deepspeed.comm has an attribute of that name: torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
if "SIGNAL" in os.environ and os.environ["RANK"] == "1":
    Trainer.training_step = signaled_step
sys.argv[:2] = [str(ROOT / sys.argv[1] / "main.py")]
runpy.run_path(sys.argv[0], run_name="__main__")
