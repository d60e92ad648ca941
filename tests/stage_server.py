"""Runs stages' command lines in forks of one process that has imported their modules, which takes seconds: for run_stage.

python tests/stage_server.py     # reads a JSON object a line: script, argv, cwd, environ, and files for its output
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
for stage in ("finetuning", "unlearning", "evaluation"):
    importlib.import_module(f"{stage}.main")
importlib.import_module("common.config")._training_schema()  # built once a process, in a second
gc.freeze()  # keeps the modules out of the garbage collections of every fork, which take half a second with them


def next_command() -> dict:
    """The command that this process, a fork, is to run. The first process answers with the exit code of each command."""
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            return command
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


command = next_command()
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.alarm(300)  # ends a command that hangs
os.chdir(command["cwd"])
os.environ.clear()
os.environ.update(command["environ"])
for name, descriptor in (("stdout", 1), ("stderr", 2)):
    os.dup2(os.open(command[name], os.O_WRONLY), descriptor)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.argv = command["argv"]
runpy.run_path(command["script"], run_name="__main__")
