"""Relearning changes copies alone, neither the checkpoint nor the model that other metrics use; so does quantization."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.context import Loader
from evaluation.metrics import quantization, relearning
from evaluation.metrics.relearning import Relearning, select_relearn_rows
from evaluation.scores import Scores
from tests.helpers import ROWS, no_model


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def answer_probabilities(context):
    return [t.log_probs for t in context.outputs.tokens_of_answers([(row.question, row.answer) for row in ROWS])]


@pytest.mark.slow
@pytest.mark.parametrize("group", [relearning, quantization])
def test_checkpoint_and_model_stay_as_they_are(context, group):
    before, shared = files(context.model.config.path), context.outputs.load()
    weights = [parameter.clone() for parameter in shared.parameters()]
    group.measure(context, Scores())
    assert files(context.model.config.path) == before
    assert all(torch.equal(*pair) for pair in zip(weights, shared.parameters(), strict=True))
    after = answer_probabilities(context)
    fresh = Loader().open(context.config, context.model.config)
    untouched = [t.log_probs for t in fresh.outputs.tokens_of_answers([(row.question, row.answer) for row in ROWS])]
    assert all((one == other).all() for one, other in zip(after, untouched, strict=True))


@pytest.mark.slow
def test_relearning_teaches_the_copy(context):
    scores = Scores()
    relearning.measure(context, scores)
    before = sum(log_probs.mean() for log_probs in answer_probabilities(context)[:4])
    assert scores.values["relearning/probability"] > 1.5 * torch.tensor(before / 4).exp()
    assert scores["relearning/probability"].count == 4
    recalls = relearning.recalls(context.outputs, ROWS[:4])
    gained = scores.values["relearning/rougeL_recall"] - sum(recalls) / 4
    assert scores.values["relearning/rougeL_recall_gained"] == pytest.approx(gained)
    retain = context.find_retain_model().cache["relearning"]["recall"]
    beyond = scores.values["relearning/rougeL_recall"] - sum(retain) / 4
    assert scores.values["relearning/rougeL_recall_beyond_retain_model"] == pytest.approx(beyond)
    assert scores.values["relearning/rougeL_recall"] > sum(recalls) / 4 and sum(retain) > 0


def test_relearning_teaches_a_bfloat16_model_as_well(context):
    before = [parameter.clone() for parameter in context.outputs.load().parameters()]
    context.config.sections["relearning"] = Relearning(batch_size=2)
    context.model.config = replace(context.model.config, dtype="bfloat16")
    after = relearning.relearn(context, context.model, context.rows("forget")).load().parameters()
    assert all((one != other).float().mean() > 0.5 for one, other in zip(before, after, strict=True))


def test_relearning_against_itself_brings_nothing_back_and_is_done_once(context, monkeypatch):
    calls = []
    real = relearning.relearn
    monkeypatch.setattr(relearning, "relearn", lambda *args: calls.append(1) or real(*args))
    context.find_retain_model = lambda: context.model
    scores = Scores()
    relearning.measure(context, scores)
    assert scores.values["relearning/rougeL_recall_beyond_retain_model"] == 0 and len(calls) == 1


def test_a_fraction_is_taught_and_the_others_are_scored_by_themselves(context):
    context.config.sections["relearning"].fraction = 0.5
    context.find_retain_model = no_model
    scores = Scores()
    relearning.measure(context, scores)
    rows = context.rows("forget")
    relearn_rows = select_relearn_rows(rows, 0.5, 0)
    others = scores.rows["relearning/rougeL_recall_not_relearned"]["values"]
    assert [value is None for value in others] == [row in relearn_rows for row in rows] and len(relearn_rows) == 2
    assert scores["relearning/rougeL_recall_beyond_retain_model"].note == "none is given"
    relearn_rows = select_relearn_rows(ROWS, 0.25, 0)
    assert (
        len(relearn_rows) == 2
        and relearn_rows == select_relearn_rows(ROWS, 0.25, 0)
        and select_relearn_rows(ROWS, 1.0, 0) == ROWS
    )
    assert len(select_relearn_rows(ROWS, 0.01, 0)) == 1
