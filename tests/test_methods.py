"""The unlearning methods: each loss by its formula, the direction of a step, the model before unlearning, the command line."""

import contextlib
import copy
import dataclasses
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import Trainer

from common.collate import IGNORED
from common.config import LoraSettings, NewModelConfig, PromptConfig
from common.errors import UserError
from common.files import CONFIGS
from common.model import add_adapter
from common.new_model import new_model
from common.prompts import PromptFormat
from common.rouge import rouge_l_recall
from common.training_arguments import check_deepspeed
from tests.helpers import ROWS, Plain, arguments, log_softmax, resumed_and_whole, run_stage
from unlearning.dual_variable import mean_retain_loss
from unlearning.main import check_settings_are_of_the_method, method_class
from unlearning.methods.altpo import AltPO
from unlearning.methods.grad_diff import GradDiff
from unlearning.methods.refusals import read_refusals
from unlearning.methods.rmu import RMUSettings, steered_layers, trained_parameters
from unlearning.methods.shred import is_forgotten
from unlearning.pmc import PMC
from unlearning.pmc_options import PMCSettings
from unlearning.reference_model import ReferenceModel
from unlearning.token_losses import TokenLosses
from unlearning.trainer import MethodSettings, UnlearningData

METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
OTHERS = [name for name in METHODS if name != "pmc"]
RETAIN_ANSWERS_ARE_TRAINED = [
    name for name in OTHERS if name not in ("grad_ascent", "kl_min", "rmu", "jensun", "shred", "undo", "grpo")
]


def method_named(name: str):
    """The class and its settings, as configs/method/ has them."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        values = OmegaConf.to_container(compose("unlearn", [f"method={name}"]).method)
    found = get_class(values.pop("_target_"))
    return found, found.Settings(**values)


def make(name, learned, prompts, folder, rows=ROWS[:2], max_length=64, settings=None, **training):
    """A trainer of the method on a copy of the model, with those of the settings that the method has."""
    found, defaults = method_named(name)
    known = {key: value for key, value in (settings or {}).items() if hasattr(defaults, key)}
    data = UnlearningData(rows, ROWS[4:], prompts, max_length)
    trainer = found(
        copy.deepcopy(learned), arguments(folder, len(rows), 1, **training), data, replace(defaults, **known)
    )
    trainer.before_training()
    return trainer


def moved(trainer, amount=0.05):
    """Move the trained weights, so that the present model is not the one before unlearning."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn(parameter.shape, generator=generator)
    return trainer


def loss_of_step(trainer, rows=ROWS[:2]):
    """The loss of an optimizer step over these rows, and what it trains on: forget examples, then retain examples."""
    batches, _ = trainer.get_batch_samples(iter([rows]), 1, None)
    loss = sum(trainer.compute_loss(trainer.model, batch) for batch in batches)
    (batch,) = batches
    examples = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        start = int((labels[:length] != IGNORED).nonzero()[0])
        examples.append((ids[:length].tolist(), start))
    forget = int(batch["is_forget"].sum())
    return loss, examples[:forget], examples[forget:]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def jensen_shannon(p, q):
    def kl(a, b):
        return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / b), 0).sum(-1)

    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def token_mean(rows):
    """The mean over all tokens of several rows."""
    return np.concatenate(rows).mean()


def mean_kl(now, before, examples):
    """KL(before || now), the mean over all answer tokens."""
    divergence = []
    for example in examples:
        log_p, log_p0 = (log_softmax(model.logits(example)[0]) for model in (now, before))
        divergence.append((np.exp(log_p0) * (log_p0 - log_p)).sum(-1))
    return token_mean(divergence)


def cross_entropy(model, examples):
    return -token_mean([model.log_p(example) for example in examples])


def by_hand(name, now, before, forget, retain, s):
    """forget loss and retain loss by the formulas of the papers."""
    if name == "retain_finetuning":
        return 0.0, cross_entropy(now, retain)
    ascent = -cross_entropy(now, forget)
    kept = cross_entropy(now, retain) if retain else 0.0
    nll = [-now.log_p(example).sum() for example in forget]
    nll0 = [-before.log_p(example).sum() for example in forget]
    p = [np.exp(now.log_p(example)) for example in forget]
    if name in ("grad_ascent", "grad_diff", "repselect"):
        return ascent, kept
    if name == "kl_min":
        return ascent, mean_kl(now, before, retain)
    if name == "undo":
        return mean_kl(now, before, forget), mean_kl(now, before, retain)
    if name == "idk":
        return cross_entropy(now, forget), kept
    if name in ("dpo", "altpo"):
        losses = []
        for row in range(2):  # the preferred answers come first
            preferred, forgotten = row, row + 2
            margin = (nll0[preferred] - nll[preferred]) - (nll0[forgotten] - nll[forgotten])
            losses.append(-2 / s.beta * log_sigmoid(s.beta * margin))
        return np.mean(losses), kept
    if name == "npo":
        return np.mean([-2 / s.beta * log_sigmoid(s.beta * (a - b)) for a, b in zip(nll, nll0, strict=True)]), kept
    if name == "simnpo":
        each = [value / len(now.log_p(example)) for value, example in zip(nll, forget, strict=True)]
        return np.mean([-2 / s.beta * log_sigmoid(s.beta * (value - s.delta)) for value in each]), kept
    if name == "undial":
        losses = []
        for example in forget:
            logits, targets = before.logits(example)
            logits[np.arange(len(targets)), targets] -= s.beta
            teacher = np.exp(log_softmax(logits))
            losses.append(-(teacher * log_softmax(now.logits(example)[0])).sum(-1))
        return token_mean(losses), kept
    if name == "wga":
        return -token_mean([some**s.beta * -np.log(some) for some in p]), kept
    if name == "jensun":
        losses = []
        for example in forget:
            p = np.exp(log_softmax(now.logits(example)[0]))
            target = np.zeros_like(p)
            for position in range(len(p)):
                target[position, s.refusal_ids[position % len(s.refusal_ids)]] = 1
            losses.append(jensen_shannon(p, target))
        both = [[np.exp(log_softmax(model.logits(e)[0])) for model in (now, before)] for e in retain]
        return token_mean(losses), token_mean([jensen_shannon(*pair) for pair in both])
    if name == "ceu":
        losses = []
        for example in forget:
            logits, targets = now.logits(example)
            log_p = log_softmax(logits)
            for position in range(1, len(targets)):  # without the first token
                others = np.delete(np.exp(log_p[position]), targets[position])
                others_log_p = np.delete(log_p[position], targets[position])
                losses.append([-(others / others.sum() * others_log_p).sum()])
        return token_mean(losses), kept
    if name == "pdu":
        logits = [now.logits(example)[0] for example in forget]
        return token_mean([(some.max(-1) - some.mean(-1)) ** 2 for some in logits]), kept
    if name == "shred":
        losses = []
        for example in forget:
            logits, targets = before.logits(example)
            p0 = np.exp(before.log_p(example))
            for position in sorted(range(len(p0)), key=lambda index: p0[index])[
                : math.ceil(s.forget_fraction * len(p0))
            ]:
                logits[position, targets[position]] -= s.beta
            log_p = log_softmax(now.logits(example)[0])
            for own, log_q in zip(logits, log_p, strict=True):
                highest = np.argsort(own)[-s.top_k :]
                target = np.exp(log_softmax(own[highest]))
                losses.append([(target * (np.log(target) - log_q[highest])).sum()])
        return token_mean(losses), 0.0
    assert name == "satimp"
    return -token_mean([some**s.beta1 * (1 - some) ** s.beta2 * -np.log(some) for some in p]), kept


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("rmu", "grpo")])
def test_the_loss_is_that_of_the_paper(name, learned, prompts, tmp_path):
    """On two rows of unlike length, in float64, a row at a time, by the formula written out."""
    settings = {"gamma": 0.7, "lambda_unlearning": 1.9, "delta": 0.3, "beta2": 1.5}
    trainer = moved(make(name, learned, prompts, tmp_path, settings=settings))
    now, before = Plain(trainer.model), Plain(learned)
    loss, forget, retain = loss_of_step(trainer)
    assert len({len(ids) for ids, _ in [*forget, *retain]}) > 1
    gamma, weight = {"grad_ascent": (1, 0), "shred": (1, 0), "retain_finetuning": (0, 1)}.get(name, (0.7, 1.9))
    s = SimpleNamespace(**vars(trainer.settings), refusal_ids=getattr(trainer, "refusal_ids", None))
    forget_loss, retain_loss = by_hand(name, now, before, forget, retain, s)
    assert loss.item() == pytest.approx(gamma * forget_loss + weight * retain_loss, rel=1e-4, abs=1e-5)
    for part, expected, weight_of_part in (("forget", forget_loss, gamma), ("retain", retain_loss, weight)):
        if weight_of_part:
            assert float(trainer.epoch_sums[f"{part}_loss"]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        else:
            assert f"{part}_loss" not in trainer.epoch_sums


def test_rmu_is_that_of_the_paper(learned, prompts, tmp_path):
    trainer = moved(
        make("rmu", learned, prompts, tmp_path, settings={"gamma": 0.7, "lambda_unlearning": 1.9, "layer": 1})
    )
    now, before = (copy.deepcopy(model).eval() for model in (trainer.model, learned))
    loss, forget, retain = loss_of_step(trainer)

    def activations(model, example):
        ids, start = example
        caught = []
        handle = model.model.layers[1].register_forward_hook(lambda _m, _i, output: caught.append(output))
        with torch.no_grad():
            model(torch.tensor([ids]))
        handle.remove()
        return caught[0][0, start:].double().numpy()

    u = trainer.target.double().numpy()
    assert np.linalg.norm(u) == pytest.approx(trainer.settings.steering_coeff)
    steered = token_mean([((activations(now, example) - u) ** 2).mean(-1) for example in forget])
    kept = token_mean([((activations(now, e) - activations(before, e)) ** 2).mean(-1) for e in retain])
    assert kept > 0
    assert loss.item() == pytest.approx(0.7 * steered + 1.9 * kept, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("dpo", "altpo")])
def test_micro_batches_and_passes_do_not_change_a_step(name, learned, prompts, tmp_path, monkeypatch):
    """One batch of eight rows against four of two, and one pass against one for every length."""
    from common import collate

    losses = []
    for batch_size, extra_pass in ((8, 10**9), (2, 10**9), (8, 1)):
        monkeypatch.setattr(collate, "PASS_OVERHEAD_TOKENS", extra_pass)
        losses.append(step_loss_and_gradient(name, learned, prompts, tmp_path, batch_size))
    for loss, gradient in losses[1:]:
        assert loss == pytest.approx(losses[0][0], rel=1e-4)
        torch.testing.assert_close(gradient, losses[0][1], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "altpo"])
def test_the_two_answers_of_a_question_stay_together(name, learned, prompts, tmp_path):
    one, four = (step_loss_and_gradient(name, learned, prompts, tmp_path, size) for size in (8, 2))
    assert four[0] == pytest.approx(one[0], rel=1e-4)
    torch.testing.assert_close(four[1], one[1], rtol=2e-3, atol=1e-5)


def step_loss_and_gradient(name, learned, prompts, folder, batch_size):
    trainer = moved(make(name, learned, prompts, folder, rows=ROWS, settings={"max_length": 48}), 0.02)
    windows = [ROWS[start : start + batch_size] for start in range(0, len(ROWS), batch_size)]
    batches, _ = trainer.get_batch_samples(iter(windows), len(windows), None)
    loss = sum(trainer.compute_loss(trainer.model, part) for batch in batches for part in trainer.buckets(batch))
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def likelihood(model, prompts, rows):
    """Mean log p of the answer tokens of some rows."""
    plain = Plain(model)
    return np.mean(
        [
            plain.log_p((example.prompt + example.answer, len(example.prompt))).mean()
            for example in (prompts.example(row, 64) for row in rows)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("retain_finetuning", "undo", "grpo")])
def test_a_few_steps_make_the_forget_answers_less_likely(name, learned, prompts, tmp_path):
    trainer = make(
        name,
        learned,
        prompts,
        tmp_path,
        rows=ROWS[:4],
        learning_rate=1e-3,
        max_steps=8,
        settings={"steering_coeff": 50.0},
    )
    trainer.train()
    assert likelihood(trainer.model, prompts, ROWS[:4]) < likelihood(learned, prompts, ROWS[:4]) - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", RETAIN_ANSWERS_ARE_TRAINED)
def test_the_retain_loss_makes_the_retain_answers_likelier(name, learned, prompts, tmp_path):
    """Than the same steps without it, or, where it is all there is, than before."""

    def trained(weight):
        settings = {"lambda_unlearning": weight}
        trainer = make(name, learned, prompts, tmp_path, ROWS[:4], settings=settings, learning_rate=1e-3, max_steps=8)
        trainer.train()
        return likelihood(trainer.model, prompts, ROWS[4:])

    without = likelihood(learned, prompts, ROWS[4:]) if name == "retain_finetuning" else trained(0.0)
    assert trained(10.0) > without + 0.01


def test_idk_and_dpo_raise_a_refusal(learned, prompts, tmp_path):
    refusals = [
        replace(row, answer=text) for row, text in zip(ROWS[:4], read_refusals("data/refusals.txt"), strict=False)
    ]
    for name in ("idk", "dpo"):
        trainer = make(name, learned, prompts, tmp_path, rows=ROWS[:4], learning_rate=1e-3, max_steps=8)
        trainer.train()
        assert likelihood(trainer.model, prompts, refusals) > likelihood(learned, prompts, refusals), name


# --- lambda_unlearning=auto ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pdu", "grad_diff"])
def test_the_dual_variable_follows_the_retain_loss(name, learned, prompts, tmp_path):
    """Three steps by hand: lambda + step size * (retain loss - bound), and the bound is relative to the start."""
    settings = {"lambda_unlearning": "auto", "retain_tolerance": 0.2, "dual_step_size": 3.0}
    trainer = make(
        name,
        learned,
        prompts,
        tmp_path,
        ROWS[:4],
        settings=settings,
        learning_rate=3e-3,
        max_steps=3,
        num_train_epochs=3,
    )
    trainer.train()
    before = Plain(learned)
    retain = [prompts.example(row, 64) for row in ROWS[4:]]
    bound = 1.2 * cross_entropy(before, [(example.prompt + example.answer, len(example.prompt)) for example in retain])
    assert trainer.dual.bound == pytest.approx(bound, rel=1e-4)
    assert len(trainer.history) == 3
    weight = 1.0
    for record in trainer.history:
        assert record["lambda_unlearning"] == pytest.approx(weight, rel=1e-4)
        weight = max(0.0, weight + 3.0 * (record["retain_loss"] - bound))
    assert trainer.dual.value == pytest.approx(weight, rel=1e-4)
    assert weight != 1.0


def test_the_bound_of_the_retain_loss_has_the_noise_of_training(learned, prompts, tmp_path):
    """The model does not change, so its retain loss keeps the bound, and the weight falls."""
    settings = {"lambda_unlearning": "auto", "retain_tolerance": 0.5}
    training = {"learning_rate": 0.0, "neftune_noise_alpha": 50.0, "max_steps": 4, "num_train_epochs": 4}
    trainer = make("grad_diff", learned, prompts, tmp_path, ROWS[:4], settings=settings, **training)
    random_state = torch.get_rng_state()
    without_noise = mean_retain_loss(trainer)  # the noise begins with training
    assert torch.equal(torch.get_rng_state(), random_state), "later random numbers do not depend on it"
    trainer.train()
    noisy = np.mean([record["retain_loss"] for record in trainer.history])
    assert noisy == pytest.approx(trainer.dual.bound / 1.5, rel=0.25) and noisy > 2 * without_noise
    assert trainer.dual.value < 1


def test_a_weight_of_0_rises_again_when_the_retain_loss_is_above_its_bound(learned, prompts, tmp_path):
    settings = {"lambda_unlearning": "auto"}
    trainer = make("grad_diff", learned, prompts, tmp_path, ROWS[:4], settings=settings, learning_rate=1e-3)
    trainer.dual.value, trainer.dual.bound = 0.0, 0.01
    trainer.train()
    assert trainer.dual.value == pytest.approx(trainer.history[0]["retain_loss"] - 0.01, rel=1e-4)
    assert trainer.dual.value > 0


@pytest.mark.slow
def test_a_resumed_run_continues_with_the_dual_variable_of_its_checkpoint(learned, prompts, tmp_path):
    def trainer_in(folder):
        settings = {"lambda_unlearning": "auto"}
        more = {"learning_rate": 3e-3, "max_steps": 4, "num_train_epochs": 4, "save_strategy": "epoch"}
        return make("npo", learned, prompts, folder, ROWS[:4], settings=settings, **more)

    begun, resumed, whole = resumed_and_whole(trainer_in, tmp_path)
    assert len(resumed.history) == 4
    assert resumed.dual.state_to_save() == whole.dual.state_to_save()
    assert begun.dual.value != whole.dual.value


def test_the_refusal_of_jensun_does_not_depend_on_the_first_question(learned, prompts, tmp_path):
    longest = max(len(prompts.prompt(row.question)) for row in ROWS)
    trainer = make("jensun", learned, prompts, tmp_path, max_length=longest + 1, settings={"refusal": "I have no idea"})
    assert trainer.refusal_ids == prompts.answer("I have no idea")[:-1] and len(trainer.refusal_ids) > 1


def test_jensun_repeats_the_refusal_but_not_the_tag_of_an_answer(learned, tokenizer, tmp_path):
    prompts = PromptFormat(tokenizer, PromptConfig("plain", answer="Answer: {answer}"))
    trainer = make("jensun", learned, prompts, tmp_path, ROWS[:1], settings={"refusal": "No idea"})
    tag, refusal = trainer.tag_ids, trainer.refusal_ids
    assert tag and tokenizer.decode(tag).startswith("Answer") and tokenizer.decode(refusal).strip() == "No idea"
    moved(trainer)
    example = trainer.example(ROWS[0])
    p = np.exp(log_softmax(Plain(trainer.model).logits((example.prompt + example.answer, len(example.prompt)))[0]))
    target = np.zeros_like(p)
    for position, token in zip(range(len(p)), [*tag, *(refusal * 40)], strict=False):
        target[position, token] = 1
    expected = np.mean([jensen_shannon(*pair) for pair in zip(p, target, strict=True)])
    trainer.settings = replace(trainer.settings, lambda_unlearning=0.0)
    assert loss_of_step(trainer, ROWS[:1])[0].item() == pytest.approx(expected, rel=1e-4)


def test_answers_that_ce_u_would_not_train_on_are_named(learned, prompts, tmp_path, caplog):
    lengths = sorted(len(prompts.answer(row.answer)) - 1 for row in ROWS[:4])
    make("ceu", learned, prompts, tmp_path, ROWS[:4], settings={"skip_tokens": lengths[0]})
    assert f"method.skip_tokens={lengths[0]}: 1 of 4 forget answers have no token left to train on" in caplog.text
    with pytest.raises(UserError, match=f"method.skip_tokens={lengths[-1]}: no forget answer has more tokens"):
        make("ceu", learned, prompts, tmp_path, ROWS[:4], settings={"skip_tokens": lengths[-1]})


@pytest.mark.parametrize("name", ["kl_min", "rmu", "jensun", "undo"])
def test_methods_with_a_retain_loss_of_their_own_have_no_bound_of_it(name):
    with pytest.raises(ValidationError, match="lambda_unlearning"):
        method_named(name)[0].Settings(lambda_unlearning="auto")


def test_a_bound_of_another_retain_loss_than_the_cross_entropy_is_refused(learned, prompts, tmp_path):
    class OwnMethod(GradDiff):
        def retain_loss(self, retain):
            return 2 * retain.cross_entropy

    data = UnlearningData(ROWS[:4], ROWS[4:], prompts, max_length=64)
    with pytest.raises(UserError, match="method.lambda_unlearning=auto: OwnMethod has a retain loss other than"):
        OwnMethod(copy.deepcopy(learned), arguments(tmp_path, 4, 1), data, MethodSettings(lambda_unlearning="auto"))


@pytest.mark.parametrize("refusal", ["", " "])
def test_a_refusal_without_tokens_is_refused(refusal, learned, prompts, tmp_path):
    with pytest.raises(UserError, match="method.refusal="):
        make("jensun", learned, prompts, tmp_path, settings={"refusal": refusal})


# --- the model before unlearning -----------------------------------------------------------------------------------------


def outputs(model, prompts):
    with torch.no_grad():
        return model(torch.tensor([prompts.prompt(ROWS[0].question)])).logits


@pytest.mark.parametrize(("fraction", "tokens", "forgotten"), [(0.3, 50, 15), (0.6, 25, 15), (0.5, 3, 2), (0.01, 7, 1)])
def test_shred_forgets_the_given_fraction_of_tokens_rounded_up(fraction, tokens, forgotten):
    losses = torch.arange(tokens, dtype=torch.float32)
    rest = dict.fromkeys({field.name for field in dataclasses.fields(TokenLosses)} - {"losses", "rows", "size"})
    answers = TokenLosses(losses=losses, rows=torch.zeros(tokens, dtype=torch.long), size=1, **rest)
    assert is_forgotten(answers, fraction).tolist() == [False] * (tokens - forgotten) + [True] * forgotten


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl_min", "npo", "dpo", "undial", "rmu", "altpo", "jensun", "shred", "undo"])
def test_the_model_before_unlearning_stays_as_it_was(name, learned, prompts, tmp_path):
    trainer = make(name, learned, prompts, tmp_path, rows=ROWS[:4], learning_rate=1e-2, max_steps=3)
    trainer.train()
    trained = outputs(trainer.model, prompts)
    with trainer.reference.active() as model:
        assert not model.training
        torch.testing.assert_close(outputs(model, prompts), outputs(learned.eval(), prompts), rtol=0, atol=0)
    torch.testing.assert_close(outputs(trainer.model, prompts), trained, rtol=0, atol=0)
    assert not torch.allclose(trained, outputs(learned, prompts))


def test_with_an_adapter_nothing_but_the_adapter_is_kept_twice(learned):
    model = add_adapter(copy.deepcopy(learned), LoraSettings(r=2, alpha=4))
    kept = sum(value.numel() for value in ReferenceModel(model).start)
    adapter = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    assert kept == adapter < 0.2 * sum(value.numel() for value in learned.parameters())


def test_unlearning_an_adapter_further_starts_from_it_and_not_from_the_base_model(learned, prompts):
    """An adapter of finetuning knows what is to be unlearned; with it switched off the model would be the one before."""
    model = add_adapter(copy.deepcopy(learned), LoraSettings(r=2, alpha=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value += torch.randn(value.shape, generator=generator)
    finetuned = outputs(model, prompts)
    reference = ReferenceModel(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.zero_()
    with reference.active():
        torch.testing.assert_close(outputs(model, prompts), finetuned, rtol=0, atol=0)
    torch.testing.assert_close(outputs(model, prompts), outputs(learned, prompts))


def test_autocast_s_memory_of_cast_weights_does_not_mix_the_two_models(learned, prompts):
    """Under autocast a parameter's bfloat16 copy is remembered by the parameter, whatever its data."""
    model = copy.deepcopy(learned).train()
    before = copy.deepcopy(learned).eval()
    reference = ReferenceModel(model)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1
    after = copy.deepcopy(model)
    ids = torch.tensor([prompts.prompt(ROWS[0].question)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(ids).logits
        with reference.active():
            of_reference = model(ids).logits
        second = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(of_reference, before(ids).logits, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = after(ids).logits
    torch.testing.assert_close(first, expected, rtol=0, atol=0)
    torch.testing.assert_close(second, expected, rtol=0, atol=0)
    second.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_an_error_inside_leaves_the_present_weights_in_place(learned, prompts):
    model = copy.deepcopy(learned)
    reference = ReferenceModel(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    present = outputs(model, prompts)
    with pytest.raises(MemoryError), reference.active():
        raise MemoryError
    torch.testing.assert_close(outputs(model, prompts), present, rtol=0, atol=0)


def test_settings_of_fsdp_that_cannot_be_gathered_are_refused(learned, prompts, tmp_path, monkeypatch):
    """Accelerate's environment turns them on as well. Then the training arguments say nothing."""
    original = Trainer.create_accelerator_and_postprocess

    def create(trainer):
        original(trainer)
        trainer.is_fsdp_enabled = True
        offloaded = {"cpu_offload": CPUOffloadPolicy(), "cpu_ram_efficient_loading": True}
        plugin = SimpleNamespace(fsdp_version=2, state_dict_type="FULL_STATE_DICT", **offloaded)
        monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    found, settings = method_named("grad_diff")
    data = UnlearningData(ROWS, ROWS, prompts, 64)
    message = "FSDP with cpu_offload=true, cpu_ram_efficient_loading=true: the weights cannot be gathered"
    with pytest.raises(UserError, match=message):
        found(copy.deepcopy(learned), arguments(tmp_path, 2, 1), data, settings)


@pytest.mark.parametrize(
    ("stage", "bf16", "message"),
    [
        (3, False, "ZeRO-3 .*sharding=fsdp does that job"),
        (2, True, "training.bf16=true: DeepSpeed would"),
        (2, False, None),
    ],
)
def test_settings_of_deepspeed_that_cannot_work_are_refused_however_it_was_turned_on(stage, bf16, message):
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage), bf16=bf16, fp16=False)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_deepspeed(args)


def test_a_fluency_weight_is_refused_with_sharded_weights(learned, prompts, tmp_path, monkeypatch):
    original = Trainer.create_accelerator_and_postprocess

    def create(trainer):
        original(trainer)
        trainer.is_fsdp_enabled = True
        usable = {"cpu_offload": OffloadPolicy(), "cpu_ram_efficient_loading": False}
        plugin = SimpleNamespace(fsdp_version=2, state_dict_type="FULL_STATE_DICT", **usable)
        monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    data = UnlearningData(ROWS, ROWS, prompts, 64)
    with pytest.raises(UserError, match=r"FSDP: method.fluency_weight=0.5 runs the reference model"):
        PMC(copy.deepcopy(learned), arguments(tmp_path, 2, 1), data, PMCSettings(fluency_weight=0.5))


def test_sharding_is_refused_without_a_gpu(learned, prompts, tmp_path):
    trainer = make("grad_diff", learned, prompts, tmp_path)
    trainer.args.fsdp = True
    with pytest.raises(UserError, match="training.fsdp: there is no GPU here"):
        trainer.check_sharding()


def test_a_method_that_did_not_ask_for_it_cannot_use_it(learned, prompts, tmp_path):
    trainer = make("grad_diff", learned, prompts, tmp_path)
    (batch,), _ = trainer.get_batch_samples(iter([ROWS[:2]]), 1, None)
    with pytest.raises(RuntimeError, match="needs_reference"):
        _ = trainer.token_losses(trainer.model, batch)["forget"].reference


# --- refusals and alternatives -------------------------------------------------------------------------------------------


def test_refusals_are_drawn_by_seed_step_and_row(learned, prompts, tmp_path):
    def drawn(**more):
        trainer = make("idk", learned, prompts, tmp_path, rows=ROWS, **more)
        first = trainer.forget_examples(ROWS)
        assert trainer.forget_examples(ROWS[::-1]) == first[::-1]
        trainer.state.global_step = 1
        return first, trainer.forget_examples(ROWS)

    first, later = drawn()
    assert first != later
    assert drawn()[0] == first
    assert drawn(seed=1)[0] != first


def test_the_list_of_refusals_has_no_line_twice():
    refusals = read_refusals("data/refusals.txt")
    assert len(refusals) == len(set(refusals)) >= 50
    assert all(line.endswith((".", "!")) for line in refusals)


def test_alternatives_are_other_answers_and_survive_a_checkpoint(learned, prompts, tmp_path):
    trainer = make("altpo", learned, prompts, tmp_path, rows=ROWS, settings={"max_length": 48, "max_recall": 0.4})
    for row in ROWS:
        texts = [prompts.text(answer) for answer in trainer.alternatives[row.index]]
        assert len(texts) <= trainer.settings.num_alternatives
        assert all(text and text != row.answer and rouge_l_recall(row.answer, text) <= 0.4 for text in texts)
    state = json.loads(json.dumps(trainer.state_to_save()))
    other = AltPO(copy.deepcopy(learned), trainer.args, trainer.data, trainer.settings)
    other.load_state(state)
    assert all(other.preferred_example(row) == trainer.preferred_example(row) for row in ROWS)


def test_every_step_draws_one_of_the_alternatives(learned, prompts, tmp_path):
    trainer = make("altpo", learned, prompts, tmp_path)
    trainer.alternatives = {0: [[5, 2], [6, 2], [7, 2]]}
    drawn = set()
    for step in range(30):
        trainer.state.global_step = step
        drawn.add(tuple(trainer.preferred_example(ROWS[0]).answer))
    assert drawn == {(5, 2), (6, 2), (7, 2)}


def test_a_question_with_too_few_alternatives_is_asked_again_hotter_and_then_left_alone(
    learned, prompts, tmp_path, monkeypatch, caplog
):
    """Row 0 gets nothing but its answer, row 1 an alternative of two at the first attempt and the other at the third."""
    from unlearning.methods import altpo

    asked = []

    def generate(model, asked_prompts, settings, ends, keys, description):
        asked.append((len(asked_prompts), settings.temperature))
        truths = {0: prompts.answer(ROWS[0].answer), 1: prompts.answer(ROWS[1].answer)}
        others = {1: {0: [[5, 2]], 2: [[6, 2], [7, 2]]}}
        return [[truths[row], *others.get(row, {}).get(attempt, [])] for _, attempt, row, _ in keys]

    monkeypatch.setattr(altpo, "generate", generate)
    trainer = make("altpo", learned, prompts, tmp_path, settings={"num_alternatives": 2})
    assert asked == [(2, 1.0), (2, 1.25), (2, 1.25**2), (1, 1.25**3), (1, 1.25**4)]
    assert trainer.alternatives == {0: [], 1: [[5, 2], [6, 2]]}
    assert "for 1 of 2 questions no sample differs enough from the forget answer" in caplog.text
    preferred, forgotten = trainer.forget_groups(ROWS[:1])[0]
    assert preferred == forgotten, "the margin of such a pair is 0 and has no gradient"


@pytest.mark.parametrize("name", ["wga", "satimp"])
def test_the_weight_of_a_token_has_no_gradient(name, learned, prompts, tmp_path):
    trainer = make(name, learned, prompts, tmp_path)
    (batch,), _ = trainer.get_batch_samples(iter([ROWS[:2]]), 1, None)
    forget = trainer.token_losses(trainer.model, batch)["forget"]
    (gradient,) = torch.autograd.grad(trainer.forget_loss(forget), forget.losses)
    p, s = (-forget.losses.detach()).exp(), trainer.settings
    weight = p**s.beta if name == "wga" else p**s.beta1 * (1 - p) ** s.beta2
    torch.testing.assert_close(gradient, -weight / len(p))


@pytest.mark.slow
def test_a_row_whose_answer_is_cut_away_counts_nothing(learned, prompts, tmp_path):
    """Its prompt fills max_length: no answer token, a finite loss."""
    rows = [ROWS[0], replace(ROWS[1], question="Who? " * 60)]
    for name in OTHERS:
        trainer = make(name, learned, prompts, tmp_path, rows=rows) if name != "altpo" else None
        if trainer:
            batches, _ = trainer.get_batch_samples(iter([rows]), 1, None)
            assert torch.isfinite(sum(trainer.compute_loss(trainer.model, batch) for batch in batches)), name


# --- RMU's layer and weights -----------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama": SMALL,
    "phi": SMALL,
    "gemma3_text": {**SMALL, "head_dim": 8, "num_key_value_heads": 2},
    "gemma3": {
        "text_config": {**SMALL, "head_dim": 8, "num_key_value_heads": 2, "vocab_size": 400},
        "vision_config": {**SMALL, "image_size": 28, "patch_size": 14},
    },
    "gemma": {**SMALL, "head_dim": 8, "num_key_value_heads": 2},
    "qwen2": SMALL,
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4},
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt_neox"])
def test_rmu_finds_layer_and_weights_of_an_architecture(architecture, lora, tokenizer):
    model = new_model(NewModelConfig(architecture, ARCHITECTURES[architecture], 400), tokenizer, "float32")
    if lora:
        model = add_adapter(model, LoraSettings(r=2, alpha=4))
    layers = steered_layers(model, RMUSettings())
    assert [re.search(r"\d+", name).group() for name in layers] == ["0", "1", "2"], "a third of the way up six"
    assert not any("vision" in name for name in layers)
    trained = trained_parameters(model, layers, RMUSettings())
    assert {re.search(r"\d+", name).group() for name in trained} == {"0", "1", "2"}
    assert all(re.search("down_proj|fc2|c_proj", name) for name in trained)
    assert all(("lora_" in name) == lora for name in trained)


def test_rmu_names_the_candidates_where_nothing_matches(tokenizer):
    model = new_model(NewModelConfig("gpt_neox", ARCHITECTURES["gpt_neox"], 400), tokenizer, "float32")
    with pytest.raises(UserError, match=r"method\.trained=.*candidates: .*layers\.N\.mlp\.dense_4h_to_h\.weight"):
        trained_parameters(model, steered_layers(model, RMUSettings()), RMUSettings())
    with pytest.raises(UserError, match=r"method\.layers=floors\\\.: .*candidates: gpt_neox\.layers\.N"):
        steered_layers(model, RMUSettings(layers=r"floors\."))
    with pytest.raises(UserError, match=r"method\.layer=6: this model has the layers 0 to 5"):
        steered_layers(model, RMUSettings(layer=6))
    assert steered_layers(model, RMUSettings(layer=0)) == ["gpt_neox.layers.0"]


def test_rmu_trains_nothing_else(learned, prompts, tmp_path):
    trainer = make("rmu", learned, prompts, tmp_path, rows=ROWS[:4], learning_rate=1e-2, max_steps=2)
    trainer.train()
    start = dict(learned.named_parameters())
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}


def test_rmu_steers_to_a_direction_of_the_seed_s_own(learned, prompts, tmp_path):
    one, same, other = (make("rmu", learned, prompts, tmp_path, seed=seed).target for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_rmu_trains_under_gradient_checkpointing(learned, prompts, tmp_path):
    """The reentrant kind gives no gradient to a layer whose input needs none, as that of the frozen embedding."""
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make("rmu", learned, prompts, tmp_path, learning_rate=1e-2, max_steps=2, **more)
    trainer.train()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(trainer.model.get_parameter(name), learned.get_parameter(name))


# --- the command line --------------------------------------------------------------------------------------------------------


def test_every_method_runs_end_to_end(models_dir):
    """One sweep over all methods, as a user types it."""
    done = run_stage(
        "unlearning",
        "-m",
        "-cd=configs",
        "-cn=unlearn-tiny",
        f"models_dir={models_dir}",
        f"method={','.join(METHODS)}",
        "training.num_epochs=1",
        "training.save_strategy=no",
        "data.splits.forget='forget[:8]'",
        "data.splits.forget_paraphrased='forget_perturbed[:8]'",
        "data.splits.retain='retain[:12]'",
        "data.splits.real_authors=null",
        "data.splits.world_facts=null",
        "evaluation.start=false",
        "save_model=false",
    )
    folders = {}
    for file in (models_dir / "unlearned/unlearn-tiny").glob("seed-0+data.splits.forget*/result.json"):
        module = json.loads(file.read_text())["config"]["method"]["_target_"].split(".")[-2]
        folders[module] = file.parent
    assert sorted(folders) == sorted(METHODS)
    for name, folder in folders.items():
        result = json.loads((folder / "result.json").read_text())
        assert 0 < result["scores"]["utility"] <= 100, name
        (record,) = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        losses = {"collapse_loss" if name == "pmc" else "forget_loss", "retain_loss"}
        without = {"grad_ascent": {"retain_loss"}, "shred": {"retain_loss"}, "retain_finetuning": {"forget_loss"}}
        losses -= without.get(name, set())
        assert {key for key in record if key.endswith("_loss")} == losses, name
        assert all(math.isfinite(value) for value in record.values()), name
    assert "Unlearning with NPO" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=npo", "method.betta=1"], "method.betta: no such key; did you mean 'method.beta'?"),
        (["method=rmu", "method.layers=floors"], "method.layers=floors: it matches no module of this model"),
    ],
)
def test_a_wrong_setting_is_named_on_the_command_line(overrides, message, models_dir):
    done = run_stage("unlearning", "-cn=unlearn-tiny", f"models_dir={models_dir}", *overrides, check=False)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_settings_of_another_method_s_recipe_are_named_together(monkeypatch):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("PMC-unlearn-tiny", ["method=npo"])
    monkeypatch.setattr("unlearning.main.typed_overrides", lambda: ["method=npo", "seed=1"])
    with pytest.raises(
        UserError, match="^method: the recipe sets num_samples, temperature, .* which NPO does not have"
    ):
        check_settings_are_of_the_method(cfg, method_class(cfg))
