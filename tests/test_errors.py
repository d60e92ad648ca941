"""Errors that a user can mend say how."""

import errno

import pytest

from common.errors import UserError, did_you_mean, full_disk_as_user_error


def test_the_closest_word_is_suggested():
    assert did_you_mean("tempreture", ["top_p", "temperature"]) == "; did you mean 'temperature'?"
    assert did_you_mean("method.lamda", ["method.gamma", "method.lambda_unlearning"]).endswith(
        "'method.lambda_unlearning'?"
    )
    assert did_you_mean("m.temperatur", ["m.stalled_temperature_factor", "m.temperature"]).endswith("'m.temperature'?")
    assert did_you_mean("zzz", ["top_p", "temperature"]) == ""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_called_so(error):
    with (
        pytest.raises(UserError, match=r"/models: no space left.*save_model=false") as caught,
        full_disk_as_user_error("/models"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyError("x"), UserError("mine")])
def test_other_errors_are_not_called_a_full_disk(error):
    with pytest.raises(type(error)) as caught, full_disk_as_user_error("/models"):
        raise error
    assert caught.value is error
