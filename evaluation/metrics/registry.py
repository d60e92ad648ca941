"""The metric groups, in the order in which they are measured. The key `metrics` selects groups and presets.

To add a group, write a module whose docstring lists its scores, and add an entry to METRIC_GROUPS.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import ListConfig
from tqdm.auto import tqdm

from common.config import RunConfig, problem_list
from common.data import HEADLINE_ROLES, Row, load_splits
from common.errors import UserError, did_you_mean
from common.results import HEADLINE_FIELDS
from evaluation.context import EvaluationContext
from evaluation.metrics import (
    depth,
    fluency,
    headline,
    lm_eval_harness,
    memorization,
    muse,
    openunlearning,
    prefill,
    privacy,
    quantization,
    relearning,
    sampling,
    side_effects,
    target_suppression,
    text,
    tofu,
)
from evaluation.scores import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricGroup:
    """Scores that are measured together. Their names begin with the group's (except those of `headline`).

    Attributes:
        measure: adds the scores of the evaluated model.
        roles: roles of the splits that it reads (keys of `data.splits`).
        settings: class of the configuration section with the group's name.
        check: raises UserError for unusable settings or rows (role -> its rows), before a model is loaded.
        reads_base_model: whether it compares to the model before unlearning.
        reads_retain_model: whether it compares to the retain-only model.
        reads_probabilities: whether it depends on the probabilities of given texts, which `data.max_length` cuts.
    """

    measure: Callable[[EvaluationContext, Scores], None]
    roles: Sequence[str]
    settings: type | None = None
    check: Callable[[RunConfig, dict[str, list[Row]]], None] | None = None
    reads_base_model: bool = False
    reads_retain_model: bool = False
    reads_probabilities: bool = False


# First the groups that use only the evaluated model, then those that compare it to other models, then those that change
# copies. In this order, weights are rarely loaded again.
METRIC_GROUPS = {
    "headline": MetricGroup(headline.measure, HEADLINE_ROLES),
    "memorization": MetricGroup(memorization.measure, ["forget"], reads_probabilities=True),
    "text": MetricGroup(text.measure, ["forget", "forget_passages", *text.QUESTION_ROLES]),
    "muse": MetricGroup(muse.measure, muse.ROLES, check=muse.check_inputs, reads_retain_model=True),
    "sampling": MetricGroup(sampling.measure, ["forget"], sampling.SamplingAttack),
    "prefill": MetricGroup(prefill.measure, ["forget"]),
    "target_suppression": MetricGroup(target_suppression.measure, ["forget_paraphrased"], reads_probabilities=True),
    "lm_eval": MetricGroup(lm_eval_harness.measure, [], lm_eval_harness.Harness, lm_eval_harness.check_inputs),
    "tofu": MetricGroup(
        tofu.measure,
        [*tofu.ROLES.values(), "forget_paraphrased"],
        reads_retain_model=True,
        reads_probabilities=True,
    ),
    "privacy": MetricGroup(
        privacy.measure,
        privacy.SPLITS,
        privacy.Privacy,
        privacy.check_inputs,
        reads_base_model=True,
        reads_retain_model=True,
        reads_probabilities=True,
    ),
    "openunlearning": MetricGroup(
        openunlearning.measure,
        [*tofu.ROLES.values(), "forget_paraphrased", "holdout"],
        check=privacy.check_inputs,
        reads_retain_model=True,
        reads_probabilities=True,
    ),
    "side_effects": MetricGroup(side_effects.measure, ["unrelated"], reads_base_model=True, reads_probabilities=True),
    "fluency": MetricGroup(fluency.measure, ["forget"], reads_base_model=True, reads_probabilities=True),
    "depth": MetricGroup(
        depth.measure, ["forget"], reads_base_model=True, reads_retain_model=True, reads_probabilities=True
    ),
    "quantization": MetricGroup(quantization.measure, HEADLINE_ROLES, quantization.Quantization),
    "relearning": MetricGroup(
        relearning.measure,
        ["forget", "retain"],
        relearning.Relearning,
        relearning.check_inputs,
        reads_retain_model=True,
        reads_probabilities=True,
    ),
}
PRESETS = {
    # lm_eval requires a further package and a list of tasks, text and muse a data set of texts; openunlearning repeats other
    # groups in another convention.
    "full": [name for name in METRIC_GROUPS if name not in ("lm_eval", "text", "muse", "openunlearning")],
    "attacks": ["sampling", "prefill", "target_suppression", "quantization", "relearning"],
}
SETTINGS = {name: group.settings for name, group in METRIC_GROUPS.items() if group.settings}


def chosen_groups(metrics: Any) -> list[str]:
    """The metric groups that `metrics`, a name or a list of names, selects, in their order; headline is always included.

    Raises:
        UserError: for a name that is neither a metric group nor a preset.
    """
    names = list(metrics) if isinstance(metrics, list | ListConfig) else [metrics]
    known = {name: [name] for name in METRIC_GROUPS} | PRESETS
    if unknown := [name for name in names if name not in known]:
        known_names = f"(known: {', '.join(known)})"
        problems = [
            f"metrics={name}: no such metrics{did_you_mean(str(name), known)} {known_names}" for name in unknown
        ]
        raise UserError(problem_list(problems))
    wanted = {"headline", *(group for name in names for group in known[name])}
    return [name for name in METRIC_GROUPS if name in wanted]


def check_inputs(config: RunConfig, groups: Sequence[str]) -> None:
    """Check settings and splits before anything is measured, so that an evaluation does not fail halfway.

    Raises:
        UserError: for unusable settings, and for a configured split that does not exist.
    """
    headline.load_questions(config.data, config.evaluation)
    roles = dict.fromkeys(role for name in groups for role in METRIC_GROUPS[name].roles)
    rows = load_splits(config.data, tuple(role for role in roles if config.data.splits.get(role) is not None))
    for check in dict.fromkeys(METRIC_GROUPS[name].check for name in groups):
        if check:
            check(config, rows)


def inputs_of_groups(config: dict[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """What the scores of these groups depend on in a recorded configuration, apart from `evaluation_inputs` and from the
    groups' own settings: dotted key -> value.
    """
    data, others = config["data"], [METRIC_GROUPS[name] for name in groups if name != "headline"]
    inputs: dict[str, Any] = {}
    for role in {role for group in others for role in group.roles} - set(HEADLINE_ROLES):
        inputs[f"data.splits.{role}"] = data["splits"].get(role)
        inputs[f"data.files.{role}"] = config.get("files", {}).get(role)
    if others:
        columns = data.get("columns", {}).items()
        inputs |= {f"data.columns.{field}": column for field, column in columns if field not in HEADLINE_FIELDS}
    if any(group.reads_probabilities for group in others):
        inputs |= lengths_and_type(config)
    return inputs


def lengths_and_type(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recorded configuration that token probabilities depend on: dotted key -> value."""
    return {"data.max_length": config["data"].get("max_length"), "model.dtype": config["model"].get("dtype")}


def measure_groups(context: EvaluationContext, groups: Sequence[str]) -> Scores:
    """The scores of one model.

    A group's seconds include computing the model outputs that no earlier group used, also those of the other models.
    """
    scores, seconds = Scores(), {}
    started, earlier = time.perf_counter(), dict(context.outputs.seconds)
    for number, name in enumerate(groups, 1):
        log.info("metric group %d of %d: %s", number, len(groups), name)
        before = time.perf_counter()
        METRIC_GROUPS[name].measure(context, scores)
        seconds[name] = time.perf_counter() - before
        elapsed = tqdm.format_interval(time.perf_counter() - started)
        log.info("%s: %.1f s, elapsed %s", name, seconds[name], elapsed)
    seconds |= {f"outputs/{name}": value - earlier.get(name, 0.0) for name, value in context.outputs.seconds.items()}
    scores.seconds = {"evaluation": time.perf_counter() - started, **seconds}
    return scores
