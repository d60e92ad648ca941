"""PMC's own steps: scores, selection, the memory, the initial responses, and that the forget answers are never read."""

import logging
import math
import random
from dataclasses import replace

import pytest
import torch

from tests.helpers import ROWS, arguments, make_trainer
from unlearning.pmc import PMC, Candidate, PMCSettings, scores, select
from unlearning.rewards import rouge_l
from unlearning.trainer import UnlearningData


def test_reward_is_one_minus_recall_against_the_initial_response():
    reference = "the cat sat on the mat"
    found = rouge_l(reference, ["the cat sat on the mat", "the cat", "dogs bark", ""])
    assert found == [0.0, 1 - 2 / 6, 1.0, 1.0]


def test_short_samples_score_worse_by_min_len():
    assert scores([1.0, 1.0, 0.5, 1.0], ["", "one", "one two", "one two three"], min_len=3) == [
        1.0,
        math.exp(-1),
        0.5 + math.exp(-2),
        0.0,
    ]
    assert scores([0.1], ["one"], min_len=3) == [1.0], "never more than 1"
    assert scores([1.0], [""], min_len=0) == [0.0], "off by default: an empty answer is perfect"


@pytest.mark.parametrize(
    ("stored", "candidates", "expected"),
    [
        (None, [(0.5, 1), (0.25, 2), (0.25, 3)], (0.25, 2)),  # the lowest, the first of equals
        ((0.25, 9), [(0.5, 1), (0.25, 2)], (0.25, 2)),  # an equal one replaces the stored
        ((0.2, 9), [(0.5, 1), (0.25, 2)], (0.2, 9)),  # a worse one does not
        ((0.2, 9), [(0.1, 1)], (0.1, 1)),
    ],
)
def test_selection_and_memory(stored, candidates, expected):
    def pick(pair):
        return Candidate(pair[0], [pair[1]])

    assert select(stored and pick(stored), [pick(pair) for pair in candidates]) == pick(expected)


def test_a_penalty_decides_between_scores_that_are_close():
    gibberish, fluent = Candidate(0.0, [1], penalty=0.5), Candidate(0.25, [2], penalty=0.125)
    assert (gibberish.cost, fluent.cost) == (0.5, 0.375)
    assert select(None, [gibberish, fluent]) == fluent
    assert select(fluent, [gibberish]) == fluent, "the stored pick is compared by its cost, too"
    assert select(fluent, []) == fluent, "all candidates may have been stopped"


def plain_surprise(model, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean().item()


def test_penalties_are_mean_surprise_under_the_model_before_unlearning(model, prompts, tmp_path):
    settings = PMCSettings(num_samples=3, max_length=48, temperature=1.0, fluency_weight=0.5)
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    answers = {0: [[7, 8, 2], [9, 2]], 1: [[5, 6, 7, 8, 9, 10, 2]]}
    expected = [[plain_surprise(model, prompts.prompt(ROWS[i].question), ids) for ids in answers[i]] for i in (0, 1)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer.memory = {1: Candidate(0.5, [3, 2], penalty=0.25)}
    candidates = [
        [Candidate(0.25, ids) for ids in answers[0]],
        [Candidate(0.75, answers[1][0]), Candidate(0.76, [4, 2])],
    ]
    found = trainer.penalized(ROWS[:2], candidates)
    assert [[pick.answer for pick in picks] for picks in found] == [answers[0], answers[1]], "0.76 > 0.5 + 0.25 is lost"
    for picks, own in zip(found, expected, strict=True):
        assert [pick.penalty for pick in picks] == pytest.approx([0.5 * surprise for surprise in own], rel=1e-4)
        assert all(pick.score in (0.25, 0.75) for pick in picks)


def test_only_candidates_that_may_still_win_are_asked_about(model, prompts, tmp_path, monkeypatch):
    """1000 random questions: fewer passes than candidates, and the pick of a selection that knows all penalties."""
    trainer = make_trainer(
        model, prompts, tmp_path, settings=PMCSettings(num_samples=2, max_length=48, fluency_weight=0.1)
    )
    rng, asked, total = random.Random(0), [], 0

    def surprise(examples):
        asked.extend(examples)
        return [float(example.answer[0]) for example in examples]  # an answer's id is how surprising it is

    monkeypatch.setattr(trainer, "surprise", surprise)
    for _ in range(1000):
        candidates = [
            Candidate(rng.choice([0.0, 0.2, 0.4, 0.6, 0.8]), [rng.random() * 6]) for _ in range(rng.randint(1, 6))
        ]
        stored = Candidate(rng.random(), [0], penalty=rng.random() / 2) if rng.random() < 0.5 else None
        trainer.memory = {0: stored} if stored else {}
        complete = [replace(pick, penalty=0.1 * pick.answer[0]) for pick in candidates]
        (penalized,) = trainer.penalized(ROWS[:1], [candidates])
        assert select(stored, penalized) == select(stored, complete)
        total += len(candidates)
    assert len(asked) < 0.7 * total


def test_a_fluency_weight_makes_the_picks_likelier_before_unlearning(memorized, prompts, tmp_path):
    start = {name: value.clone() for name, value in memorized.state_dict().items()}
    surprise = {}
    for weight in (0.001, 1.0):
        memorized.load_state_dict(start)
        settings = PMCSettings(num_samples=16, max_length=60, temperature=2.0, fluency_weight=weight)
        trainer = make_trainer(memorized, prompts, tmp_path, settings=settings)
        trainer.forget_examples(ROWS)
        surprise[weight] = sum(pick.penalty / weight for pick in trainer.memory.values()) / len(ROWS)
    assert 0 < surprise[1.0] < 0.8 * surprise[0.001]


def test_initial_responses_are_the_greedy_answers(model, prompts, tmp_path):
    trainer = make_trainer(model, prompts, tmp_path)
    ids = prompts.prompt(ROWS[3].question)
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_length=48, pad_token_id=1)[0, len(ids) :]
    assert trainer.initial_responses[3] == prompts.text(expected)


def test_collapse_warmup_lets_gamma_grow_over_its_epochs(model, prompts, tmp_path):
    """Seven rows, two a step, so four steps an epoch, the last a short one: the first of eight has an eighth of gamma."""
    settings = PMCSettings(num_samples=3, max_length=48, gamma=2.0, lambda_unlearning=3.0, collapse_warmup_epochs=2)
    trainer = make_trainer(model, prompts, tmp_path, ROWS[:7], batch_size=1, accumulation=2, settings=settings)
    weights = []
    for step in range(10):
        trainer.state.global_step = step
        weights.append(trainer.loss_weights())
    assert weights == [(min(2.0, 2.0 * (step + 1) / 8), 3.0) for step in range(10)]
    trainer = make_trainer(model, prompts, tmp_path, settings=replace(settings, collapse_warmup_epochs=0))
    assert trainer.loss_weights() == (2.0, 3.0), "off by default"


def test_collapse_warmup_counts_the_steps_of_all_processes(model, prompts, tmp_path, monkeypatch):
    """Seven rows, two a step on each of two processes: two steps an epoch."""
    settings = PMCSettings(num_samples=3, max_length=48, collapse_warmup_epochs=2)
    trainer = make_trainer(model, prompts, tmp_path, ROWS[:7], batch_size=1, accumulation=2, settings=settings)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    assert trainer.loss_weights()[0] == 1 / 4


def test_a_run_with_all_options_trains_with_the_weights_of_its_steps(memorized, prompts, tmp_path):
    """Temperature, penalties and warm-up together, through the trainer, stopped and gone on with: gamma * step / 8."""
    options = {"stalled_temperature_factor": 2.0, "fluency_weight": 0.05, "collapse_warmup_epochs": 2}
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
    assert weights == [min(1.0, step / 8) for step in range(1, 11)]
    assert all(loss == pytest.approx(float(expected), rel=1e-5) for loss, expected in losses)
    assert trainer.reference and trainer.memory, "the other options are on"


def test_the_forget_answers_are_never_looked_at(model, prompts, tmp_path):
    """Other ground truths, the same run: PMC needs the questions alone."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    histories = []
    for answers in ("a secret", "quite another one"):
        model.load_state_dict(start)
        rows = [replace(row, answer=answers) for row in ROWS]
        trainer = make_trainer(model, prompts, tmp_path, rows, learning_rate=1e-2, max_steps=3)
        trainer.train()
        histories.append((trainer.memory, [p.clone() for p in model.parameters()]))
    assert histories[0][0] == histories[1][0]
    assert all(torch.equal(a, b) for a, b in zip(histories[0][1], histories[1][1], strict=True))


def test_what_is_picked_does_not_depend_on_order_or_micro_batches(model, prompts, tmp_path):
    """The sampler's randomness is keyed by (seed, step, row index), so a whole window equals many small ones."""
    memories = []
    for rows, batch_size, accumulation in ((ROWS, 8, 1), (ROWS[::-1], 1, 8), (ROWS[3:] + ROWS[:3], 2, 4)):
        trainer = make_trainer(model, prompts, tmp_path, rows, batch_size, accumulation)
        trainer.train()
        memories.append(trainer.memory)
    assert memories[0] == memories[1] == memories[2]
    assert sorted(memories[0]) == [row.index for row in ROWS]


def test_a_question_at_score_zero_is_not_sampled_again_but_goes_on_being_trained(model, prompts, tmp_path, monkeypatch):
    trainer = make_trainer(model, prompts, tmp_path)
    trainer.memory = {0: Candidate(0.0, [7, 8, 2]), 1: Candidate(0.5, [9, 2])}
    asked = []
    monkeypatch.setattr(
        trainer, "sample", lambda rows, _: asked.extend(row.index for row in rows) or [[[5, 2]]] * len(rows)
    )
    examples = trainer.forget_examples(ROWS[:3])
    assert asked == [1, 2]
    assert examples[0].answer == [7, 8, 2]
    assert examples[0].prompt == prompts.prompt(ROWS[0].question)


def test_the_trained_answer_is_the_sampled_ids_with_their_end_token(model, prompts, tmp_path):
    trainer = make_trainer(model, prompts, tmp_path)
    (example,) = trainer.forget_examples(ROWS[:1])
    assert example.answer == trainer.memory[0].answer
    end, full = prompts.eos_token_id, len(example) == trainer.settings.max_length
    assert example.answer[-1] == end or full
    assert end not in example.answer[:-1]


def test_a_reward_of_ones_own_is_named_by_its_dotted_path(model, prompts, tmp_path):
    settings = PMCSettings(num_samples=2, max_length=48, reward={"_target_": "tests.helpers.shouting"})
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    trainer.forget_examples(ROWS[:2])
    assert {pick.score for pick in trainer.memory.values()} == {0.75}


def test_an_over_memorized_model_is_called_so_after_two_epochs(model, prompts, tmp_path, caplog):
    trainer = make_trainer(model, prompts, tmp_path)
    with caplog.at_level(logging.WARNING, logger="unlearning.pmc"):
        trainer.warn_when_stalled(0.9)
        assert not caplog.records
        trainer.warn_when_stalled(0.4)
        trainer.warn_when_stalled(0.9)
        assert not caplog.records, "two epochs running"
        trainer.warn_when_stalled(0.9)
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
        picked[factor] = [record["selected_score"] for record in trainer.history]
    assert picked[1.0] == [1.0] * 8
    assert picked[2.0][0] == 1.0
    assert picked[2.0][-1] < 0.5
    assert trainer.temperature_multipliers == {}


def test_the_temperature_rises_while_all_is_the_initial_response_and_falls_back(model, prompts, tmp_path, monkeypatch):
    settings = PMCSettings(num_samples=2, max_length=48, temperature=1.2, stalled_temperature_factor=3.0)
    trainer = make_trainer(model, prompts, tmp_path, settings=settings)
    drawn, texts = [], []

    def draw(_model, asked, *_, temperatures, **__):
        drawn.append(temperatures)
        return [[prompts.answer(text) for text in texts[-1]] for _ in asked]

    monkeypatch.setattr("unlearning.pmc.generate", draw)
    initial = trainer.initial_responses[0] = "one two three four"
    for answers in ([initial] * 2, [initial] * 2, [initial] * 2, [initial] * 2, [initial, "one two"], [initial] * 2):
        texts.append(answers)
        trainer.forget_examples(ROWS[:1])
    assert drawn == [
        [pytest.approx(1.2 * temperature_multipliers)] for temperature_multipliers in (1, 3, 9, 10, 10, 1)
    ], "MAX_TEMPERATURE_MULTIPLIER is the end"
    assert trainer.memory[0].score == 0.5


def test_a_pick_that_stays_for_its_fluency_does_not_heat_a_question_whose_samples_differ(model, prompts, tmp_path):
    trainer = make_trainer(model, prompts, tmp_path, settings=PMCSettings(stalled_temperature_factor=3.0))
    trainer.memory = {0: Candidate(1.0, [5, 2])}
    trainer.adapt_temperature(ROWS[0], [Candidate(1.0, [5, 2]), Candidate(1.0, [5, 2])])
    assert trainer.temperature_multipliers == {0: 3.0}
    trainer.adapt_temperature(ROWS[0], [Candidate(1.0, [5, 2]), Candidate(0.5, [6, 2])])
    assert trainer.temperature_multipliers == {}


def test_state_survives_a_checkpoint(model, prompts, tmp_path):
    import json

    trainer = make_trainer(model, prompts, tmp_path)
    trainer.train()
    trainer.temperature_multipliers = {3: 1.5}
    trainer.memory[3] = Candidate(0.5, [7, 2], penalty=0.25)
    state = json.loads(json.dumps(trainer.state_to_save()))
    other = make_trainer(model, prompts, tmp_path)
    other.initial_responses = {}
    other.load_state(state)
    for name in ("memory", "initial_responses", "temperature_multipliers", "history"):
        assert getattr(other, name) == getattr(trainer, name)
