"""The loss of every response token, and of no other."""

import pytest
import torch

from common.collate import collate
from common.errors import UserError
from common.losses import answer_losses, check_finite
from common.prompts import Example


def test_losses_stand_on_answer_tokens_alone(model):
    """Two rows of unequal length: three answer tokens and one, none on a prompt or on padding."""
    batch = collate([Example([5, 6], [7, 8, 2]), Example([9, 10, 11], [2])])
    losses, rows = answer_losses(model, batch)
    assert rows.tolist() == [0, 0, 0, 1]
    alone = model(torch.tensor([[9, 10, 11, 2]])).logits[0, 2].log_softmax(-1)[2]
    assert losses[3].item() == pytest.approx(-alone.item(), rel=1e-5)


def test_losses_do_not_depend_on_the_pad_token(model):
    examples = [Example([5, 6], [7, 8, 2]), Example([9], [2])]
    one, _ = answer_losses(model, collate(examples, pad_id=0))
    other, _ = answer_losses(model, collate(examples, pad_id=13))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        check_finite(logits)


def test_an_impossible_token_is_no_error():
    check_finite(torch.tensor([[0.0, -float("inf")]]))
