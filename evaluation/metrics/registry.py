"""Which families of metrics are measured, and in which order: one call evaluates one model.

A family is what is switched on and off, because its scores cost the same passes; `metrics` names families or groups.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import ListConfig

from common.config import RunConfig, problem_list
from common.data import load_splits
from common.errors import UserError, did_you_mean
from evaluation.context import EvaluationContext
from evaluation.metrics import (
    fluency,
    headline,
    lm_eval_harness,
    memorization,
    prefill,
    privacy,
    quantization,
    relearning,
    sampling,
    side_effects,
    target_suppression,
    tofu,
)
from evaluation.scores import Evaluation, Scores

log = logging.getLogger(__name__)

# Those that ask the model itself stand first, then those that also ask the models it is compared to, then those that need
# changed copies: so the weights in memory change seldom.
FAMILIES: dict[str, Callable[[EvaluationContext, Scores], None]] = {
    "headline": headline.measure,
    "memorization": memorization.measure,
    "sampling": sampling.measure_sampling,
    "prefill": prefill.measure_prefill,
    "target_suppression": target_suppression.measure_target_suppression,
    "lm_eval": lm_eval_harness.measure,
    "tofu": tofu.measure,
    "privacy": privacy.measure,
    "side_effects": side_effects.measure_side_effects,
    "fluency": fluency.measure_fluency,
    "quantization": quantization.measure,
    "relearning": relearning.measure,
}
# Those that read other splits than the headline scores.
ROLES: dict[str, tuple[str, ...]] = {
    "tofu": tuple(tofu.ROLES.values()),
    "privacy": privacy.SPLITS,
    "side_effects": ("unrelated",),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "full": tuple(name for name in FAMILIES if name != "lm_eval"),
    "attacks": ("sampling", "prefill", "target_suppression", "quantization", "relearning"),
}
SETTINGS: dict[str, type] = {
    "sampling": sampling.SamplingAttack,
    "relearning": relearning.Relearning,
    "quantization": quantization.Quantization,
    "lm_eval": lm_eval_harness.Harness,
}


def chosen(metrics: Any) -> list[str]:
    """The families that `metrics`, a name or a list of names, stands for, as they are measured; headline is always among them.

    Raises:
        UserError: for a name that is neither a family nor a group.
    """
    names = list(metrics) if isinstance(metrics, list | ListConfig) else [metrics]
    known = {**{name: (name,) for name in FAMILIES}, **GROUPS}
    problems = [
        f"metrics={name}: no such metrics{did_you_mean(str(name), known)} (known: {', '.join(known)})"
        for name in names
        if name not in known
    ]
    if problems:
        raise UserError(problem_list(problems))
    wanted = {"headline", *(family for name in names for family in known[name])}
    return [name for name in FAMILIES if name in wanted]


def check_data(config: RunConfig, families: Sequence[str]) -> None:
    """Before anything is measured: a split that is named and not there would end the evaluation half-way.

    Raises:
        UserError: for the splits that the families read.
    """
    headline.load_questions(config.data, config.evaluation)
    roles = dict.fromkeys(role for family in families for role in ROLES.get(family, ()))
    load_splits(config.data, tuple(role for role in roles if config.data.splits.get(role) is not None))


def measure(context: EvaluationContext, families: Sequence[str]) -> Evaluation:
    """Measure the families on one model.

    A family's seconds hold those of the passes that it was the first to ask for, and of the models that it is compared to.
    """
    scores, seconds = Scores(), {}
    started, passes = time.perf_counter(), dict(context.outputs.seconds)
    for name in families:
        before = time.perf_counter()
        FAMILIES[name](context, scores)
        seconds[name] = time.perf_counter() - before
        log.info("%s: %.1f s", name, seconds[name])
    seconds |= {f"passes/{name}": value - passes.get(name, 0.0) for name, value in context.outputs.seconds.items()}
    return Evaluation(scores, {"evaluation": time.perf_counter() - started, **seconds})
