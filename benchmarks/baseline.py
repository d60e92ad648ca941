"""The baseline that PMC is compared with: the same algorithm, written with Hugging Face's own tools.

Inside every micro-batch's loss: `generate` on prompts that were repeated num_samples times, rows padded to max_length, one
forward pass each for collapse, retain and a forget loss that is only logged, ROUGE-L by the `rouge_score` package. The
evaluation generates split by split, each batch until its longest answer ends, and scores every answer in two ROUGE calls.
The published implementation (arXiv 2507.04219, its public repository) works like this; no code is copied from it.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from torch.nn.functional import pad
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, Trainer

from benchmarks.synthetic import ANSWER_TOKENS, draw_lengths
from common.collate import IGNORED, collate
from common.model import eos_token_ids
from common.prompts import Example
from generation.decoder import pad_left
from generation.sampler import generate
from generation.token_sampling import SamplingSettings
from unlearning.rewards import penalize_short
from unlearning.selection import Candidate, select


class AtLengths(StoppingCriteria):
    """Stops every row at its own length."""

    def __init__(self, lengths: Sequence[int], prompt_length: int):
        self.lengths, self.prompt_length = torch.tensor(lengths), prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return (input_ids.shape[1] - self.prompt_length >= self.lengths).to(input_ids.device)


def baseline_answers(
    model, prompts: list[list[int]], lengths: list[int] | None, eos_token_ids: list[int], max_length: int, **options
) -> list[list[int]]:
    """Hugging Face's `generate` on a batch.

    Args:
        lengths: row i stops after lengths[i] tokens; None: at one of `eos_token_ids`, or at `max_length`.
    """
    input_ids, mask = pad_left(prompts, model.device)
    prompt_length = input_ids.shape[1]
    stop = None
    if lengths:
        options |= {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": max(lengths)}
        stop = StoppingCriteriaList([AtLengths(lengths, prompt_length)])
    else:
        options |= {"pad_token_id": eos_token_ids[0], "eos_token_id": eos_token_ids, "max_length": max_length}
    settings = GenerationConfig(**options)
    ids = model.generate(input_ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop)
    answers = ids[:, prompt_length:].tolist()
    if lengths:
        return [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
    return [
        answer[: next((i + 1 for i, token in enumerate(answer) if token in eos_token_ids), None)] for answer in answers
    ]


def padded(examples: Sequence[Example], length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Ids, mask and labels, all of shape (rows, length)."""
    batch, fill = collate(examples), {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: pad(tensor, (0, length - tensor.shape[1]), value=fill[name]).to(device) for name, tensor in batch.items()
    }


class BaselinePMC(Trainer):
    """The baseline as a Trainer.

    Attributes:
        spent: seconds of the optimizer step so far, by "sampling" and "scoring".
        sampled_tokens, trained_tokens: of the optimizer step so far.
    """

    forced_lengths = True  # samples stop where `sample_lengths` says

    def __init__(self, model, args, data, settings):
        super().__init__(model=model, args=args, train_dataset=data.forget, data_collator=list)
        self.data, self.settings = data, settings
        self.eos_token_ids = eos_token_ids(model, data.prompts.eos_token_id)
        self.initial_responses: dict[int, str] = {}
        self.best: dict[int, Candidate] = {}
        self.scorer = RougeScorer(["rougeL"], use_stemmer=True)
        self.evaluation_scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
        self.all_rouge = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
        self.reset()

    def before_training(self) -> None:
        """The initial responses; they are not timed."""
        ids = [self.data.prompts.prompt(row.question) for row in self.data.forget]
        answers = generate(self.model, ids, SamplingSettings(self.settings.max_length), self.eos_token_ids)
        for row, answer in zip(self.data.forget, answers, strict=True):
            self.initial_responses[row.index] = self.data.prompts.text(answer[0])

    def reset(self) -> None:
        self.spent = {"sampling": 0.0, "scoring": 0.0}
        self.sampled_tokens = self.trained_tokens = 0
        if self.forced_lengths:
            self.best.clear()  # random answers would solve every question at once

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        active = [row for row in inputs if row.index not in self.best or self.best[row.index].reward < 1]
        if active:
            self.select(active, self.sample(active))
        prompts = [self.data.prompts.prompt(row.question) for row in inputs]
        collapse = [Example(ids, self.best[row.index].answer) for ids, row in zip(prompts, inputs, strict=True)]
        forget = [self.data.prompts.example(row, self.settings.max_length) for row in inputs]
        paired = [self.data.retain[np.random.randint(len(self.data.retain))] for _ in inputs]
        retain = [self.data.prompts.example(row, self.settings.max_length) for row in paired]
        loss = self.loss(model, collapse) + self.settings.lambda_unlearning * self.loss(model, retain)
        with torch.no_grad():
            self.logged = self.loss(model, forget).item()
        self.trained_tokens += sum(map(len, collapse + retain))
        return loss / self.args.gradient_accumulation_steps

    def loss(self, model, examples: list[Example]) -> torch.Tensor:
        return model(**padded(examples, self.settings.max_length, model.device)).loss

    def sample(self, rows) -> list[list[list[int]]]:
        s, n, started = self.settings, self.settings.num_samples, time.perf_counter()
        prompts = [self.data.prompts.prompt(row.question) for row in rows]
        lengths = None
        if self.forced_lengths:
            lengths = [length for row in rows for length in sample_lengths(self.state.global_step, row.index, n)]
        self.model.eval()
        answers = baseline_answers(
            self.model,
            [prompt for prompt in prompts for _ in range(n)],
            lengths,
            self.eos_token_ids,
            s.max_length,
            do_sample=True,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
        )
        self.model.train()
        self.spent["sampling"] += time.perf_counter() - started
        self.sampled_tokens += sum(map(len, answers))
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    def select(self, rows, samples: list[list[list[int]]]) -> None:
        started = time.perf_counter()
        for row, answers in zip(rows, samples, strict=True):
            texts = self.data.prompts.tokenizer.batch_decode(answers, skip_special_tokens=True)
            reference = self.initial_responses[row.index]
            rewards = [1 - self.scorer.score(reference, text)["rougeL"].recall for text in texts]
            rewards = penalize_short(rewards, texts, self.settings.min_len)
            candidates = [Candidate(reward, answer) for reward, answer in zip(rewards, answers, strict=True)]
            self.best[row.index] = select(self.best.get(row.index), candidates)
        self.spent["scoring"] += time.perf_counter() - started

    def evaluation_recall(self, reference: str, text: str) -> float:
        """ROUGE-L recall, together with everything else that the published evaluation computes for an answer.

        That is four kinds of ROUGE with bootstrap intervals of their mean, here of one value. Hugging Face's `evaluate` does
        the same in `compute`, and also writes a file for each call.
        """
        aggregator = BootstrapAggregator()
        aggregator.add_scores(self.all_rouge.score(reference, text))
        aggregator.aggregate()
        return self.evaluation_scorer.score(reference, text)["rougeL"].recall


def sample_lengths(step: int, index: int, n: int) -> list[int]:
    """Lengths in tokens of a question's samples in an optimizer step, the same for both trainers."""
    return draw_lengths(ANSWER_TOKENS, n, (step, index))
