"""Two processes do what one does: the same samples, gradients and scores, one writer; also with sharded weights."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from common.files import ROOT
from common.results import result_of
from tests.helpers import run_in_processes, run_stage

FORGET_ROWS_PER_STEP = 10
SCRIPT = ROOT / "tests" / "sharded_stage.py"
ZERO2 = ("+sharding=zero2", "training.deepspeed.torch_autocast.enabled=false")
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed (requirements-deepspeed.txt)"
)
QUICK = ("evaluation.every_epochs=0", "evaluation.start=false")


def start(processes, stage, words, **env):
    """Run a stage's command in this many processes; returns the finished (first) process with its output as text."""
    if processes == 1:
        return run_stage(stage, *words, check=False)
    return run_in_processes(SCRIPT, [stage, *words], processes, DS_ACCELERATOR="cpu", **env)


def torchrun(stage, words, **env):
    """Run a stage's command in two processes with torchrun, which ends both when one is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([*command, stage, *words], capture_output=True, text=True, timeout=300, env=environment)


def unlearning_words(processes, folder, models_dir, *overrides):
    batch_size = FORGET_ROWS_PER_STEP // processes
    where = (f"models_dir={models_dir}", f"output_dir={folder}", f"training.per_device_train_batch_size={batch_size}")
    return (*overrides, *where, "training.num_epochs=3")


def run(processes, folder, models_dir, *overrides):
    done = start(processes, "unlearning", unlearning_words(processes, folder, models_dir, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    return history(folder)


def history(folder):
    """The rows of history.jsonl without times."""
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def assert_equal_histories(ones, others, tolerance=1e-5):
    for one, other in zip(ones, others, strict=True):
        assert one == {name: pytest.approx(value, rel=tolerance, abs=tolerance) for name, value in other.items()}


def assert_equal_weights(*folders):
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys()  # no second copy of a tied weight
    # The mean: AdamW turns the rounding of a gradient near 0 into a larger step of a single weight.
    assert all((one[name] - other[name]).abs().mean() < 1e-6 for name in one)


@pytest.mark.parametrize(
    "options",
    [
        ["-cn=PMC-unlearn-tiny"],
        ["-cn=PMC-relabeling-tiny"],
        ["-cn=PMC-contrast-tiny", "model.lora={r:8,alpha:16,merge:true}", "method.stalled_temperature_factor=1.2"],
    ],
)
def test_two_processes_draw_remember_and_weigh_as_one_does(options, models_dir, tmp_path):
    """Three epochs: a shuffled question goes from one process to the other, and its pick with it."""
    words = (*options, "training.learning_rate=1e-9", *QUICK)
    assert_equal_histories(*(run(n, tmp_path / str(n), models_dir, *words) for n in (1, 2)))
    assert_equal_weights(tmp_path / "1", tmp_path / "2")


def test_two_processes_compare_with_the_model_before_unlearning_as_one_does(models_dir, tmp_path):
    """The second process alone gets a signal in the middle of an epoch: both stop, and the same command continues."""
    words = ("-cn=unlearn-tiny", "method=dpo", "training.learning_rate=1e-4", *QUICK)
    two = unlearning_words(2, tmp_path / "2", models_dir, *words)
    stopped = start(2, "unlearning", two, SIGNAL=f"{int(signal.SIGTERM)}@4")
    assert "stopped by signal 15 after step 4 of 9" in stopped.stdout, stopped.stdout + stopped.stderr
    assert_equal_histories(*(run(n, tmp_path / str(n), models_dir, *words) for n in (1, 2)), tolerance=1e-3)


def test_sharded_weights_train_as_whole_ones_and_survive_a_kill(models_dir, tmp_path):
    """PMC with FSDP2: samples, labels, scores during and after training, saved weights. One process alone is killed."""
    words = ("-cn=PMC-unlearn-tiny", "method.relabeling_weight=0.5", "evaluation.every_epochs=2")
    one, two = tmp_path / "1", tmp_path / "2"
    expected = run(1, one, models_dir, *words)
    sharded = unlearning_words(2, two, models_dir, *words, "+sharding=fsdp")
    started = time.monotonic()
    killed = torchrun("unlearning", sharded, SIGNAL=f"{int(signal.SIGKILL)}@4")
    assert killed.returncode != 0
    assert time.monotonic() - started < 60
    assert "Signal 9 (SIGKILL)" in killed.stderr
    assert_equal_histories(expected, run(2, two, models_dir, *words, "+sharding=fsdp"))
    assert (one / "generations.jsonl").read_text() == (two / "generations.jsonl").read_text()
    assert_equal_weights(one, two)


def test_two_processes_evaluate_as_one_does(models_dir, tmp_path):
    """Quantized copies, and a copy that is finetuned; its weights are sharded, as accelerate's environment says."""
    words = ["-cn=evaluate", f"models_dir={models_dir}", f"model.path={models_dir}/finetuned/tiny/seed-0"]
    words += ["metrics=[quantization,relearning]", "relearning.batch_size=10", "relearning.learning_rate=1e-3"]
    sharding = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    values = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = start(processes, "evaluation", [*words, f"output_dir={folder}"], **(sharding if processes > 1 else {}))
        assert done.returncode == 0, done.stdout + done.stderr
        scores = result_of(folder)["scores"]
        values.append({name: value for name, value in scores.items() if value is not None})
    assert "relearning/rougeL_recall" in values[0]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_with_sharded_weights_the_reference_model_is_a_second_one(models_dir, tmp_path):
    """RMU finds its layer in both; only LoRA adapters are trained."""
    words = ("-cn=unlearn-tiny", "method=rmu", "model.lora={r:8,alpha:16}", "training.learning_rate=1e-2", *QUICK)
    expected = run(1, tmp_path / "1", models_dir, *words)
    assert_equal_histories(expected, run(2, tmp_path / "2", models_dir, *words, "+sharding=fsdp"))


@needs_deepspeed
def test_zero2_trains_as_one_process_and_resumes(models_dir, tmp_path):
    """PMC: samples, scores, saved weights; the second process alone gets a signal, and the same command continues."""
    words = ("-cn=PMC-unlearn-tiny", "evaluation.every_epochs=2")
    one, two = tmp_path / "1", tmp_path / "2"
    stopped = start(
        2, "unlearning", unlearning_words(2, two, models_dir, *words, *ZERO2), SIGNAL=f"{int(signal.SIGTERM)}@4"
    )
    assert "stopped by signal 15 after step 4 of 9" in stopped.stdout, stopped.stdout + stopped.stderr
    assert_equal_histories(run(1, one, models_dir, *words), run(2, two, models_dir, *words, *ZERO2))
    assert (one / "generations.jsonl").read_text() == (two / "generations.jsonl").read_text()
    assert_equal_weights(one, two)


@needs_deepspeed
@pytest.mark.parametrize("words", [("method=npo",), ("method=rmu", "model.lora={r:8,alpha:16}")])
def test_zero2_compares_with_the_model_before_unlearning_as_one_process_does(words, models_dir, tmp_path):
    words = ("-cn=unlearn-tiny", *words, "training.learning_rate=1e-4", *QUICK)
    expected = run(1, tmp_path / "1", models_dir, *words)
    assert_equal_histories(expected, run(2, tmp_path / "2", models_dir, *words, *ZERO2))
    if "method=npo" in words:
        assert_equal_weights(tmp_path / "1", tmp_path / "2")


@needs_deepspeed
def test_zero2_finetunes_as_one_process_does(models_dir, tmp_path):
    """With accumulated gradients, which DeepSpeed sums up itself."""
    words = ("-cn=tiny", f"models_dir={models_dir}", "training.num_epochs=1", "training.gradient_accumulation_steps=2")
    for processes, sharding in ((1, ()), (2, ZERO2)):
        where = (f"output_dir={tmp_path}/{processes}", f"training.per_device_train_batch_size={8 // processes}")
        done = start(processes, "finetuning", [*words, *where, *QUICK, *sharding])
        assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_histories(history(tmp_path / "1"), history(tmp_path / "2"))
    assert_equal_weights(tmp_path / "1", tmp_path / "2")


@needs_deepspeed
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.deepspeed.zero_optimization.stage=3", "+sharding=fsdp does that job"),
        ("training.bf16=true", "training.bf16=true: DeepSpeed would store the weights in 16 bits"),
    ],
)
def test_settings_of_deepspeed_that_cannot_work_are_refused(override, message, models_dir, tmp_path):
    words = unlearning_words(2, tmp_path, models_dir, "-cn=PMC-unlearn-tiny", "+sharding=zero2", override)
    done = start(2, "unlearning", words)
    assert done.returncode != 0
    assert message in done.stderr, done.stdout + done.stderr
