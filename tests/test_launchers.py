"""Sweeps whose jobs run in other processes: they end as a sweep in one process does; a job near its time limit is requeued."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from hydra import compose, initialize_config_dir

from common.checkpoints import StopSignals, last_complete_checkpoint
from common.files import CONFIGS, ROOT, read_json, write_json
from common.lock import LOCK
from common.sweep_signals import stop_jobs
from tests.helpers import run_stage

PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}


def needs(launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.{PLUGINS[launcher]}")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_a_sweep_in_other_processes_ends_as_one_in_this_process(launcher, tmp_path):
    needs(launcher)
    quick = ["training.max_steps=1", "evaluation.every_epochs=0", "evaluation.start=false", "save_model=false"]
    done = run_stage(
        "finetuning",
        "-m",
        "-cd=configs",
        "-cn=pretrain-tiny",
        f"hydra/launcher={launcher}",
        *quick,
        f"models_dir={tmp_path}",
        "training.learning_rate=1e-3,-1",
        check=False,
        **(
            {"RAY_DEDUP_LOGS": "0"} if launcher == "ray" else {}
        ),  # also starts a process of its own: Ray hangs in a fork
    )
    assert done.returncode != 0
    if launcher in ("joblib", "ray"):
        assert "job 1 of 2: " in done.stdout and "job 2 of 2: " in done.stdout
    elif launcher == "submitit_local":
        logs = [path.read_text() for path in (tmp_path / "sweeps" / ".submitit").rglob("*.out")]
        assert sorted(re.findall(r"job \d of \d", "".join(logs))) == ["job 1 of 2", "job 2 of 2"]
    report = done.stdout.partition("1 of 2 runs are finished.")[2]
    assert re.search(r"- seed-0.*learning_rate--1.*: failed: training.learning_rate=-1: expected float", report)
    runs = tmp_path / "finetuned" / "pretrain-tiny"
    (good,) = runs.glob("*/result.json")
    assert "training.learning_rate-0.001" in good.parent.name
    (failed,) = (runs / ".failed").iterdir()
    assert "training.learning_rate=-1" in read_json(failed)["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [("submitit_local", signal.SIGTERM)])
def test_a_signal_to_the_sweep_stops_the_jobs_with_a_checkpoint(launcher, number, models_dir, tmp_path):
    needs(launcher)
    words = ["-m", "-cn=PMC-unlearn-tiny", f"hydra/launcher={launcher}", f"models_dir={tmp_path}"]
    words += [
        f"finetuned={models_dir}/finetuned/tiny/seed-0",
        "seed=0,1",
        "save_model=false",
        "training.num_epochs=500",
    ]
    words += ["training.save_strategy=no", "evaluation.start=false", "evaluation.every_epochs=0"]
    if launcher == "joblib":
        words.append("hydra.launcher.n_jobs=2")
    command = [sys.executable, str(ROOT / "unlearning" / "main.py"), *words]
    sweep = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    runs = tmp_path / "unlearned" / "PMC-unlearn-tiny"
    for _ in range(600):
        if len(list(runs.glob("*/in_progress/run.json"))) == 2:
            break
        time.sleep(0.2)
    time.sleep(8)  # loading the model
    # Ctrl-C goes to all processes of the terminal, as here
    os.killpg(sweep.pid, number) if number == signal.SIGINT else sweep.send_signal(number)
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 128 + number, output
    assert "0 of 2 runs are finished." in output
    begun = list(runs.glob("*/in_progress"))
    assert begun and all(last_complete_checkpoint(folder) for folder in begun), output
    for _ in range(100):  # joblib's resource tracker ends when it sees that the others have
        left = [pid for pid in psutil.pids() if session_of(pid) == sweep.pid]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_the_slurm_launcher_is_submitit_s_with_our_settings():
    needs("submitit_local")
    with initialize_config_dir(str(CONFIGS), version_base=None):
        settings = compose("tiny", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert settings._target_.endswith(".SlurmLauncher")
    assert settings.max_num_timeout > 0 and 60 < settings.signal_delay_s < 60 * settings.timeout_min


def test_the_handler_that_requeues_a_job_is_called_only_after_the_checkpoint():
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.received == signal.SIGUSR2 and not calls
        stop.requeue()
        assert calls == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_other_signals_do_not_requeue():
    before = signal.signal(signal.SIGUSR2, lambda number, frame: pytest.fail("requeued"))
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.requeue()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_jobs_that_have_ended_and_were_not_waited_for_stop_nothing(tmp_path):
    ended = subprocess.Popen(["true"])
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    write_json(tmp_path / LOCK, {"pid": ended.pid})
    stop_jobs([tmp_path])  # without an end if the zombie counted as working
    ended.wait()
