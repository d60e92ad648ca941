"""Means are taken over the rows that have a value, and a missing score has a note with the reason."""

import pytest

from evaluation.scores import Missing, Scores


def test_rows_without_a_value_are_counted_and_left_out():
    scores = Scores()
    scores.mean("a", "forget", [1.0, None, 0.0], True)
    assert (scores.values["a"], scores["a"].count, scores["a"].left_out) == (0.5, 2, 1)
    assert scores.rows["a"] == {"split": "forget", "values": [1.0, None, 0.0]}
    scores.mean("b", "forget", [1.0], False)
    assert scores["b"].left_out == 0 and scores.as_result()["higher_is_better"] == {"a": True, "b": False}
    assert scores.as_result()["left_out"] == {"a": 1} and scores.as_result()["notes"] == {}


def test_a_mean_over_no_row_is_null_and_says_so():
    scores = Scores()
    scores.mean("a", "forget", [None, None], True)
    assert scores.values == {"a": None} and scores.as_result()["counts"] == {"a": 0} and scores["a"].left_out == 2
    assert scores["a"].note == "no row of forget has a value"


def test_what_is_missing_makes_scores_null_with_the_reason_and_keeps_what_was_found():
    scores = Scores()
    with scores.null_if_missing({"a": True, "b": None}):
        scores.add("a", 1.0, True)
        raise Missing("data.splits.x is not given")
    assert scores.values == {"a": 1.0, "b": None}
    assert scores.as_result()["notes"] == {"b": "data.splits.x is not given"}


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), Scores().null_if_missing({"a": True}):
        _ = 1 / 0
