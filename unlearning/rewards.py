"""Rewards: how unlike the initial response a sampled answer is.

A reward is a function `(reference, samples) -> list[float]` with one value in [0, 1] per sample; 1 means that nothing of the
reference is left. To add one, write such a function and name it in configs/method/*.yaml or on the command line as
`method.reward._target_=my_module.my_reward`. A reward that never rises when words are added to a sample may declare it by
the attribute `is_monotone = True`: samples that can no longer be selected are then stopped while they are drawn.
"""

from collections.abc import Sequence

from common.rouge import rouge_l_recall


def rouge_l(reference: str, samples: Sequence[str]) -> list[float]:
    """1 - ROUGE-L recall (stemmed) of each sample against the initial response: the reward of the PMC paper."""
    return [1.0 - rouge_l_recall(reference, sample) for sample in samples]


rouge_l.is_monotone = True  # words that match the reference in order still do when more words follow
