"""The command lines as a user types them, each in a process of its own, on the tiny model."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import ROOT
from tests.helpers import run_imported, run_stage, wait_for

QUICK = ["-cn=PMC-unlearn-tiny", "training.num_epochs=2", "method.num_samples=2", "evaluation.every_epochs=0"]


def read(path):
    return json.loads(path.read_text())


def history(folder):
    """A run's history without the times."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def unlearned(models_dir):
    """One short PMC run from the root, with its output."""
    done = run_stage("unlearning", "-cd=configs", *QUICK, f"models_dir={models_dir}")
    (folder,) = (models_dir / "unlearned" / "PMC-unlearn-tiny").glob("seed-0+*")
    return folder, done


def test_a_run_leaves_result_generations_history_report_and_model(unlearned):
    folder, done = unlearned
    result = read(folder / "result.json")
    scores = result["scores"]
    recall = {name: scores[f"rougeL_recall/{name}"] for name in ("forget", "forget_paraphrased", "retain")}
    assert scores["unlearn_quality"] == pytest.approx(50 * (2 - recall["forget"] - recall["forget_paraphrased"]))
    assert set(result["seconds"]) >= {"unlearning", "sampling", "training", "evaluation"}
    assert result["higher_is_better"]["utility"] is True
    of_split = {name.removeprefix("rougeL_recall/"): n for name, n in result["counts"].items() if "/" in name}
    assert of_split == {"forget": 30, "forget_paraphrased": 30, "retain": 130, "real_authors": 40, "world_facts": 40}
    assert result["config"]["method"]["num_samples"] == 2
    assert result["versions"]["torch"] and result["git_commit"] and result["device"] and result["peak_memory_bytes"] > 0
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == sum(of_split.values())
    assert len(history(folder)) == 2
    assert not (folder / "in_progress").exists() and not list(folder.glob("checkpoint-*"))
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt")), "safetensors only"
    for model in ("vanilla", "finetuned", "PMC"):
        assert f"| {model} |" in done.stdout
    assert f"Report: {folder / 'report.html'}" in done.stdout and (folder / "report.html").is_file()
    assert "collapse loss" in done.stdout and "seconds sampling" in done.stdout


def test_the_model_loads_with_nothing_of_ours(unlearned, tmp_path):
    folder, _ = unlearned
    code = (
        "import sys; sys.path = [p for p in sys.path if 'editable' not in p]\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "ids = tokenizer('Question: Who wrote Hamlet?\\nAnswer:', return_tensors='pt')\n"
        "out = model.generate(input_ids=ids['input_ids'], max_new_tokens=5, do_sample=False)\n"
        "print(model.generation_config.eos_token_id == tokenizer.eos_token_id, out.shape[1] > 0)\n"
        "assert 'common' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True"


def test_the_same_command_from_the_stage_folder_finds_the_result(unlearned, models_dir):
    folder, _ = unlearned
    before = (folder / "result.json").read_bytes()
    done = run_stage("unlearning", "-cd=configs", *QUICK, f"models_dir={models_dir}", cwd=ROOT / "unlearning")
    assert "the result already exists" in done.stdout
    assert (folder / "result.json").read_bytes() == before


def test_evaluation_of_the_checkpoint_gives_the_run_s_own_scores(unlearned, models_dir):
    folder, _ = unlearned
    run_stage(
        "evaluation",
        "-cd=configs",
        "-cn=evaluate",
        f"model.path='{folder}'",
        f"models_dir={models_dir}",
        cwd=ROOT / "evaluation",
    )
    (evaluated,) = (models_dir / "evaluated" / "evaluate").iterdir()
    assert read(evaluated / "result.json")["scores"] == pytest.approx(read(folder / "result.json")["scores"])


def test_a_sweep_gives_every_combination_a_folder_and_survives_a_failed_job(models_dir):
    done = run_stage(
        "unlearning",
        "-m",
        "-cd=configs",
        "-cn=PMC-unlearn-tiny",
        f"models_dir={models_dir}",
        "training.num_epochs=1",
        "evaluation.every_epochs=0",
        "save_model=false",
        "method.temperature=0,1.25",
        "method.num_samples=1,2",
        check=False,
        cwd=ROOT / "unlearning",
    )
    folders = sorted((models_dir / "unlearned" / "PMC-unlearn-tiny").glob("*method.temperature*"))
    settings = [
        (
            read(folder / "result.json")["config"]["method"]["temperature"],
            read(folder / "result.json")["config"]["method"]["num_samples"],
        )
        for folder in folders
        if (folder / "result.json").exists()
    ]
    assert sorted(settings) == [(0, 1), (1.25, 1), (1.25, 2)]
    assert all(folder.name.startswith("seed-0+") for folder in folders)
    names = [re.findall(r"(?:temperature|num_samples)-[\d.]+", folder.name) for folder in folders]
    expected = [[f"num_samples-{n}", f"temperature-{t}"] for n in (1, 2) for t in ("0", "1.25")]
    assert [name for name in expected if name not in names] in ([], [["num_samples-2", "temperature-0"]])
    assert not list(folders[0].glob("*.safetensors")), "save_model=false"
    assert done.returncode != 0
    assert "method.temperature=0" in done.stdout + done.stderr and "this job failed, the sweep continues" in done.stdout
    assert "job 1 of 4: " in done.stdout and "job 4 of 4, time left " in done.stdout
    report = done.stdout.partition("3 of 4 runs are finished.")[2]
    assert re.search(r"- seed-0.*method.temperature-0.*: failed: .*method.temperature", report)
    page = Path(re.search(r"^Report: (.*)$", report, re.MULTILINE)[1])
    assert page.is_relative_to(models_dir / "sweeps" / "PMC-unlearn-tiny") and page.is_file()
    rows = list(csv.DictReader((page.parent / "results.csv").open()))
    assert [row["status"] for row in rows if row["reference"] == "False"].count("done") == 3
    again = run_stage(
        "unlearning", *[word.replace("=0,1.25", "=1.25") for word in done.args[2:]], cwd=ROOT / "unlearning"
    )
    assert again.stdout.count("the result already exists") == 2
    assert "2 of 2 runs are finished." in again.stdout and ": failed: " not in again.stdout


def words_of(folder, models_dir):
    """A run in the folder that saves a checkpoint every three steps."""
    words = ["-cn=PMC-unlearn-tiny", f"models_dir={models_dir}", f"output_dir={folder}", "save_model=false"]
    words += ["training.num_epochs=5", "training.per_device_train_batch_size=8", "training.save_strategy=steps"]
    return [*words, "training.save_steps=3", "evaluation.every_epochs=4", "evaluation.start=false"]


def start(folder, models_dir):
    command = [sys.executable, str(ROOT / "unlearning" / "main.py"), *words_of(folder, models_dir)]
    # OMP_NUM_THREADS: bit-equal sums need the same number of threads
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_continues_to_the_same_end(models_dir, tmp_path_factory, number):
    whole = models_dir / "uninterrupted"
    if not whole.exists():
        run_stage("unlearning", *words_of(whole, models_dir))
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = start(folder, models_dir)
    wait_for(process, "epoch 3 ")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), output
    assert not (folder / "result.json").exists()
    if number != signal.SIGKILL:
        assert "the same command continues from there" in output

    again = run_stage("unlearning", *words_of(folder, models_dir))
    assert "continuing from" in again.stdout
    assert history(folder) == history(whole)
    scores = [read(run / "result.json")["scores"] for run in (folder, whole)]
    assert scores[0] == scores[1]


def test_a_second_command_in_the_same_folder_is_refused(models_dir, tmp_path):
    process = start(tmp_path / "run", models_dir)
    try:
        wait_for(process, "epoch 1 ")
        process.send_signal(signal.SIGSTOP)  # it must not end while the second one starts
        second = run_stage("unlearning", *words_of(tmp_path / "run", models_dir), check=False)
        output = second.stdout + second.stderr
        assert second.returncode == 1 and "Traceback" not in output
        assert f"another command is using this folder (host {socket.gethostname()}, pid {process.pid}, since" in output
        assert "epoch 1 " not in output
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        (
            "unlearning",
            ["-cn=PMC-unlearn-tiny", "method.num_sample=3"],
            ["method.num_sample", "did you mean 'method.num_samples'"],
        ),
        ("finetuning", ["-cn=PMC-unlearn-tiny"], ["PMC-unlearn-tiny", "the key method", "use unlearning/main.py"]),
        ("finetuning", ["-cn=evaluate"], ["recipe evaluate", "the key metrics", "use evaluation/main.py"]),
        ("unlearning", ["-cn=tiny"], ["recipe tiny", "neither the key", "use finetuning/main.py"]),
        ("unlearning", ["-cn=benchmark/tiny"], ["recipe benchmark/tiny", "use benchmarks/step.py"]),
        ("evaluation", ["-cn=PMC-unlearn-tiny"], ["PMC-unlearn-tiny", "use unlearning/main.py"]),
        ("evaluation", ["-cn=compare/tiny"], ["recipe compare/tiny", "use scripts/compare_methods.py"]),
        (
            "unlearning",
            ["-cn=PMC-unlearn-tny"],
            ["-cn=PMC-unlearn-tny: no such recipe; did you mean 'PMC-unlearn-tiny'?"],
        ),
        (
            "unlearning",
            ["-cn=PMC-unlearn-tiny", "method.num_samples=0", "method.top_p=2", "+training.lerning_rate=1"],
            ["3 problems", "method.num_samples=0", "method.top_p=2", "learning_rate"],
        ),
        (
            "unlearning",
            ["-cn=PMC-unlearn-tiny", "seed=7"],
            ["no such folder", "python finetuning/main.py", "-cn=tiny seed=7", "there: seed-0"],
        ),
        ("unlearning", ["-cn=PMC-unlearn-tiny", "data.path=data"], ["data.path=./data/tiny there, data here"]),
        (
            "unlearning",
            ["-cn=PMC-unlearn-tiny", "method._target_=unlearning.pmc.PCM"],
            ["unlearning.pmc.PCM", "no such class"],
        ),
        (
            "unlearning",
            ["-cn=PMC-unlearn-tiny", "method.reward._target_=a.b"],
            ["method.reward={'_target_': 'a.b'}: no such function (No module named"],
        ),
        ("unlearning", ["-cn=PMC-unlearn-tiny", "data.splits.forget=forgot"], ["forgot", "did you mean 'forget'"]),
        ("unlearning", ["-cn=PMC-unlearn-tiny", "method.max_length=10"], ["method.max_length=10", "longest prompt"]),
        ("finetuning", ["-cn=tiny", "data.path=./nowhere"], ["data.path=./nowhere", "no such folder"]),
        ("finetuning", ["-cn=tiny", "model.path=configs"], ["not a checkpoint", "safetensors"]),
        ("evaluation", ["-cn=evaluate"], ["model.path"]),
        ("evaluation", ["-cn=evaluate", "model.path=configs"], ["no result.json", "model=phi data=tofu"]),
    ],
)
def test_wrong_input_is_named_without_a_traceback(models_dir, stage, overrides, expected):
    done = run_stage(stage, *overrides, f"models_dir={models_dir}", check=False)
    assert done.returncode not in (0, 130), done.stdout
    for text in expected:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "Error getting" not in done.stdout + done.stderr, "Hydra's own message"


def test_no_token_is_written_or_printed(models_dir, tmp_path):
    secret = "hf_thisIsASecretValue"
    done = run_stage(
        "unlearning",
        *QUICK,
        "training.num_epochs=1",
        f"models_dir={models_dir}",
        f"output_dir={tmp_path}/run",
        HUGGINGFACE_LOGIN_TOKEN=secret,
        WANDB_API_KEY=secret,
        HF_HOME=str(tmp_path / "hf"),
    )
    assert secret not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_lora_in_both_stages(models_dir, tmp_path):
    lora = "model.lora={r:4,alpha:8}"
    where = f"models_dir={models_dir}"
    run_stage("finetuning", "-cn=tiny", where, lora, "training.num_epochs=1", f"output_dir={tmp_path}/finetuned")
    saved = {path.name for path in (tmp_path / "finetuned").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    run_stage(
        "unlearning",
        *QUICK,
        where,
        lora,
        f"finetuned='{tmp_path}/finetuned'",
        f"output_dir={tmp_path}/run",
        "training.num_epochs=1",
    )
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    run_stage(
        "unlearning",
        *QUICK,
        where,
        "model.lora={r:4,alpha:8,merge:true}",
        f"finetuned='{tmp_path}/finetuned'",
        f"output_dir={tmp_path}/merged",
        "training.num_epochs=1",
    )
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_changed_configuration_redoes_the_run_and_keeps_the_old_figures(models_dir, tmp_path):
    common = [
        *QUICK,
        f"models_dir={models_dir}",
        f"output_dir={tmp_path}/run",
        "save_model=false",
        "training.num_epochs=1",
    ]
    run_stage("unlearning", *common)
    first = read(tmp_path / "run" / "result.json")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = run_stage("unlearning", *common, "method.lambda_unlearning=0.5")
    assert re.search(r"method.lambda_unlearning: [\d.]+ -> 0.5", done.stdout)
    assert read(tmp_path / "run" / "result.json")["config"]["method"]["lambda_unlearning"] == 0.5
    (previous,) = (tmp_path / "run" / "previous").iterdir()
    assert read(previous / "result.json") == first
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    time.sleep(1)  # previous/ is named by the second
    done = run_stage("unlearning", *common, "method.lambda_unlearning=0.5", "overwrite=true")
    assert "the result already exists" not in done.stdout


def test_a_real_run_is_timed_by_both_trainers(models_dir, tmp_path):
    """Both start from the finetuned model and train it; the baseline is the same algorithm."""
    script = ROOT / "benchmarks" / "step.py"
    words = [f"models_dir={tmp_path}", f"finetuned={models_dir}/finetuned/tiny/seed-0", "benchmark.steps=2"]
    few = [f"data.splits.{role}=null" for role in ("forget_paraphrased", "real_authors", "world_facts")]
    few.append("data.splits.retain='retain[:20]'")
    (done,) = run_imported(script, [str(script), "-cn=benchmark/tiny-run", *words, *few])
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "benchmarks" / "tiny-run.json").read_text())
    recall = result["mean_recall"]
    assert recall["optimized"] == pytest.approx(recall["baseline"], abs=0.03), (
        "two steps from the same model, answers scored alike"
    )
    assert "limit" not in result, "what a real step needs is not counted"
    for figures in result["trainers"].values():
        assert 0 < figures["seconds_evaluation_answers"] < figures["seconds_evaluation"]
