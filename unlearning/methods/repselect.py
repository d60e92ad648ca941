"""RepSelect (arXiv 2606.17168): gradient difference whose forget gradient has its top principal components collapsed.

    loss = gamma * -CE(forget) + lambda_unlearning * CE(retain)

The collapse is described in `unlearning/gradient_collapse.py`, and works with other methods by their
`collapsed_components`. The authors' code has no retain loss (`method.lambda_unlearning=0`), collapses 300 to 600 components
of models with some thousand dimensions, and uses SGD, because Adam was worse.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=repselect
"""

from pydantic import PositiveInt

from common.config import section
from unlearning.methods.grad_diff import GradDiff
from unlearning.trainer import MethodSettings


@section
class RepSelectSettings(MethodSettings):
    collapsed_components: PositiveInt = 16


class RepSelect(GradDiff):
    """Makes the forget answers less likely along directions that other text does not share."""

    Settings = RepSelectSettings
