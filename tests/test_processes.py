"""Two processes do what one does: the same samples, the same gradient, one writer."""

import json
import os
import subprocess
import sys

import pytest

from common.files import ROOT


def run(processes, folder, models_dir, *overrides):
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes > 1 else []
    )
    command = [sys.executable, *launcher, str(ROOT / "unlearning" / "main.py"), *overrides]
    command += [f"models_dir={models_dir}", f"output_dir={folder}", "training.num_epochs=3"]
    command += [f"training.per_device_train_batch_size={10 // processes}"]
    command += ["evaluation.every_epochs=0", "evaluation.start=false", "save_model=false"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def test_two_processes_draw_remember_and_weigh_as_one_does(models_dir, tmp_path):
    """Three epochs: a shuffled question goes from one process to the other, and its pick with it."""
    words = ("-cn=PMC-unlearn-tiny", "training.learning_rate=1e-9")
    for one, two in zip(*(run(n, tmp_path / str(n), models_dir, *words) for n in (1, 2)), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert abs(two[name] - value) <= 1e-5 * max(1.0, abs(value)), name


def test_two_processes_compare_with_the_model_before_unlearning_as_one_does(models_dir, tmp_path):
    words = ("-cn=unlearn-tiny", "method=dpo", "training.learning_rate=1e-4")
    for one, two in zip(*(run(n, tmp_path / str(n), models_dir, *words) for n in (1, 2)), strict=True):
        assert one == {name: pytest.approx(value, rel=1e-3, abs=1e-3) for name, value in two.items()}
