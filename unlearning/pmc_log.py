"""What PMC records of an epoch: means of its losses, samples and selections (history.jsonl), and the selected answers
(picks.jsonl)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unlearning.selection import Candidate

if TYPE_CHECKING:
    from unlearning.pmc import PMC


def sample_sums(
    selected: Sequence[Candidate], candidates: Sequence[Sequence[Candidate]], stopped_early: int
) -> dict[str, float]:
    """The counts and sums of one optimizer step, of which `epoch_record` records the means.

    Args:
        selected: the selected sample of each question of the step.
        candidates: the samples of each question that was sampled.
        stopped_early: number of samples that were stopped.
    """
    samples = [candidate for of_question in candidates for candidate in of_question]
    return {
        "questions": len(selected),
        "selected_reward": sum(candidate.reward for candidate in selected),
        "selected_penalty": sum(candidate.penalty for candidate in selected),
        "solved": sum(candidate.reward == 1 for candidate in selected),
        "sampled_questions": len(candidates),
        "stalled": sum(all(candidate.reward == 0 for candidate in of_question) for of_question in candidates),
        "samples": len(samples),
        "sample_reward": sum(candidate.reward for candidate in samples),
        "sample_tokens": sum(len(candidate.answer) for candidate in samples),
        "stopped_early": stopped_early,
    }


def epoch_record(trainer: "PMC", losses: dict[str, float]) -> dict[str, float]:
    """The values to log for an epoch.

    Args:
        losses: the epoch's losses. With losses on initial responses, "forget_loss" is their sum, and the collapse loss
            is in it as well.
    """
    record = {"collapse_loss": losses.pop("forget_loss"), **losses}
    record |= trainer.epoch_means("questions", ["selected_reward", "solved", "selected_penalty"])
    penalty = record.pop("selected_penalty")
    if trainer.fluency:
        record["selected_nll"] = penalty / trainer.settings.fluency_weight
    record |= trainer.epoch_means("samples", ["sample_reward", "sample_tokens", "stopped_early"])
    if not trainer.stops_early:
        record.pop("stopped_early", None)
    elif "sample_reward" in record:  # a stopped sample counts with its upper bound
        record["sample_reward_upper_bound"] = record.pop("sample_reward")

    return record


def new_picks(trainer: "PMC") -> list[dict[str, Any]]:
    """A row for each question whose selected answer is another one than at the end of the last epoch.

    At first also one of epoch 0 for each initial response, whose reward is 0 by definition.
    """
    text = trainer.data.prompts.text
    rows = []
    if not trainer.picks:
        rows = [
            {"epoch": 0, "index": row.index, "answer": trainer.initial_responses[row.index], "reward": 0.0}
            for row in trainer.data.forget
        ]
    last = {pick["index"]: pick["answer"] for pick in [*rows, *trainer.picks]}
    epoch = math.ceil(trainer.state.epoch)
    for index, candidate in sorted(trainer.best.items()):
        answer = text(candidate.answer)
        if answer != last[index]:
            rows.append({"epoch": epoch, "index": index, "answer": answer, "reward": candidate.reward})
    return rows
