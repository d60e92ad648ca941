"""The optimizer step: its loss and gradient are exact, whatever the micro-batches, and every parameter is trained."""

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import TrainerCallback

import finetuning.main
from common.checkpoints import distance_of, save_trained
from common.config import LoraSettings, ModelConfig, RunConfig, read_config
from common.errors import UserError
from common.files import CONFIGS
from common.model import load_model
from common.trainer import ExampleTrainer, check_even_split
from common.training_arguments import training_arguments
from tests.helpers import ROWS, arguments, gradients_of_one_step, make_trainer
from unlearning.trainer import MethodSettings, UnlearningData, UnlearningTrainer


class NotesThreads(UnlearningTrainer):
    threads: set[int]

    def compute_loss(self, *args, **kwargs):
        self.threads.add(torch.get_num_threads())
        return super().compute_loss(*args, **kwargs)


def test_a_tiny_model_is_trained_on_one_thread(model, prompts, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trainer = NotesThreads(
            model, arguments(tmp_path, 4, 1), UnlearningData(ROWS, ROWS, prompts, max_length=64), MethodSettings()
        )
        trainer.threads = set()
        trainer.train()
        assert (trainer.threads, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def unlearning_trainer(model, prompts, folder, batch_size, accumulation, **more):
    data = UnlearningData(ROWS, ROWS[::-1], prompts, max_length=64)
    settings = MethodSettings(lambda_unlearning=1.5)
    return UnlearningTrainer(model, arguments(folder, batch_size, accumulation, **more), data, settings)


def plain_unlearning_loss(model, prompts, pairs):
    """The loss by its formula: two token means, one row at a time, without padding."""

    def token_mean(rows):
        total, tokens = 0.0, 0
        for row in rows:
            prompt, answer = prompts.prompt(row.question), prompts.answer(row.answer)
            ids = torch.tensor([prompt + answer])
            log_probabilities = model(ids).logits[0].log_softmax(-1)
            for position, token in enumerate(answer, start=len(prompt)):
                total = total - log_probabilities[position - 1, token]
            tokens += len(answer)
        return total / tokens

    forget, retain = zip(*pairs, strict=True)
    return token_mean(forget) + 1.5 * token_mean(retain)


@pytest.mark.parametrize("extra_pass", [1, 10**9])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8), (2, 4), (3, 3)])
def test_a_step_has_the_gradient_of_the_formula_whatever_its_micro_batches(
    model, prompts, tmp_path, monkeypatch, batch_size, accumulation, extra_pass
):
    """1: rows of another length go through the model in a pass of their own; 10**9: never."""
    monkeypatch.setattr("common.collate.PASS_OVERHEAD_TOKENS", extra_pass)
    trainer = unlearning_trainer(model, prompts, tmp_path, batch_size, accumulation)
    retain_of = {row.index: trainer.paired_retain_example(row) for row in ROWS}
    row_of = {tuple(prompts.example(row, 64).prompt): row for row in ROWS}
    pairs = [(row, row_of[tuple(retain_of[row.index].prompt)]) for row in ROWS]
    model.zero_grad()
    loss = plain_unlearning_loss(model, prompts, pairs)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    found = gradients_of_one_step(trainer)

    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    record = trainer.history[0]
    assert record["forget_loss"] + 1.5 * record["retain_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_finetuning_splits_a_step_without_changing_it(model, prompts, tmp_path):
    examples = [prompts.example(row, 64) for row in ROWS]
    found = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = ExampleTrainer(model, arguments(tmp_path, batch_size, accumulation), examples, prompts.tokenizer)
        found.append((gradients_of_one_step(trainer), trainer.history[0]["loss"]))
    (whole, whole_loss), (split, split_loss) = found
    assert split_loss == pytest.approx(whole_loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_parameter_moves(model, prompts, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unlearning_trainer(model, prompts, tmp_path, 4, 2, learning_rate=1e-2, max_steps=2).train()
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


def test_the_retain_pairing_depends_on_seed_step_and_row_alone(model, prompts, tmp_path):
    trainer = unlearning_trainer(model, prompts, tmp_path, 4, 1)
    first = [trainer.paired_retain_example(row) for row in ROWS]
    assert [trainer.paired_retain_example(row) for row in ROWS[::-1]] == first[::-1]
    trainer.state.global_step = 1
    assert [trainer.paired_retain_example(row) for row in ROWS] != first


def run_config(folder, training) -> RunConfig:
    unused = dict.fromkeys(("model", "data", "evaluation", "output_dir"))
    flags = dict.fromkeys(("save_model", "overwrite", "keep_checkpoints"), False)
    return RunConfig(seed=0, training=training, models_dir=str(folder), **unused, **flags)


def test_warmup_lasts_one_epoch(model, prompts, tmp_path):
    training = {
        "num_epochs": 3,
        "num_train_epochs": 3,
        "warmup_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0,
        "bf16": False,
    }
    config = run_config(tmp_path, training)
    args = training_arguments(config, tmp_path, num_rows=len(ROWS))
    assert args.warmup_steps == math.ceil(len(ROWS) / 4)
    assert args.num_train_epochs == 3


@pytest.mark.parametrize(
    ("rows", "size", "processes", "fitting"),
    [(30, 5, 1, None), (30, 4, 1, None), (30, 5, 2, None), (30, 4, 2, "1, 3, 5, 15"), (31, 5, 2, "none; .*")],
)
def test_rows_that_processes_cannot_share_evenly_are_refused(rows, size, processes, fitting):
    with pytest.raises(UserError, match=f"sizes that fit: {fitting}$") if fitting else nullcontext():
        check_even_split(rows, size, processes)


def test_a_last_epoch_that_max_steps_ends_early_is_in_the_history(model, prompts, tmp_path):
    trainer = unlearning_trainer(model, prompts, tmp_path, 4, 1, max_steps=3)  # two steps an epoch
    trainer.train()
    assert [record["epoch"] for record in trainer.history] == [1, 2]
    assert all("retain_loss" in record for record in trainer.history)


@pytest.mark.parametrize(
    ("recipe", "rows", "steps", "warmup"),
    [
        ("phi", 4000, 625, 125),
        ("llama3", 4000, 1250, 250),
        ("PMC-unlearn-phi", 400, 250, 6),
        ("PMC-unlearn-llama3", 400, 750, 25),
    ],
)
def test_the_published_recipes_have_the_published_numbers_of_steps(recipe, rows, steps, warmup, tmp_path):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(recipe)
    training = OmegaConf.to_container(cfg.training, resolve=True) | {"bf16": False}
    training.pop("gradient_checkpointing", None)
    config = run_config(tmp_path, training)
    args = training_arguments(config, tmp_path, rows)
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    by_epochs = math.ceil(rows / a_step) * args.num_train_epochs
    assert (args.max_steps if args.max_steps > 0 else by_epochs, args.warmup_steps) == (steps, warmup)


def test_a_warmup_longer_than_the_run_is_refused(tmp_path):
    training = {"num_epochs": 2, "num_train_epochs": 2, "per_device_train_batch_size": 4, "bf16": False}
    for steps, more in ((5, {}), (7, {"max_steps": 6})):
        values = training | {"gradient_accumulation_steps": 1, "warmup_steps": steps} | more
        config = run_config(tmp_path, values)
        with pytest.raises(UserError, match=f"^training.warmup_steps={steps}: the run has {steps - 1} optimizer steps"):
            training_arguments(config, tmp_path, num_rows=len(ROWS))


def test_a_complete_checkpoint_is_not_written_again(model, prompts, tmp_path):
    """A stop signal on an epoch's last step asks for the checkpoint of that step a second time."""
    trainer = unlearning_trainer(model, prompts, tmp_path, 8, 1, save_strategy="epoch")
    trainer.train()
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    trainer._save_checkpoint(trainer.model, None)
    assert weights.stat().st_mtime_ns == written


def test_training_that_diverges_stops_before_the_step_that_would_spoil_the_weights(model, prompts, tmp_path):
    examples = [prompts.example(row, 64) for row in ROWS]
    args = arguments(tmp_path, 4, 1, learning_rate=1e30, max_steps=6)
    trainer = ExampleTrainer(model, args, examples, prompts.tokenizer)
    with pytest.raises(
        UserError, match=r"diverged: in optimizer step \d of 6 .* training.learning_rate \(now 1e\+30\)"
    ):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, alpha=8), LoraSettings(r=4, alpha=8, merge=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_answers_as_the_trained_one(model, tokenizer, prompts, tmp_path, lora, dtype, monkeypatch):
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = ModelConfig(path=str(tmp_path / "start"), prompt=prompts.config, dtype=dtype, lora=lora)
    model = load_model(config, tokenizer, trainable=True)
    args = arguments(tmp_path, 4, 1, learning_rate=0.1 if lora else 0.01, max_steps=8)
    trainer = ExampleTrainer(model, args, [prompts.example(row, 64) for row in ROWS], tokenizer)
    trainer.train()
    ids = [prompts.prompt(row.question) for row in ROWS[:4]]
    save_trained(trainer.model, tokenizer, tmp_path / "saved", config, ids)
    loaded = load_model(replace(config, path=str(tmp_path / "start")), tokenizer, trainable=False)
    monkeypatch.setattr("common.checkpoints.load_model", lambda *_, **__: loaded)  # as if the training had been lost
    with pytest.raises(UserError, match="the saved model does not answer as the trained one does"):
        save_trained(trainer.model, tokenizer, tmp_path / "lost", config, ids)


def test_an_epochs_line_says_how_far_the_run_is_and_the_time_left(model, prompts, tmp_path, monkeypatch, caplog):
    clock = itertools.count(step=10.0)
    monkeypatch.setattr("common.trainer.time.perf_counter", lambda: next(clock))
    trainer = unlearning_trainer(model, prompts, tmp_path, 4, 1, max_steps=-1, num_train_epochs=3)
    trainer.evaluate_model, trainer.evaluate_every = lambda _: {"utility": 50.0}, 2
    caplog.set_level("INFO")
    trainer.train()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")]
    assert [line.partition("  ")[0] for line in lines] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    assert ["utility 50" in line for line in lines] == [False, True, False]
    left = [line.rpartition("time left ")[2] for line in lines]
    assert re.fullmatch(r"0[12]:\d\d", left[0])
    assert left[2] == "00:00"


class Tracker(TrainerCallback):
    """Receives what wandb, tensorboard and trackio receive."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append(logs)


@pytest.mark.parametrize("stage", ["finetuning", "unlearning"])
def test_a_tracker_gets_the_quantities_of_the_history_by_their_names(stage, model, prompts, tmp_path):
    more = {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch", "learning_rate": 1e-3}
    if stage == "unlearning":
        trainer = make_trainer(model, prompts, tmp_path, **more)
        trainer.evaluate_model = lambda _: {"unlearn_quality": 25.0, "utility": 50.0}
    else:
        examples = [prompts.example(row, 64) for row in ROWS]
        trainer = ExampleTrainer(model, arguments(tmp_path, 4, 2, **more), examples, prompts.tokenizer)
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    assert len(trainer.history) == 2
    for record in trainer.history:
        assert record in tracker.logged
        # Hugging Face logs of its own at the end of the epoch; where a name is the same, so is the value.
        (own,) = [logs for logs in tracker.logged if logs["epoch"] == record["epoch"] and "grad_norm" in logs]
        assert [name for name in own.keys() & record.keys() if own[name] != pytest.approx(record[name], rel=1e-4)] == []
    if stage == "unlearning":
        assert {"unlearn_quality", "utility", "collapse_loss", "seconds_sampling"} <= trainer.history[-1].keys()


def test_a_launcher_that_changes_the_precision_in_silence_is_refused(tmp_path, monkeypatch):
    training = {
        "num_epochs": 1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    config = run_config(tmp_path, training | {"bf16": False})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="^ACCELERATE_MIXED_PRECISION=bf16: .* training.bf16=False"):
        training_arguments(config, tmp_path, num_rows=len(ROWS))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not training_arguments(config, tmp_path, num_rows=len(ROWS)).bf16


@pytest.mark.parametrize(("every", "epochs"), [(0, []), (2, [2, 4])])
def test_finetuning_is_evaluated_each_time_that_many_epochs_are_done(
    every, epochs, model, tokenizer, monkeypatch, tmp_path
):
    evaluator = Mock(headline=lambda model: {"unlearn_quality": 1.0, "utility": 2.0})
    for name, stub in {"load_tokenizer": tokenizer, "load_model": model, "Evaluator": evaluator}.items():
        monkeypatch.setattr(finetuning.main, name, lambda *_, stub=stub, **__: stub)
    words = [f"evaluation.every_epochs={every}", "evaluation.start=false", "training.num_epochs=4"]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = read_config(compose("tiny", ["data.splits.train='retain[:8]'", *words]))
    finetuning.main.train(Mock(work=tmp_path, open=lambda: tmp_path), config)
    history = evaluator.finish.call_args.args[0].history
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert [record["epoch"] for record in history if record.get("utility") == 2.0] == epochs


TRAINING = {"num_epochs": 2, "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    ("typed", "steps", "message"),
    [
        (
            "training.num_epochs=5",
            {"max_steps": 3},
            r"num_epochs=2: has no effect beside .*max_steps=3; .*max_steps=-1",
        ),
        ("training.warmup_epochs=1", {"warmup_steps": 1}, r"warmup_epochs=None: has no effect .*warmup_steps=1"),
        ("training.num_epochs=5", {}, None),
        ("training.learning_rate=1", {"max_steps": 3}, None),
    ],
)
def test_epochs_on_the_command_line_that_the_recipe_s_steps_replace_are_refused(
    tmp_path, monkeypatch, typed, steps, message
):
    monkeypatch.setattr("common.training_arguments.typed_overrides", lambda: [typed])
    config = run_config(tmp_path, {**TRAINING, "bf16": False, **steps})
    with pytest.raises(UserError, match=message) if message else nullcontext():
        training_arguments(config, tmp_path, num_rows=len(ROWS))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"lr_scheduler_type": "constant", "warmup_epochs": 1},
            "lr_scheduler_type=constant: has no warmup, .*warmup_epochs=0",
        ),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler=false: a continued run"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "constant: has no warmup, .*warmup_steps=0"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=true: .*per_device_train_batch_size"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "num_steps: use training.gradient",
        ),
        ({"optim": "schedule_free_adamw"}, "^training.optim=schedule_free_adamw: its averaged weights"),
    ],
)
def test_settings_that_would_train_otherwise_in_silence_are_refused(tmp_path, more, message):
    config = run_config(tmp_path, {**TRAINING, "bf16": False, **more})
    with pytest.raises(UserError, match=message):
        training_arguments(config, tmp_path, num_rows=len(ROWS))


def test_a_run_that_continues_in_another_precision_is_warned_of(model, prompts, tmp_path, caplog):
    trainer = unlearning_trainer(model, prompts, tmp_path, 4, 1)
    state = trainer.state_to_save()
    trainer.load_state(state)
    assert not caplog.messages
    trainer.load_state(state | {"bf16": True})
    assert "training.bf16: the run began with True and continues with False" in caplog.text


def test_rounding_of_single_positions_in_16_bits_is_no_difference_and_another_model_is():
    one = torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
    rounded = torch.tensor([[0.59, 0.41], [0.9, 0.1], [1.0, 0.0]])
    distance, allowed = distance_of([one], [rounded], "bfloat16")
    assert distance == pytest.approx(0.03) and distance <= allowed
    distance, allowed = distance_of([one], [rounded], "float32")
    assert distance == pytest.approx(0.09) and distance > allowed
    distance, allowed = distance_of([one, one], [one.flip(1), one], "bfloat16")
    assert distance > allowed
