"""The benchmarks time what they say: both ways do the same work, and their figures add up. In a shape that takes seconds."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir

from benchmarks import step
from benchmarks.engines import ANSWER_LENGTH, engines
from benchmarks.synthetic import ANSWER_TOKENS, PROMPT_TOKENS, draw_lengths, rows, word_tokenizer
from benchmarks.worker import make_trainer, read, window_size
from common.files import CONFIGS, ROOT
from common.prompts import Example
from common.rouge import rouge_l_recall

SMALL = [
    "model.new.vocab_size=400",
    "model.new.settings={hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:4}",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.bf16=false",
    "method.num_samples=2",
]


def run(script: str, recipe: str, folder, *overrides: str):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / script),
        f"-cn={recipe}",
        *SMALL,
        f"models_dir={folder}",
        *overrides,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def config(*overrides: str):
    os.environ["PMC_ROOT"] = str(ROOT)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return read(compose("benchmark-tiny", [*SMALL, *overrides]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", [True, False])
def test_both_ways_are_timed_and_their_ratios_written(tmp_path, side_by_side):
    steps = [f"benchmark.side_by_side={side_by_side}", "benchmark.steps=2", "benchmark.evaluation_questions=6"]
    output = run("step.py", "benchmark-phi", tmp_path, *steps)
    result = json.loads((tmp_path / "benchmarks" / "benchmark-phi.json").read_text())
    plain, ours = result["ways"]["plain"], result["ways"]["ours"]
    for name, ratio in result["ratios"].items():
        higher_is_better = name.endswith("per_second")
        assert ratio == pytest.approx(ours[name] / plain[name] if higher_is_better else plain[name] / ours[name])
    for way in (plain, ours):
        assert way["seconds_sampling"] < way["seconds_step"]
        # The published run: 400 questions, 40 epochs, here in windows of 8.
        assert way["minutes_whole_run"] == pytest.approx(400 * 40 / 8 * way["seconds_step"] / 60)
    assert result["limit"]["step_over_limit"] > 1
    assert {"device", "versions", "config"} <= result.keys()
    assert "| seconds step |" in output
    assert "40 minutes" in output


def test_both_ways_draw_the_same_number_of_tokens(tmp_path):
    """And train on the same prompts."""
    settings = config()
    trainers = [make_trainer(way, settings, str(tmp_path), window_size(settings)) for way in ("plain", "ours")]
    for trainer in trainers:
        trainer.args.max_steps = 1
        trainer.train()
    plain, ours = trainers
    assert plain.sampled_tokens == ours.sampled_tokens > 8 * 2 * min(ANSWER_TOKENS)
    assert [row.question for row in plain.data.forget] == [row.question for row in ours.data.forget]
    assert 0.7 < plain.trained_tokens / ours.trained_tokens < 1.4  # each trains on picks of its own


def test_the_plain_way_computes_the_mean_loss_of_its_labels(tmp_path):
    settings = config()
    trainer = make_trainer("plain", settings, str(tmp_path), 8)
    example = Example([5, 6], [7, 8, 9])
    found = trainer.loss(trainer.model, [example])
    logits = trainer.model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    expected = -(logits[1, 7] + logits[2, 8] + logits[3, 9]) / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_plain_way_scores_an_answer_as_ours_does(tmp_path):
    trainer = make_trainer("plain", config(), str(tmp_path), 1)
    assert trainer.evaluation_recall("The cat sat on mats", "cats sat there") == rouge_l_recall(
        "The cat sat on mats", "cats sat there"
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step.py", "scaling.py", "engines.py"])
def test_a_run_starts_from_what_its_finetuning_recipe_writes(tmp_path, script):
    """Overrides of the data set name the folder, as in the unlearning stage."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "-cn=benchmark-smollm2-run", "data.path=mine"]
    done = subprocess.run([*command, f"models_dir={tmp_path}"], capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 1
    assert f"model.path={tmp_path}/finetuned/smollm2-cpu/seed-0+data.path-mine: no such folder" in done.stderr
    assert "make it with: python finetuning/main.py -cd=configs -cn=smollm2-cpu seed=0 data.path=mine" in done.stderr


def test_invented_rows_have_tofus_lengths():
    tokenizer = word_tokenizer(1000)
    some = rows(50, tokenizer, seed=0)
    prompts = [len(tokenizer(f"Question: {row.question} Answer:")["input_ids"]) for row in some]
    answers = [len(tokenizer(row.answer)["input_ids"]) + 1 for row in some]
    assert prompts == draw_lengths(PROMPT_TOKENS, 50, (0, 0))
    assert answers == draw_lengths(ANSWER_TOKENS, 50, (0, 1))
    assert len(tokenizer) == 1000
    assert sum(PROMPT_TOKENS.values()) == sum(ANSWER_TOKENS.values()) == 400


def test_the_flop_of_a_token_are_those_of_the_linear_layers():
    """Per layer 4 projections of 32 x 32 and 3 of 32 x 64; a head of 400 x 32; two for a multiplication and an addition."""
    body, head = step.flop_per_token(config())
    assert body == 2 * 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert head == 2 * 400 * 32


def test_the_flop_of_a_step_follow_its_tokens():
    settings = config()
    body, head = step.flop_per_token(settings)
    work = {"prompt_tokens": 10, "sampled_tokens": 7, "trained_tokens": 30, "label_tokens": 11}
    assert step.step_flop(work, settings) == (10 + 7) * body + 7 * head + 3 * (30 * body + 11 * head)


@pytest.mark.slow
def test_cost_curves(tmp_path):
    run("scaling.py", "benchmark-tiny", tmp_path, "training.per_device_train_batch_size=16")
    result = json.loads((tmp_path / "benchmarks" / "cost-benchmark-tiny.json").read_text())
    assert [record["num_samples"] for record in result["num_samples"]] == [1, 2, 5, 10, 20]
    assert [record["questions"] for record in result["questions"]] == [20, 40, 80]
    tokens = [record["sampled_tokens"] / record["num_samples"] for record in result["num_samples"]]
    assert max(tokens) < 1.25 * min(tokens), "an epoch's questions are each sampled once"
    assert (tmp_path / "benchmarks" / "cost-benchmark-tiny.png").stat().st_size > 10_000


def test_engines_draw_as_many_tokens(tmp_path):
    """`generate_batch` takes minutes to start on a CPU; its answers are looked at when the benchmark runs."""
    settings = config()
    trainer = make_trainer("ours", settings, str(tmp_path), 3)
    prompts = [trainer.prompt_ids[row.index] for row in trainer.data.forget]
    by_name = engines(settings, trainer.model.eval(), prompts)
    assert list(by_name) == ["ours", "generate", "generate_batch"]
    ours = [answer for answers in by_name["ours"]() for answer in answers]
    assert [len(answer) for answer in ours] == [len(answer) for answer in by_name["generate"]()] == [ANSWER_LENGTH] * 6
