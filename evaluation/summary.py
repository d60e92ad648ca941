"""What a report says in words: which setting to use, what was forgotten, what it cost, and what is only hidden."""

from collections.abc import Sequence
from statistics import fmean

from evaluation.notices import notices
from evaluation.run_records import Group, differences
from evaluation.tables import cell, is_number

ALLOWED_COST = 3.0  # points of utility that the recommended setting may lose
FORGET, PROBABILITY = "rougeL_recall/forget", "tofu/probability/forget"
EXTRACTION, RELEARNED = "memorization/extraction_strength", "relearning/rougeL_recall"
SPLITS = {"retain": "retain questions", "real_authors": "real authors", "world_facts": "world facts"}


def recommended(groups: Sequence[Group]) -> Group | None:
    """The setting with the highest unlearn quality of those that lose at most ALLOWED_COST points of utility.

    None if no setting does, if the scores cannot be compared, or if the finetuned model's utility is not known.
    """
    if differences([run for group in groups for run in group.runs]):
        return None
    return max(affordable(groups), key=lambda group: group.average("unlearn_quality"), default=None)


def affordable(groups: Sequence[Group]) -> list[Group]:
    """The settings that lose at most ALLOWED_COST points of the finetuned model's utility; none if that is not known."""
    before = reference(groups, "finetuned")
    if before is None:
        return []
    return [group for group in measured(groups) if lost_utility(group, before) <= ALLOWED_COST]


def lost_utility(group: Group, before: Group) -> float:
    """The points of utility that unlearning cost, averaged over the runs: each is compared to the finetuned model of its seed.

    Where there is none, to the average of the finetuned models.
    """
    of_seed = {run.seed: run.scores["utility"] for run in before.runs if is_number(run.scores.get("utility"))}
    pairs = [(of_seed.get(run.seed, before.average("utility")), run.scores.get("utility")) for run in group.runs]
    return fmean(finetuned - utility for finetuned, utility in pairs if is_number(utility))


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups of unlearned models that have both headline scores."""
    return [
        group for group in groups if not group.reference and group.values("unlearn_quality") and group.values("utility")
    ]


def reference(groups: Sequence[Group], name: str) -> Group | None:
    """The reference model of this name; None if there is none, or more than one."""
    found = [group for group in groups if group.reference and group.name == name and group.values("utility")]
    return found[0] if len(found) == 1 else None


def never_trained(groups: Sequence[Group], score: str) -> Group | None:
    """A model that never saw the forget set and has the score: a retain-only model, else the one before finetuning."""
    known = [group for group in groups if group.reference and group.values(score) and _saw_no_forget_row(group)]
    return min(known, key=lambda group: group.name == "vanilla", default=None)


def _saw_no_forget_row(group: Group) -> bool:
    """Whether it is the model before finetuning, or was trained on the retain split, as its configuration says."""
    splits = group.runs[0].config["data"].get("splits", {})
    return group.name == "vanilla" or (splits.get("train") is not None and splits["train"] == splits.get("retain"))


def summary(groups: Sequence[Group]) -> list[str]:
    """The report's sentences."""
    return [*decision(groups), *notices(groups)]


def decision(groups: Sequence[Group]) -> list[str]:
    """Which setting to use, what was forgotten and what it cost; empty without a finished run of unlearning."""
    methods = measured(groups)
    if not methods:
        return []
    if problems := differences([run for group in methods for run in group.runs]):
        return [f"These runs cannot be ranked: {' and '.join(problems)}."]
    if len(methods) == 1:
        return described(methods[0], groups)
    chosen = recommended(groups)
    if chosen is None:
        before = reference(groups, "finetuned")
        if before is None:
            return [
                "No setting is recommended: the utility of one finetuned model is needed for that, and is not here."
            ]
        least = min(methods, key=lambda group: lost_utility(group, before))
        lost = lost_utility(least, before)
        return [
            f"No setting keeps utility within {ALLOWED_COST:g} points of the finetuned model's {shown(before, 'utility')}. "
            f"The smallest loss is {lost:.1f} points, by {least.label}, at unlearn quality {shown(least, 'unlearn_quality')}.",
            *described(least, groups),
        ]
    return [*choice(chosen, groups), *described(chosen, groups)]


def choice(chosen: Group, groups: Sequence[Group]) -> list[str]:
    """Which setting to use, and which others are as good as far as the seeds tell."""
    methods = measured(groups)
    before, allowed = reference(groups, "finetuned"), affordable(groups)
    of_those = "all settings" if len(allowed) == len(methods) else f"the {len(allowed)} of {len(methods)} settings"
    advice = (
        f"Use {chosen.label}. It"
        if has_forgotten(chosen, groups) is not False
        else f"No setting is recommended: none that keeps utility has forgotten the answers. {chosen.label}"
    )
    quality = (
        f"unlearn quality ({shown(chosen, 'unlearn_quality')}; {shown(before, 'unlearn_quality')} before unlearning)"
    )
    utility = f"points of utility ({shown(chosen, 'utility')}; {shown(before, 'utility')} before)"
    if len(allowed) == 1 < len(methods):
        reason = f"is the only one of {len(methods)} settings that loses at most {ALLOWED_COST:g} {utility}; {quality}"
    else:
        reason = f"has the highest {quality} of {of_those} that lose at most {ALLOWED_COST:g} {utility}"
    sentences = [f"{advice} {reason}."]
    others = sorted(
        (group for group in allowed if group is not chosen), key=lambda group: -group.average("unlearn_quality")
    )
    if others and min(len(group.runs) for group in (chosen, *others)) > 1:
        near = [group for group in others if not apart(chosen, group)]
        names = "; ".join(f"{group.label} ({shown(group, 'unlearn_quality')})" for group in near[:4] or others[:1])
        more = f"; and {len(near) - 4} more" if len(near) > 4 else ""
        verdict = (
            "The seeds do not tell it apart from"
            if near
            else "By more than the deviation over seeds, it is above the next,"
        )
        sentences.append(f"{verdict} {names}{more}.")
    elif others:
        sentences.append("Some settings have one seed only: small differences between settings may be chance.")
    most = max(methods, key=lambda group: group.average("utility"))
    if most is not chosen:
        sentences.append(
            f"The highest utility ({shown(most, 'utility')}) is that of {most.label}, "
            f"at unlearn quality {shown(most, 'unlearn_quality')}."
        )
    return sentences


def apart(a: Group, b: Group) -> bool:
    """Whether the means of unlearn quality differ by more than the larger of the two standard deviations over seeds."""
    deviations = [group.deviation("unlearn_quality") or 0.0 for group in (a, b)]
    return abs(a.average("unlearn_quality") - b.average("unlearn_quality")) > max(deviations)


def has_forgotten(group: Group, groups: Sequence[Group]) -> bool | None:
    """Whether its recall of forget answers is below the middle of the finetuned model's and that of one that never saw them.

    Without a model that never saw them, below half of the finetuned model's. None if one of the recalls is not known.
    """
    finetuned, unseen = reference(groups, "finetuned"), never_trained(groups, FORGET)
    if finetuned is None or not finetuned.values(FORGET) or not group.values(FORGET):
        return None
    lower = unseen.average(FORGET) if unseen else 0.0
    return group.average(FORGET) < (lower + finetuned.average(FORGET)) / 2


def described(group: Group, groups: Sequence[Group]) -> list[str]:
    """What the setting made the model forget, what that cost, and whether answers are removed or hidden."""
    before, unseen = reference(groups, "finetuned"), never_trained(groups, FORGET)
    sentences = []
    if group.values(FORGET):
        others = [(before, "before unlearning")] if before else []
        others += [(unseen, f"in {unseen.name}, which never saw them")] if unseen else []
        compared = ", ".join(f"{percent(model.average(FORGET))} {words}" for model, words in others)
        verdict = {True: "Forgotten: its", False: "Not forgotten: its", None: "Its"}[has_forgotten(group, groups)]
        sentences.append(
            f"{verdict} answers to forget questions have {percent(group.average(FORGET))} of the words of the true answers"
            f"{f' ({compared})' if compared else ''}."
        )
    if before:
        parts = [
            f"{words} {percent(before.average(score))} → {percent(group.average(score))}"
            for split, words in SPLITS.items()
            if group.values(score := f"rougeL_recall/{split}") and before.values(score)
        ]
        lost = lost_utility(group, before)
        cost = (
            f"utility {'falls' if lost > 0 else 'rises'} by {abs(lost):.1f} points"
            if round(lost, 1)
            else "utility stays"
        )
        details = f" (words of the true answers: {'; '.join(parts)})" if parts else ""
        sentences.append(f"Cost: {cost}{details}.")
    if empty := group.average("forget_answers_empty"):
        sentences.append(f"{percent(empty)} of its answers to forget questions are empty.")
    sentences.append(hidden_or_removed(group, groups))
    return sentences


def hidden_or_removed(group: Group, groups: Sequence[Group]) -> str:
    """Whether the true answers are still in the model although greedy decoding does not give them."""
    evidence, hidden = [], False
    for score, words, margin in (
        (PROBABILITY, "the probability of a token of the true answers is", 0.05),
        (EXTRACTION, "the fraction that the start of an answer brings out is", 0.1),
        (RELEARNED, "after relearning, answers have this fraction of the true words:", 0.1),
    ):
        unseen = never_trained(groups, score)
        if not group.values(score) or unseen is None:
            continue
        hidden = hidden or group.average(score) > unseen.average(score) + margin
        evidence.append(
            f"{words} {group.average(score):.2f} ({unseen.average(score):.2f} in {unseen.name}, which never saw them)"
        )
    if not evidence:
        return (
            "Whether the answers are removed or only hidden was not measured. To measure it: python evaluation/main.py "
            "-cd=configs -cn=evaluate 'metrics=[tofu,memorization,relearning]' model.path=FOLDER (this run's, and that of a "
            "model that never saw the answers), then python evaluation/report.py models/unlearned models/evaluated."
        )
    verdict = "Hidden rather than removed" if hidden else "Removed, as far as was measured"
    return f"{verdict}: {'; '.join(evidence)}."


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%"


def shown(group: Group, score: str) -> str:
    return cell(score, group.values(score), 1)
