"""What a reader of a report must know to compare its scores: runs that do not count, and scores of different inputs."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from common.results import evaluation_inputs
from common.runs import flattened
from evaluation.metrics.registry import METRIC_GROUPS, inputs_of_groups, lengths_and_type
from evaluation.run_records import Group, Run, place, shown_value, without_seeds


def notices(groups: Sequence[Group]) -> list[str]:
    """All notices on the runs of these groups, as sentences."""
    runs = [run for group in groups for run in group.runs]
    methods = [run for run in runs if not run.reference]
    return [
        *repeated(groups),
        *(sentence for run in runs for sentence in of_run(run)),
        *made_with_other_programs(runs),
        *unequal_seeds(groups, methods),
        *references_with_other_inputs(groups, methods),
        *evaluations_with_other_inputs(runs),
    ]


def repeated(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        for run in group.repeated:
            yield f"{place(run.folder)}: {group.label} has another run of seed {run.seed}, and this one is not counted."


def of_run(run: Run) -> Iterator[str]:
    """Headline scores that a run lacks, a run that was begun again, and evaluations that contradict each other."""
    lacking = [name for name in ("unlearn_quality", "utility") if run.scores.get(name) is None]
    if lacking and not run.reference:
        yield f"{place(run.folder)}: its result has no {' and no '.join(lacking)}."
    if run.begun_again:
        yield f"{place(run.folder)}: a newer run was begun here and is unfinished; the scores are of the older one."
    if disagreeing := run.contradictions:
        texts = [f"{name} ({' and '.join(f'{value:.4g}' for value in values)})" for name, values in disagreeing.items()]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        yield (
            f"{place(run.folder)}: its evaluations do not agree on {', '.join(texts[:3])}{more}; the newest ones count. "
            "They differ in a seed, a data type or another setting."
        )


def made_with_other_programs(runs: Sequence[Run]) -> Iterator[str]:
    """What differs between the programs and machines that made the results, with all known values."""
    values: dict[str, dict[str, None]] = {}
    for result in [result for run in runs for result in (run.result, *run.evaluations.values())]:
        versions = result.get("versions") or {}
        known = {
            "device": result.get("device"),
            "git_commit": re.sub(r"^(\w{12})\w*", r"\1", result.get("git_commit") or ""),
        }
        known |= {name: versions.get(name) for name in ("torch", "transformers")}
        for key, value in known.items():
            if value:
                values.setdefault(key, {})[str(value)] = None
    if differing := [f"{key} ({', '.join(of_key)})" for key, of_key in values.items() if len(of_key) > 1]:
        yield f"The results were made with different {'; '.join(differing)}."


def unequal_seeds(groups: Sequence[Group], methods: Sequence[Run]) -> Iterator[str]:
    seeds = sorted({run.seed for run in methods}, key=lambda seed: (seed is None, seed))
    lacking = []
    for group in groups:
        own = {run.seed for run in group.runs}
        if not group.reference and (missing := [str(seed) for seed in seeds if seed not in own]):
            lacking.append(f"{group.label} (no seed {', '.join(missing)})")
    if lacking:
        more = f"; and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        named = "; ".join(lacking[:4]) + more
        yield f"Not all settings have the same seeds: {named}. Some of the differences may be due to the seeds."


def references_with_other_inputs(groups: Sequence[Group], methods: Sequence[Run]) -> Iterator[str]:
    for group in groups:
        if group.reference and (keys := _other_inputs(group.runs[0].config, methods)):
            yield f"{group.label} was evaluated with another {', '.join(keys)}: do not compare its scores with the others."


def _other_inputs(config: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    """The inputs of an evaluation that differ from those of all runs, with both values, where both are known."""
    here = dict(flattened(evaluation_inputs(config)))
    found = []
    for run in runs:
        there = dict(flattened(evaluation_inputs(run.config)))
        both = {key: (here[key], there[key]) for key in here if here[key] is not None and there.get(key) is not None}
        shown = {key: [shown_value(without_seeds(value)) for value in values] for key, values in both.items()}
        found = [f"{key} ({ours}, not {theirs})" for key, (ours, theirs) in shown.items() if ours != theirs]
        if not found:
            break
    return found


def evaluations_with_other_inputs(runs: Sequence[Run]) -> Iterator[str]:
    """The inputs of the metric groups, apart from the headline scores', in which the evaluations differ."""
    values: dict[str, set[str]] = {}
    weights: dict[tuple[str, int | None], set[str]] = {}  # name of a model to compare with, and seed -> its ids
    for run in runs:
        for result in run.evaluations.values() or ([run.result] if "metrics" in run.config else []):
            for key, value in inputs_of_scores(result).items():
                if value is not None:  # not recorded, or not given
                    values.setdefault(key, set()).add(shown_value(without_seeds(value)))
            for name in compared_models(result):
                if known := result["config"].get("compared_to", {}).get(name, {}).get("id"):
                    weights.setdefault((name, run.seed), set()).add(known)
    differing = [f"{key} ({', '.join(sorted(of_key))})" for key, of_key in sorted(values.items()) if len(of_key) > 1]
    trained_again = sorted({name for (name, _), ids in weights.items() if len(ids) > 1})
    differing += [f"the weights of {name}" for name in trained_again if len(values[f"{name}.path"]) == 1]
    if differing:
        yield f"The evaluations differ in {'; '.join(differing)}: scores that depend on it cannot be compared."


def compared_models(result: dict[str, Any]) -> list[str]:
    """The other models that the scores of an evaluation compare to: retain_model, base_model or both."""
    groups = [METRIC_GROUPS[name] for name in _groups_of(result)]
    return [name for name in ("retain_model", "base_model") if any(getattr(group, f"reads_{name}") for group in groups)]


def inputs_of_scores(result: dict[str, Any]) -> dict[str, Any]:
    """The settings that the scores of an evaluation depend on, apart from `evaluation_inputs`: dotted key -> value."""
    config, groups = result["config"], _groups_of(result)
    inputs = inputs_of_groups(config, groups) if groups else lengths_and_type(config)
    inputs |= {f"{name}.{key}": value for name in groups for key, value in flattened(config.get(name) or {}) if key}
    for name in compared_models(result):
        other = config.get("compared_to", {}).get(name) or config.get(name) or {}
        inputs |= {f"{name}.path": other.get("path"), f"{name}.revision": other.get("revision")}
    return inputs


def _groups_of(result: dict[str, Any]) -> list[str]:
    """The metric groups that an evaluation has scores of; headline scores have no group in their names."""
    return sorted({name.partition("/")[0] for name in result["scores"]} & METRIC_GROUPS.keys())
