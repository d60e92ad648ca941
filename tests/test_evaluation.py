"""The evaluation stage: what is chosen, what is compared to what, what is done once, and the same on two processes."""

import json
import os
import subprocess
import sys

import pytest

from common.runtime import ROOT, UserError
from evaluation.suite import FAMILIES, chosen
from tests.conftest import run_stage

QUICK = ["-cd=configs", "sampling.num_samples=4", "relearning.learning_rate=1e-3"]


def read(path):
    return json.loads(path.read_text())


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_headline_is_always_measured_and_first():
    assert chosen("headline") == ["headline"]
    assert chosen(["privacy", "memorisation"]) == ["headline", "memorisation", "privacy"]
    assert chosen("tofu") == ["headline", "tofu"]


def test_groups():
    assert chosen("full") == [name for name in FAMILIES if name != "lm_eval"]
    assert chosen(["full", "lm_eval"]) == list(FAMILIES)
    assert set(chosen("attacks")) == {
        *("headline", "sampling", "prefill", "target_suppression", "quantisation", "relearning")
    }


def test_a_mistyped_family_is_refused_with_the_closest():
    with pytest.raises(UserError, match="metrics=privcy: no such metrics; did you mean 'privacy'"):
        chosen(["tofu", "privcy"])


# --- the stage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(models_dir):
    """The vanilla model, and the finetuned one taken for the retain-only model, too; with the output."""
    vanilla, finetuned = (models_dir / "finetuned" / name / "seed-0" for name in ("pretrain-tiny", "tiny"))
    command = ["-cn=evaluate", *QUICK, "metrics=full", f"models={{vanilla:{vanilla},finetuned:{finetuned}}}"]
    command += [f"retain_model.path={finetuned}", f"base_model.path={finetuned}", f"models_dir={models_dir}"]
    done = run_stage("evaluation", *command, f"output_dir={models_dir}/side-by-side")
    folders = {
        name: next((models_dir / "side-by-side").glob(f"*model.path*{path}-seed*"))
        for name, path in (("vanilla", "pretrain-tiny"), ("finetuned", "finetuned-tiny"))
    }
    return {name: read(folder / "result.json") for name, folder in folders.items()}, folders, done, command


def test_a_model_against_itself(evaluated):
    scores = evaluated[0]["finetuned"]["scores"]
    assert scores["tofu/forget_quality"] == 1.0
    assert scores["privacy/privleak"] == 0.0
    assert scores["privacy/auc/reference"] == 0.5
    assert scores["side_effects/probability_shift"] == scores["side_effects/probability_shift_deviation"] == 0.0
    assert scores["relearning/rougeL_recall_beyond_retain_model"] == 0.0


def test_a_model_that_knows_and_one_that_does_not(evaluated):
    vanilla, finetuned = (evaluated[0][name]["scores"] for name in ("vanilla", "finetuned"))
    for name in ("memorisation/extraction_strength", "sampling/leak@4", "tofu/probability/forget", "privacy/auc/loss"):
        assert vanilla[name] < finetuned[name]
    assert vanilla["tofu/forget_quality"] < 0.5
    assert finetuned["memorisation/exact_memorisation"] > 0.9
    assert finetuned["privacy/auc/min_k"] > 0.9


def test_every_score_is_complete(evaluated):
    for result in evaluated[0].values():
        assert None not in result["scores"].values() and not result["notes"]
        assert result["higher_is_better"].keys() == result["scores"].keys()
        assert result["counts"]["tofu/probability/retain"] == 130
        assert result["seconds"]["evaluation"] >= sum(result["seconds"][name] for name in ("sampling", "privacy"))
        assert result["seconds"]["passes/samples"] > 0
        assert result["config"]["compared_to"]["retain_model"]["path"] == "models/finetuned/tiny/seed-0"
    names = evaluated[0]["vanilla"]["scores"]
    assert {name.split("/")[0] for name in names if "/" in name} >= set(FAMILIES) - {"headline", "lm_eval"}


def test_values_of_single_rows_are_kept(evaluated):
    folder = evaluated[1]["vanilla"]
    rows = {row["name"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}
    scores = evaluated[0]["vanilla"]["scores"]
    for name in ("memorisation/exact_memorisation", "tofu/truth_ratio/world_facts", "sampling/leak@2"):
        assert sum(rows[name]["values"]) / len(rows[name]["values"]) == pytest.approx(scores[name])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [len(row["samples"]) for row in samples] == [4] * 30
    splits = {json.loads(line)["split"] for line in (folder / "generations.jsonl").read_text().splitlines()}
    assert splits == {"forget", "forget_paraphrased", "retain", "real_authors", "world_facts", "forget_prefill"}


def test_the_models_stand_side_by_side(evaluated, models_dir):
    _, _, done, _ = evaluated
    report = (models_dir / "side-by-side" / "report.md").read_text()
    assert "| score | better | vanilla | finetuned |" in report and "| score | better |" in done.stdout
    assert "| tofu/forget_quality | higher | " in report and "| privacy/privleak | 0 | " in report


def test_what_was_measured_is_not_measured_again(evaluated, models_dir):
    _, folders, _, command = evaluated
    before = {name: (folder / "result.json").read_bytes() for name, folder in folders.items()}
    done = run_stage("evaluation", *command, f"output_dir={models_dir}/side-by-side")
    assert done.stdout.count("the result is there already") == 2
    assert {name: (folder / "result.json").read_bytes() for name, folder in folders.items()} == before


def test_nothing_is_written_into_the_checkpoints(evaluated, models_dir):
    for name in ("pretrain-tiny", "tiny"):
        result = read(models_dir / "finetuned" / name / "seed-0" / "result.json")
        assert set(result["scores"]) < set(evaluated[0]["vanilla"]["scores"])


def test_without_a_retain_only_model_what_needs_it_is_null_and_the_base_model_is_found(models_dir):
    finetuned = models_dir / "finetuned" / "tiny" / "seed-0"
    run_stage(
        *("evaluation", "-cn=evaluate", *QUICK, "metrics=[tofu,privacy,fluency]", f"model.path={finetuned}"),
        *(f"models_dir={models_dir}", f"output_dir={models_dir}/alone", "++data.splits.retain_perturbed=null"),
    )
    result = read(models_dir / "alone" / "result.json")
    scores, notes = result["scores"], result["notes"]
    assert scores["tofu/forget_quality"] is None and "retain_model.path" in notes["tofu/forget_quality"]
    assert scores["privacy/privleak"] is not None and "AUC of 0.5" in notes["privacy/privleak"]
    assert scores["tofu/truth_ratio/retain"] is None and "retain_perturbed" in notes["tofu/truth_ratio/retain"]
    assert scores["tofu/model_utility"] is None and "tofu/truth_ratio/retain" in notes["tofu/model_utility"]
    # The run that made the checkpoint says what it started from.
    assert scores["fluency/perplexity"] > 1 and scores["privacy/auc/reference"] > 0.9
    assert result["config"]["compared_to"]["base_model"]["path"] == "models/finetuned/pretrain-tiny/seed-0"
    assert "sampling/leak@1" not in scores


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["metrics=privcy"], ["metrics=privcy", "did you mean 'privacy'"]),
        (["retain_model.path=./nowhere"], ["./nowhere", "no such folder"]),
        (["models=[]"], ["models=[]: expected a list"]),
        (["models=[./a]"], ["models names the models already"]),
        (["metrics=lm_eval"], ["lm_eval"]),
        (["sampling.num_sample=3"], ["no key 'sampling.num_sample'", "did you mean 'sampling.num_samples'"]),
    ],
)
def test_wrong_input_is_named(models_dir, overrides, expected):
    one = [] if overrides == ["models=[]"] else [f"model.path={models_dir}/finetuned/tiny/seed-0"]
    done = run_stage("evaluation", "-cn=evaluate", *one, *overrides, f"models_dir={models_dir}", check=False)
    assert done.returncode not in (0, 130), done.stdout
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr


def test_two_processes_find_what_one_finds(models_dir, tmp_path):
    def result(processes):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "evaluation" / "main.py")]
        command += ["-cn=evaluate", "metrics=full", "sampling.num_samples=2", f"models_dir={models_dir}"]
        command += ["quantisation.bits=[4]", f"output_dir={tmp_path}/{processes}"]
        command += [f"{name}.path={models_dir}/finetuned/tiny/seed-0" for name in ("model", "retain_model")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return read(tmp_path / str(processes) / "result.json")

    one, two = result(1), result(2)
    assert one["scores"] == pytest.approx(two["scores"], rel=1e-4, abs=1e-5)
    for key in ("counts", "left_out", "higher_is_better"):
        assert one[key] == two[key]
    for name in ("samples.jsonl", "generations.jsonl"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text()
