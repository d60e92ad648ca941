"""PMC's own steps: scores, selection, the best so far, the initial responses, and that the forget answers are never read."""

import copy
import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from common.collate import IGNORED
from common.errors import UserError
from common.prompts import Example
from tests.helpers import ROWS, arguments, gradients_of_one_step, make_trainer
from unlearning.pmc import PMC
from unlearning.pmc_options import InitialResponseLosses, PMCSettings, StalledTemperature
from unlearning.rewards import Scorer, penalize_short, rouge_l
from unlearning.selection import Candidate, draw, select
from unlearning.trainer import UnlearningData


def test_reward_is_one_minus_recall_against_the_initial_response():
    reference = "the cat sat on the mat"
    found = rouge_l(reference, ["the cat sat on the mat", "the cat", "dogs bark", ""])
    assert found == [0.0, 1 - 2 / 6, 1.0, 1.0]


def test_short_samples_lose_reward_by_min_len():
    assert penalize_short([1.0, 1.0, 0.5, 1.0], ["", "one", "one two", "one two three"], min_len=3) == [
        0.0,
        1 - math.exp(-1),
        0.5 - math.exp(-2),
        1.0,
    ]
    assert penalize_short([0.1], ["one"], min_len=3) == [0.0], "never less than 0"
    assert penalize_short([1.0], [""], min_len=0) == [1.0], "off by default: an empty answer is perfect"


@pytest.mark.parametrize(
    ("best", "candidates", "expected"),
    [
        (None, [(0.5, 1), (0.75, 2), (0.75, 3)], (0.75, 2)),  # the highest, the first of equals
        ((0.75, 9), [(0.5, 1), (0.75, 2)], (0.75, 2)),  # an equal one replaces the best so far
        ((0.8, 9), [(0.5, 1), (0.75, 2)], (0.8, 9)),  # a worse one does not
        ((0.8, 9), [(0.9, 1)], (0.9, 1)),
    ],
)
def test_selection_and_best_so_far(best, candidates, expected):
    def candidate(pair):
        return Candidate(pair[0], [pair[1]])

    assert select(best and candidate(best), [candidate(pair) for pair in candidates]) == candidate(expected)


def test_a_penalty_decides_between_rewards_that_are_close():
    gibberish, fluent = Candidate(1.0, [1], penalty=0.5), Candidate(0.75, [2], penalty=0.125)
    assert (gibberish.net_reward, fluent.net_reward) == (0.5, 0.625)
    assert select(None, [gibberish, fluent]) == fluent
    assert select(fluent, [gibberish]) == fluent, "the best so far is compared by its net reward, too"
    assert select(fluent, []) == fluent, "all candidates may have been stopped"


def test_a_sample_is_drawn_with_the_probability_of_the_bradley_terry_model():
    candidates = [Candidate(0.5, [0]), Candidate(1.0, [1], penalty=0.25), Candidate(0.0, [2])]
    rng = np.random.default_rng(0)
    drawn = [draw(candidates, 0.5, rng).answer[0] for _ in range(4000)]
    weights = [math.exp(net / 0.5) for net in (0.5, 0.75, 0.0)]
    for index, weight in enumerate(weights):
        assert drawn.count(index) / 4000 == pytest.approx(weight / sum(weights), abs=0.03)
    assert draw(candidates, 1e-4, rng) == candidates[1], "near 0 the highest reward, without overflow"


def test_with_a_selection_temperature_the_best_so_far_never_worsens_and_no_sample_is_stopped(
    memorized, prompts, tmp_path
):
    picked = []
    for selection, rows, batch_size in ((1.0, ROWS, 4), (1.0, ROWS[::-1], 1), (0.0, ROWS, 4)):
        settings = PMCSettings(num_samples=3, max_length=48, temperature=3.0, selection_temperature=selection)
        trainer = make_trainer(memorized, prompts, tmp_path, rows, batch_size, 8 // batch_size, settings)
        assert trainer.stops_early == (selection == 0)
        trainer.best = {row.index: Candidate(0.0, [9, 2]) for row in ROWS}
        trainer.train()
        picked.append(trainer.best)
    assert picked[0] == picked[1], "the draw is keyed by (seed, step, row), so it does not depend on the order"
    rewards = [[best[row.index].reward for row in ROWS] for best in picked]
    assert all(drawn <= highest for drawn, highest in zip(rewards[0], rewards[2], strict=True))
    assert rewards[0] != rewards[2], "for some question another sample than the best was drawn"
    trainer = make_trainer(memorized, prompts, tmp_path, settings=replace(settings, selection_temperature=1.0))
    trainer.best[0] = Candidate(0.5, [9, 2])
    for reward, expected in ((0.25, [9, 2]), (0.5, [8, 2])):
        trainer.select(ROWS[:1], [[Candidate(reward, [8, 2])]])
        assert trainer.best[0].answer == expected, "an equal sample replaces the best so far, a worse one does not"


def test_a_drawn_selection_has_the_penalty_of_every_candidate(model, prompts, tmp_path):
    settings = PMCSettings(num_samples=2, max_length=48, fluency_weight=0.1, selection_temperature=1.0)
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    candidates = [[Candidate(0.0, [5, 2]), Candidate(1.0, [6, 2])]]
    penalized = trainer.fluency.penalize([prompts.prompt(ROWS[0].question)], [None], candidates, all_of_them=True)
    assert [c.answer for c in penalized[0]] == [[5, 2], [6, 2]]
    assert all(c.penalty > 0 for c in penalized[0])


def test_a_sample_that_was_cut_is_trained_with_an_end_token(model, prompts, tmp_path):
    trainer = make_trainer(model, prompts, tmp_path)
    trainer.best = {0: Candidate(1.0, [7, 8, 9]), 1: Candidate(1.0, [7, 8, prompts.eos_token_id])}
    examples = [trainer.own_example(row, trainer.best[row.index].answer) for row in ROWS[:2]]
    assert [example.answer for example in examples] == [[7, 8, prompts.eos_token_id]] * 2
    assert examples[0].prompt == prompts.prompt(ROWS[0].question)


def mean_nll_by_hand(model, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean().item()


def test_penalties_are_the_mean_nll_under_the_reference_model(model, prompts, tmp_path):
    settings = PMCSettings(num_samples=3, max_length=48, temperature=1.0, fluency_weight=0.5)
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    answers = {0: [[7, 8, 2], [9, 2]], 1: [[5, 6, 7, 8, 9, 10, 2]]}
    expected = [[mean_nll_by_hand(model, prompts.prompt(ROWS[i].question), ids) for ids in answers[i]] for i in (0, 1)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    best = [None, Candidate(0.5, [3, 2], penalty=0.25)]
    candidates = [
        [Candidate(0.75, ids) for ids in answers[0]],
        [Candidate(0.25, answers[1][0]), Candidate(0.24, [4, 2])],
    ]
    found = trainer.fluency.penalize([prompts.prompt(row.question) for row in ROWS[:2]], best, candidates)
    assert [[c.answer for c in own] for own in found] == [answers[0], answers[1]], (
        "0.24 < 0.5 - 0.25 cannot be selected"
    )
    for penalized, nll in zip(found, expected, strict=True):
        assert [c.penalty for c in penalized] == pytest.approx([0.5 * value for value in nll], rel=1e-4)
        assert all(c.reward in (0.25, 0.75) for c in penalized)


def test_the_nll_of_only_those_candidates_is_computed_that_may_still_be_selected(model, prompts, tmp_path, monkeypatch):
    """1000 random questions: fewer passes than candidates, and the selection that all penalties would give."""
    settings = PMCSettings(num_samples=2, max_length=48, fluency_weight=0.1)
    fluency = make_trainer(model, prompts, tmp_path, settings=settings).fluency
    rng, computed, total = random.Random(0), [], 0

    def mean_nll(examples):
        computed.extend(examples)
        return [float(example.answer[0]) for example in examples]  # an answer's id is its NLL

    monkeypatch.setattr(fluency, "mean_nll", mean_nll)
    for _ in range(1000):
        candidates = [
            Candidate(rng.choice([1.0, 0.8, 0.6, 0.4, 0.2]), [rng.random() * 6]) for _ in range(rng.randint(1, 6))
        ]
        best = Candidate(rng.random(), [0], penalty=rng.random() / 2) if rng.random() < 0.5 else None
        complete = [replace(candidate, penalty=0.1 * candidate.answer[0]) for candidate in candidates]
        (penalized,) = fluency.penalize([[5]], [best], [candidates])
        assert select(best, penalized) == select(best, complete)
        total += len(candidates)
    assert len(computed) < 0.7 * total


def test_a_fluency_weight_makes_the_selected_samples_likelier_under_the_reference_model(memorized, prompts, tmp_path):
    start = {name: value.clone() for name, value in memorized.state_dict().items()}
    nll = {}
    for weight in (0.001, 1.0):
        memorized.load_state_dict(start)
        settings = PMCSettings(num_samples=16, max_length=60, temperature=2.0, fluency_weight=weight)
        trainer = make_trainer(memorized, prompts, tmp_path, settings=settings)
        trainer.forget_examples(ROWS)
        nll[weight] = sum(candidate.penalty / weight for candidate in trainer.best.values()) / len(ROWS)
    assert 0 < nll[1.0] < 0.8 * nll[0.001]


def test_initial_responses_are_the_greedy_answers(model, prompts, tmp_path):
    trainer = make_trainer(model, prompts, tmp_path)
    ids = prompts.prompt(ROWS[3].question)
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_length=48, pad_token_id=1)[0, len(ids) :]
    assert trainer.initial_responses[3] == prompts.text(expected)


def test_a_run_with_all_options_trains_with_the_weights_that_are_set(memorized, prompts, tmp_path):
    """Temperature and penalties together, through the trainer, stopped and resumed."""
    options = {"stalled_temperature_factor": 2.0, "fluency_weight": 0.05, "gamma": 0.5}
    settings = PMCSettings(num_samples=4, max_length=60, temperature=4.0, **options)
    weights, losses = [], []

    class Noting(PMC):
        def get_batch_samples(self, *args):
            found = super().get_batch_samples(*args)
            weights.append(self.weights["forget"])
            return found

        def compute_loss(self, *args, **kwargs):
            sums = dict(self.epoch_sums)
            loss = super().compute_loss(*args, **kwargs)
            new = {part: self.epoch_sums[part] - sums.get(part, 0.0) for part in ("forget_loss", "retain_loss")}
            losses.append((loss.item(), self.weights["forget"] * new["forget_loss"] + 1.5 * new["retain_loss"]))
            return loss

    for stop, resume in ((3, None), (10, True)):
        data = UnlearningData(ROWS[:7], ROWS[::-1], prompts, max_length=64)
        more = {"learning_rate": 1e-3, "max_steps": stop, "save_strategy": "steps", "save_steps": 3}
        trainer = Noting(memorized, arguments(tmp_path, 1, 2, **more), data, settings)
        trainer.before_training()
        trainer.train(resume_from_checkpoint=resume)
    assert weights == [0.5] * 10
    assert all(loss == pytest.approx(float(expected), rel=1e-5, abs=1e-6) for loss, expected in losses)
    assert trainer.reference and trainer.best, "the options are on"


@pytest.mark.parametrize("options", [{}, {"relabeling_weight": 1.0, "contrast_weight": 1.0}])
def test_the_forget_answers_are_never_looked_at(options, memorized, prompts, tmp_path):
    """Other ground truths, the same run: PMC needs the questions alone."""
    model, settings = memorized, PMCSettings(num_samples=3, max_length=48, **options)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    histories = []
    for answers in ("a secret", "quite another one"):
        model.load_state_dict(start)
        rows = [replace(row, answer=answers) for row in ROWS]
        trainer = make_trainer(model, prompts, tmp_path, rows, settings=settings, learning_rate=1e-2, max_steps=3)
        trainer.train()
        histories.append((trainer.best, [p.clone() for p in model.parameters()]))
    assert histories[0][0] == histories[1][0]
    assert all(torch.equal(a, b) for a, b in zip(histories[0][1], histories[1][1], strict=True))


def test_what_is_picked_does_not_depend_on_order_or_micro_batches(model, prompts, tmp_path):
    """The sampler's randomness is keyed by (seed, step, row index), so a whole window equals many small ones."""
    picked = []
    for rows, batch_size, accumulation in ((ROWS, 8, 1), (ROWS[::-1], 1, 8), (ROWS[3:] + ROWS[:3], 2, 4)):
        trainer = make_trainer(model, prompts, tmp_path, rows, batch_size, accumulation)
        trainer.train()
        picked.append(trainer.best)
    assert picked[0] == picked[1] == picked[2]
    assert sorted(picked[0]) == [row.index for row in ROWS]


def test_a_solved_question_is_not_sampled_again_but_still_trained_on(model, prompts, tmp_path, monkeypatch):
    trainer = make_trainer(model, prompts, tmp_path)
    solved = [7, 8, prompts.eos_token_id]
    trainer.best = {0: Candidate(1.0, solved), 1: Candidate(0.5, [9, prompts.eos_token_id])}
    trainer.stops_early = False
    asked = []
    monkeypatch.setattr(
        trainer, "sample", lambda rows, *_: asked.extend(row.index for row in rows) or [[[5, 2]]] * len(rows)
    )
    examples = trainer.forget_examples(ROWS[:3])
    assert asked == [1, 2]
    assert examples[0].answer == solved
    assert examples[0].prompt == prompts.prompt(ROWS[0].question)


def test_the_trained_answer_is_the_sampled_ids_with_their_end_token(model, prompts, tmp_path):
    trainer = make_trainer(model, prompts, tmp_path)
    (example,) = trainer.forget_examples(ROWS[:1])
    assert example.answer[:-1] == trainer.best[0].answer[:-1]
    assert example.answer[-1] == prompts.eos_token_id
    assert prompts.eos_token_id not in example.answer[:-1]


def test_a_reward_of_ones_own_is_named_by_its_dotted_path(model, prompts, tmp_path):
    settings = PMCSettings(num_samples=2, max_length=48, reward={"_target_": "tests.helpers.shouting"})
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    trainer.forget_examples(ROWS[:2])
    assert {candidate.reward for candidate in trainer.best.values()} == {0.25}


def scorer_that_returns(values):
    def odd(reference, samples):
        return values

    return Scorer(odd, "".join, min_len=0)


@pytest.mark.parametrize(
    "values",
    [[2.0], [-0.1], [math.nan], [math.inf], [1 + 1e-6], ["1"], [None], [], [0.5, 0.5], 0.5, "1", None],
    ids=str,
)
def test_a_reward_that_does_not_return_numbers_between_0_and_1_is_refused(values):
    scorer = scorer_that_returns(values)
    for compute in (lambda: scorer.rewards("a b", [["a"]]), lambda: scorer.upper_bound("a b", ["a"])):
        with pytest.raises(UserError) as caught:
            compute()
        message = str(caught.value)
        assert message.startswith(f"method.reward={scorer.name} returned {values!r}; expected")
        assert "a list with one number in [0, 1] per sample (samples: 1)" in message


@pytest.mark.parametrize("values", [(1.0000000000000002, -1e-17), [1, 0], torch.tensor([1.0, 0.0])], ids=str)
def test_rounding_errors_of_a_reward_are_clipped(values):
    rewards = scorer_that_returns(values).rewards("a b", [["a"], ["b"]])
    assert rewards == [1.0, 0.0] and all(type(reward) is float for reward in rewards)


def test_the_old_name_of_is_monotone_is_named_once(caplog):
    def decreasing(reference, samples):
        return [0.5 for _ in samples]

    decreasing.never_rises = True
    scorer = Scorer(decreasing, "".join, min_len=0)
    scorer.rewards("a b", [["a"]])
    assert not scorer.is_monotone
    (record,) = caplog.records
    assert "decreasing: the attribute never_rises has no effect; it is now called is_monotone" in record.getMessage()


def test_an_over_memorized_model_is_called_so_after_two_epochs(model, prompts, tmp_path, caplog):
    trainer = make_trainer(model, prompts, tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="unlearning.pmc_options"):
        trainer.temperature.warn_when_stalled(0.9)
        assert not caplog.records
        trainer.temperature.warn_when_stalled(0.4)
        trainer.temperature.warn_when_stalled(0.9)
        assert not caplog.records, "two epochs running"
        trainer.temperature.warn_when_stalled(0.9)
    assert "method.temperature (now 1)" in caplog.text


def test_a_stalled_question_is_drawn_hotter_until_its_samples_differ(memorized, prompts, tmp_path):
    """An over-memorized model: without the factor every sample is the initial response, with it PMC goes through."""
    start = {name: value.clone() for name, value in memorized.state_dict().items()}
    picked = {}
    for factor in (1.0, 2.0):
        memorized.load_state_dict(start)
        settings = PMCSettings(num_samples=4, max_length=60, temperature=1.0, stalled_temperature_factor=factor)
        more = {"learning_rate": 5e-4, "max_steps": 8}  # an epoch each
        trainer = make_trainer(memorized, prompts, tmp_path, settings=settings, **more)
        assert [trainer.initial_responses[row.index] for row in ROWS] == [row.answer for row in ROWS]
        trainer.train()
        picked[factor] = [record["selected_reward"] for record in trainer.history]
    assert picked[1.0] == [0.0] * 8
    assert picked[2.0][0] == 0.0
    assert picked[2.0][-1] > 0.5
    assert set(trainer.temperature.multipliers.values()) == {1.0}


def test_the_temperature_rises_while_all_is_the_initial_response_and_falls_back(model, prompts, tmp_path, monkeypatch):
    settings = PMCSettings(num_samples=2, max_length=48, temperature=1.2, stalled_temperature_factor=3.0)
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    drawn, texts = [], []

    trainer.stops_early = False

    def draw(_model, prompt_ids, *_, temperatures, **__):
        drawn.append(temperatures)
        return [[prompts.answer(text) for text in texts[-1]] for _ in prompt_ids]

    monkeypatch.setattr("unlearning.sampling.generate", draw)
    initial = trainer.initial_responses[0] = "one two three four"
    for answers in ([initial] * 2, [initial] * 2, [initial] * 2, [initial] * 2, [initial, "one two"], [initial] * 2):
        texts.append(answers)
        trainer.forget_examples(ROWS[:1])
    assert drawn == [[pytest.approx(1.2 * multiplier)] for multiplier in (1, 3, 9, 10, 10, 1)], (
        "MAX_TEMPERATURE_MULTIPLIER is the end"
    )
    assert trainer.best[0].reward == 0.5


def test_the_temperature_does_not_rise_for_a_question_whose_samples_differ():
    """Its best so far may equal the initial response because of a fluency penalty."""
    temperature = StalledTemperature(PMCSettings(stalled_temperature_factor=3.0))
    temperature.update(ROWS[0], [Candidate(0.0, [5, 2]), Candidate(0.0, [5, 2]), Candidate(0.0, [5, 2])])
    assert temperature.multipliers == {0: 3.0}
    temperature.update(ROWS[0], [Candidate(0.0, [5, 2]), Candidate(0.0, [5, 2]), Candidate(0.5, [6, 2])])
    assert temperature.multipliers == {0: 1.0}


def test_state_survives_a_checkpoint(model, prompts, tmp_path):
    import json

    trainer = make_trainer(model, prompts, tmp_path)
    trainer.train()
    trainer.temperature.multipliers = {3: 1.5}
    trainer.best[3] = Candidate(0.5, [7, 2], penalty=0.25)
    state = json.loads(json.dumps(trainer.state_to_save()))
    other = make_trainer(model, prompts, tmp_path)
    other.initial_responses = {}
    other.load_state(state)
    for name in ("best", "initial_responses", "history", "picks"):
        assert getattr(other, name) == getattr(trainer, name)
    assert other.temperature.multipliers == {3: 1.5}


def test_the_selected_answers_of_each_epoch_are_recorded_once(memorized, prompts, tmp_path):
    settings = PMCSettings(num_samples=4, max_length=48, temperature=2.0)
    trainer = make_trainer(memorized, prompts, tmp_path, settings=settings, max_steps=6, learning_rate=1e-3)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.epoch == int(state.epoch):
                seen.append({i: prompts.text(candidate.answer) for i, candidate in trainer.best.items()})

    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 6
    picks = trainer.row_files()["picks.jsonl"]
    before = picks[: len(ROWS)]
    assert [pick["epoch"] for pick in before] == [0] * len(ROWS) and all(pick["reward"] == 0 for pick in before)
    selected = {pick["index"]: pick["answer"] for pick in before}
    assert selected == trainer.initial_responses
    for epoch, answers in enumerate(seen, 1):
        changed = {pick["index"]: pick["answer"] for pick in picks if pick["epoch"] == epoch}
        assert all(answer != selected[index] for index, answer in changed.items()), "only changes"
        selected |= changed
        assert selected == answers
    assert len(picks) > 2 * len(ROWS)


def with_answers(trainer, end: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Give four rows initial responses and selected samples, so that all are solved; returns both by row index."""
    answers = [[7, 8, 9, 10, 11, 12, 13, 14, 15, end], [5, end], [9, 4, end], [3] * 30 + [end]]
    trainer.initial_tokens = {row.index: ids for row, ids in zip(ROWS[:4], answers, strict=True)}
    selected = {index: [20 + index, 21, end] for index in trainer.initial_tokens}
    trainer.best = {index: Candidate(1.0, ids) for index, ids in selected.items()}
    return trainer.initial_tokens, selected


def test_the_contrast_loss_has_the_gradient_of_its_formula(model, prompts, tmp_path):
    """In float64 by hand, over two micro-batches that are split by length."""
    weight, beta = 2.0, 0.7
    settings = PMCSettings(
        num_samples=2, max_length=60, lambda_unlearning=0.0, contrast_weight=weight, contrast_beta=beta
    )
    trainer = make_trainer(model, prompts, tmp_path, ROWS[:4], 2, 2, settings=settings)
    initial, selected = with_answers(trainer, prompts.eos_token_id)
    found = gradients_of_one_step(trainer)

    reference = copy.deepcopy(model).double()
    nll = {
        index: -token_log_probs(reference, prompts.prompt(ROWS[index].question), ids) for index, ids in selected.items()
    }
    old = [-token_log_probs(reference, prompts.prompt(ROWS[index].question), ids) for index, ids in initial.items()]
    collapse = torch.cat(list(nll.values())).mean()
    contrast = torch.stack([-2 / beta * torch.nn.functional.logsigmoid(beta * ids.mean()) for ids in old]).mean()
    (collapse + weight * contrast).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    (record,) = trainer.history
    expected = {"collapse_loss": collapse, "contrast_loss": contrast, "initial_nll": sum(ids.mean() for ids in old) / 4}
    assert {name: record[name] for name in expected} == {
        name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()
    }


@pytest.mark.parametrize("rows_per_pass", [None, 1])
def test_the_relabeling_loss_has_the_gradient_of_its_formula(rows_per_pass, model, prompts, tmp_path, monkeypatch):
    """In float64 by hand, beside the contrast loss; also for a response without labels, and in passes without any."""
    if rows_per_pass:
        monkeypatch.setattr(PMC, "buckets", lambda self, batch: one_row_each(batch))
    weights = {"relabeling_weight": 1.5, "contrast_weight": 0.8}
    trainer = make_trainer(model, prompts, tmp_path, ROWS[:4], 2, 2, PMCSettings(max_length=60, lambda_unlearning=0.0))
    trainer.settings = PMCSettings(max_length=60, lambda_unlearning=0.0, **weights)
    trainer.initial_losses = InitialResponseLosses(trainer, trainer.settings)
    initial, selected = with_answers(trainer, prompts.eos_token_id)
    labels = {index: [t + 30 if t > 4 else IGNORED for t in ids[:-1]] + [IGNORED] for index, ids in initial.items()}
    question = {row.index: prompts.prompt(row.question) for row in ROWS[:4]}
    trainer.relabeled = {index: Example(question[index], ids, labels=labels[index]) for index, ids in initial.items()}
    found = gradients_of_one_step(trainer)

    now = copy.deepcopy(model).double()
    picked = [-token_log_probs(now, question[index], ids) for index, ids in selected.items()]
    old = [-token_log_probs(now, question[index], ids) for index, ids in initial.items()]
    contrast = torch.stack([-2 * torch.nn.functional.logsigmoid(ids.mean()) for ids in old]).mean()
    cross_entropies = [
        -answer_logits_of(now, question[index], ids)[position].log_softmax(-1)[label]
        for index, ids in initial.items()
        for position, label in enumerate(labels[index])
        if label != IGNORED
    ]
    assert len(cross_entropies) == 11 and set(labels[3]) == {IGNORED}
    relabeling = torch.stack(cross_entropies).mean()
    (torch.cat(picked).mean() + 1.5 * relabeling + 0.8 * contrast).backward()
    for name, parameter in now.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    (record,) = trainer.history
    assert record["relabeling_loss"] == pytest.approx(relabeling.item(), rel=1e-5)
    assert record["contrast_loss"] == pytest.approx(contrast.item(), rel=1e-5)


def one_row_each(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: values[row : row + 1] for name, values in batch.items()} for row in range(len(batch["input_ids"]))]


def answer_logits_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


def token_log_probs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    log_probs = answer_logits_of(model, prompt, answer).log_softmax(-1)
    return log_probs.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize(("option", "value"), [("contrast_weight", 8.0), ("relabeling_weight", 30.0)])
def test_losses_on_initial_responses_make_them_unlikely_where_pmc_alone_leaves_them_likely(
    option, value, memorized, prompts, tmp_path
):
    start, likely = {name: value.clone() for name, value in memorized.state_dict().items()}, {}
    for weight in (0.0, value):
        memorized.load_state_dict(start)
        settings = PMCSettings(num_samples=4, max_length=60, temperature=2.0, **{option: weight})
        trainer = make_trainer(memorized, prompts, tmp_path, settings=settings, learning_rate=1e-3, max_steps=24)
        trainer.train()
        ids = [(prompts.prompt(row.question), trainer.initial_tokens[row.index]) for row in ROWS]
        likely[weight] = sum(token_log_probs(trainer.model, *pair).min().exp().item() for pair in ids) / len(ROWS)
    assert likely[value] < likely[0.0] / 3
