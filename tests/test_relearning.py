"""Relearning changes copies alone, neither the checkpoint nor the model that other metrics use; so does quantization."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.data import Row
from common.errors import UserError
from evaluation.context import Loader
from evaluation.metrics import quantization, relearning
from evaluation.metrics.relearning import Relearning, select_relearn_rows
from evaluation.plots import plot_relearning, relearning_curves
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
    retain = context.find_retain_model().cache["relearning on forget"][40]["recall"]
    beyond = scores.values["relearning/rougeL_recall"] - sum(retain) / 4
    assert scores.values["relearning/rougeL_recall_beyond_retain_model"] == pytest.approx(beyond)
    assert scores.values["relearning/rougeL_recall"] > sum(recalls) / 4 and sum(retain) > 0


def test_relearning_teaches_a_bfloat16_model_as_well(context):
    before = [parameter.clone() for parameter in context.outputs.load().parameters()]
    context.config.sections["relearning"] = Relearning(batch_size=2)
    context.model.config = replace(context.model.config, dtype="bfloat16")
    after = []

    def keep(_epoch, copy):
        after.extend(parameter.clone() for parameter in copy.load().parameters())

    relearning.relearn(context, context.model, context.rows("forget"), keep)
    assert all((one != other).float().mean() > 0.5 for one, other in zip(before, after, strict=True))


@pytest.mark.slow
def test_relearning_against_itself_brings_nothing_back_and_is_done_once(context, monkeypatch):
    calls = []
    real = relearning.relearn
    monkeypatch.setattr(relearning, "relearn", lambda *args: calls.append(1) or real(*args))
    context.find_retain_model = lambda: context.model
    scores = Scores()
    relearning.measure(context, scores)
    assert scores.values["relearning/rougeL_recall_beyond_retain_model"] == 0 and len(calls) == 1


@pytest.mark.slow
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


def weights_after(context, *num_epochs):
    """The weights of the relearned copy after each number of epochs."""
    context.config.sections["relearning"] = Relearning(num_epochs=list(num_epochs), learning_rate=1e-2, batch_size=2)
    found = {}

    def keep(epoch, copy):
        found[epoch] = [parameter.clone() for parameter in copy.load().parameters()]

    relearning.relearn(context, context.model, context.rows("forget"), keep)
    return found


@pytest.mark.slow
def test_a_measurement_does_not_depend_on_the_epochs_that_follow(context):
    one, other = weights_after(context, 1, 2), weights_after(context, 1, 2, 4)
    assert list(one) == [1, 2] and list(other) == [1, 2, 4]
    for epoch in one:
        assert all(torch.equal(*pair) for pair in zip(one[epoch], other[epoch], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(other[2], other[4], strict=True))
    decaying = weights_after(context, 2)[2]
    assert not all(torch.equal(*pair) for pair in zip(one[2], decaying, strict=True))


@pytest.mark.slow
def test_each_number_of_epochs_has_its_scores(context):
    context.config.sections["relearning"] = Relearning(num_epochs=[1, 20], learning_rate=1e-2, batch_size=2)
    scores = Scores()
    relearning.measure(context, scores)
    names = ("rougeL_recall", "probability", "rougeL_recall_gained", "rougeL_recall_beyond_retain_model")
    assert list(scores.by_name) == [f"relearning/{name}@{epochs}" for epochs in (1, 20) for name in names]
    assert scores.values["relearning/probability@20"] > 1.5 * scores.values["relearning/probability@1"]
    assert scores.rows["relearning/probability@1"]["values"] != scores.rows["relearning/probability@20"]["values"]


@pytest.mark.slow
def test_retain_rows_are_relearned_by_a_copy_of_their_own(context, monkeypatch):
    """As many as forget rows, and the forget rows are measured."""
    trained_on, real = [], relearning.relearn

    def relearn(context, model, relearn_rows, measure_epoch):
        trained_on.append(relearn_rows)
        return real(context, model, relearn_rows, measure_epoch)

    monkeypatch.setattr(relearning, "relearn", relearn)
    context.find_retain_model = no_model
    both, alone = Scores(), Scores()
    for rows, scores in ((["forget", "retain"], both), (["forget"], alone)):
        settings = Relearning(num_epochs=[5], learning_rate=1e-2, batch_size=2, rows=rows, fraction=0.5)
        context.config.sections["relearning"] = settings
        relearning.measure(context, scores)
        context.model.cache.clear()
    of_forget, of_retain, again = trained_on
    assert of_forget == again and len(of_retain) == 2
    assert {row.question for row in of_retain} < {row.question for row in ROWS[4:]}
    assert alone.values.items() <= both.values.items()
    assert both["relearning/on_retain/probability"].count == 4
    assert both.values["relearning/on_retain/probability"] < both.values["relearning/probability"]
    assert "relearning/on_retain/rougeL_recall_not_relearned" not in both.values


def test_the_curves_start_before_relearning(tmp_path):
    scores = {"rougeL_recall/forget": 0.1, "relearning/rougeL_recall@1": 0.2, "relearning/rougeL_recall@5": 0.7}
    scores |= {"relearning/rougeL_recall_gained@5": 0.6, "relearning/on_retain/rougeL_recall@5": 0.15}
    default = {"rougeL_recall/forget": 0.1, "relearning/rougeL_recall": 0.2}
    curves = relearning_curves({"A": {"scores": scores}, "B": {"scores": default}})
    assert curves == {"forget": {"A": [(0, 0.1), (1, 0.2), (5, 0.7)]}, "retain": {"A": [(0, 0.1), (5, 0.15)]}}
    assert relearning_curves({"B": {"scores": default}}) == {}
    plot_relearning(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_scores_that_are_missing_have_the_names_of_those_that_are_measured(context):
    context.config.sections["relearning"] = Relearning(num_epochs=[1, 20])
    context.config.data.splits["forget"] = None
    scores = Scores()
    relearning.measure(context, scores)
    names = [f"relearning/{name}@{epochs}" for epochs in (1, 20) for name in ("rougeL_recall", "probability")]
    assert scores.values == dict.fromkeys(names)


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_one_text_and_equal_rows_are_drawn_together(seed):
    windows = [Row(index, f"begin {index}", "go on", text=f"text {index // 3}") for index in range(6)]
    rows = [*windows, Row(6, "Who?", "Ada."), Row(7, "Who?", "Ada."), Row(8, "Where?", "Here.")]
    drawn = {row.index for row in select_relearn_rows(rows, 0.3, seed)}
    assert all(group <= drawn or not group & drawn for group in ({0, 1, 2}, {3, 4, 5}, {6, 7}))
    assert 3 <= len(drawn) < 9


def test_a_fraction_of_windows_of_one_text_is_refused():
    rows = [Row(index, f"begin {index}", "go on", text="one text") for index in range(6)]
    config = SimpleNamespace(sections={"relearning": Relearning(fraction=0.5)}, seed=0)
    with pytest.raises(UserError, match="relearning.fraction=0.5: the 6 forget rows are windows of one text or equal"):
        relearning.check_inputs(config, {"forget": rows})
    relearning.check_inputs(config, {"forget": rows[:1]})
