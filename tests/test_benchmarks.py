"""The benchmarks time what they say: both trainers do the same work, and their figures add up. In a shape of seconds."""

import json
import os

import pytest
import torch
from hydra import compose, initialize_config_dir

from benchmarks import step
from benchmarks.engines import ANSWER_LENGTH, engines
from benchmarks.synthetic import ANSWER_TOKENS, PROMPT_TOKENS, draw_lengths, rows, word_tokenizer
from benchmarks.timed_trainer import generate_lengths
from benchmarks.worker import make_trainer, read, window_size
from common.files import CONFIGS, ROOT
from common.prompts import Example
from common.rouge import rouge_l_recall
from generation import sampler
from generation.token_sampling import SamplingSettings
from tests.helpers import random_model, random_prompts, run_imported

SMALL = [
    "model.new.vocab_size=400",
    "model.new.settings={hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:4}",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.bf16=false",
    "method.num_samples=2",
]


def run(script: str, recipe: str, folder, *overrides: str):
    path = ROOT / "benchmarks" / script
    (done,) = run_imported(path, [str(path), f"-cn={recipe}", *SMALL, f"models_dir={folder}", *overrides])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def config(*overrides: str):
    os.environ["PMC_ROOT"] = str(ROOT)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return read(compose("benchmark/tiny", [*SMALL, *overrides]))[0]


@pytest.mark.slow
def test_both_trainers_are_timed_and_their_ratios_written(tmp_path):
    steps = ["benchmark.interleaved=true", "benchmark.steps=2", "benchmark.evaluation_questions=6"]
    output = run("step.py", "benchmark/phi", tmp_path, *steps)
    result = json.loads((tmp_path / "benchmarks" / "phi.json").read_text())
    baseline, optimized = result["trainers"]["baseline"], result["trainers"]["optimized"]
    for name, ratio in result["ratios"].items():
        higher_is_better = name.endswith("per_second")
        assert ratio == pytest.approx(
            optimized[name] / baseline[name] if higher_is_better else baseline[name] / optimized[name]
        )
    for trainer in (baseline, optimized):
        assert trainer["seconds_sampling"] < trainer["seconds_step"]
        # The published run: 400 questions, 40 epochs, here in windows of 8.
        assert trainer["minutes_whole_run"] == pytest.approx(400 * 40 / 8 * trainer["seconds_step"] / 60)
    assert result["limit"]["step_over_limit"] > 1
    assert {"device", "versions", "config"} <= result.keys()
    assert "| seconds step |" in output
    assert "40 minutes" in output


def test_both_trainers_draw_the_same_number_of_tokens(tmp_path):
    """And train on the same prompts."""
    settings = config()
    trainers = [
        make_trainer(name, settings, str(tmp_path), window_size(settings)) for name in ("baseline", "optimized")
    ]
    for trainer in trainers:
        trainer.args.max_steps = 1
        trainer.train()
    baseline, optimized = trainers
    assert baseline.sampled_tokens == optimized.sampled_tokens > 8 * 2 * min(ANSWER_TOKENS)
    assert [row.question for row in baseline.data.forget] == [row.question for row in optimized.data.forget]
    assert 0.7 < baseline.trained_tokens / optimized.trained_tokens < 1.4  # each trains on picks of its own


def test_the_baseline_computes_the_mean_loss_of_its_labels(tmp_path):
    settings = config()
    trainer = make_trainer("baseline", settings, str(tmp_path), 8)
    example = Example([5, 6], [7, 8, 9])
    found = trainer.loss(trainer.model, [example])
    logits = trainer.model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    expected = -(logits[1, 7] + logits[2, 8] + logits[3, 9]) / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_baseline_scores_an_answer_as_the_optimized_trainer_does(tmp_path):
    trainer = make_trainer("baseline", config(), str(tmp_path), 1)
    assert trainer.evaluation_recall("The cat sat on mats", "cats sat there") == rouge_l_recall(
        "The cat sat on mats", "cats sat there"
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step.py", "scaling.py", "engines.py"])
def test_a_run_starts_from_what_its_finetuning_recipe_writes(tmp_path, script):
    path = ROOT / "benchmarks" / script
    (done,) = run_imported(path, [str(path), "-cn=benchmark/smollm2-run", f"models_dir={tmp_path}"])
    assert done.returncode == 1
    assert f"finetuned={tmp_path}/finetuned/smollm2-cpu/seed-0: no such folder" in done.stderr
    assert f"python finetuning/main.py -cd=configs -cn=smollm2-cpu seed=0 models_dir={tmp_path}" in done.stderr


@pytest.mark.parametrize("interval", [1, 8])
def test_samples_stop_at_their_lengths(monkeypatch, interval):
    """As the beginnings of what is drawn otherwise; on CUDA, which checks every 8 tokens, too."""
    monkeypatch.setitem(sampler.CHECK_INTERVAL, "cpu", interval)
    arguments = (
        random_model(),
        random_prompts((3, 9, 6)),
        SamplingSettings(30, 2, temperature=1.3),
        [],
        [(0,), (1,), (2,)],
    )
    lengths = [[4, 20], [1, 8], [16, 13]]
    whole = sampler.generate(*arguments)
    expected = [
        [ids[:length] for ids, length in zip(answers, some, strict=True)]
        for answers, some in zip(whole, lengths, strict=True)
    ]
    assert generate_lengths(lengths, *arguments) == expected


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
    run("scaling.py", "benchmark/tiny", tmp_path, "training.per_device_train_batch_size=16")
    result = json.loads((tmp_path / "benchmarks" / "cost-tiny.json").read_text())
    assert [record["num_samples"] for record in result["num_samples"]] == [1, 2, 5, 10, 20]
    assert [record["questions"] for record in result["questions"]] == [20, 40, 80]
    tokens = [record["sampled_tokens"] / record["num_samples"] for record in result["num_samples"]]
    assert max(tokens) < 1.25 * min(tokens), "an epoch's questions are each sampled once"
    assert (tmp_path / "benchmarks" / "cost-tiny.png").stat().st_size > 10_000


def test_engines_draw_as_many_tokens(tmp_path):
    """`generate_batch` takes minutes to start on a CPU; its answers are looked at when the benchmark runs."""
    settings = config()
    trainer = make_trainer("optimized", settings, str(tmp_path), 3)
    prompts = [trainer.prompt_ids[row.index] for row in trainer.data.forget]
    by_name = engines(settings, trainer.model.eval(), prompts)
    assert list(by_name) == ["optimized", "generate", "generate_batch"]
    optimized = [answer for answers in by_name["optimized"]() for answer in answers]
    assert (
        [len(answer) for answer in optimized]
        == [len(answer) for answer in by_name["generate"]()]
        == [ANSWER_LENGTH] * 6
    )
