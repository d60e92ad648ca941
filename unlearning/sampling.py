"""What methods share that train on the model's own answers to the forget questions: initial responses, samples and rewards.

1. Initial responses: before training, generate the finetuned model's greedy answer to every forget question.
2. Sample: for each forget question of an optimizer step, draw `num_samples` answers from the current model.
3. Score: the reward of a sample says how unlike the initial response it is (`unlearning.rewards`).

The forget answers of the data set are never read. The methods are `unlearning.pmc` and `unlearning.methods.grpo`;
`unlearning.methods.undo` has the first step alone.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hydra.utils import get_method, instantiate
from pydantic import Field, ValidationInfo, field_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PreTrainedModel, TrainingArguments

from common.config import Fraction, section
from common.data import Row
from common.errors import reason
from common.model import eos_token_ids
from generation.replica import Replica
from generation.sampler import StoppingCriteria, generate
from generation.token_sampling import SamplingSettings
from unlearning.rewards import Scorer
from unlearning.trainer import MethodSettings, UnlearningData, UnlearningTrainer

HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_")


@section
class GenerationLimits:
    """The settings of `InitialResponseTrainer`."""

    max_length: PositiveInt = 200
    """Maximum length of prompt and sampled answer together, in tokens."""
    sampling_batch_size: int | None = Field(None, gt=0)
    """Maximum number of samples in a batch; null: as many as fit in a tenth of the memory."""


@section
class OwnAnswerSettings(GenerationLimits, MethodSettings):
    gamma: PositiveFloat = 1.0
    num_samples: PositiveInt = 5
    """Samples drawn for each forget question and step."""
    temperature: NonNegativeFloat = 1.0
    """The logits are divided by it; 0 is greedy."""
    top_p: Fraction = 1.0
    """Draw from the smallest set of likeliest tokens with at least this total probability."""
    top_k: NonNegativeInt = 0
    """Draw from the k likeliest tokens; 0: all."""
    min_len: NonNegativeInt = 0
    """Minimum number of words; exp(-words) is subtracted from the reward of shorter samples; 0: off."""
    reward: Any = Field(default_factory=lambda: {"_target_": "unlearning.rewards.rouge_l"})
    """Function (reference, samples) -> list of rewards in [0, 1]."""

    @field_validator("temperature")
    @classmethod
    def samples_differ(cls, temperature: float, info: ValidationInfo) -> float:
        if temperature == 0 and info.data.get("num_samples", 1) > 1:
            samples = f"all {info.data['num_samples']} samples"
            raise ValueError(f"{samples} would be the same greedy answer; expected more than 0, or num_samples=1")
        return temperature

    @field_validator("reward")
    @classmethod
    def exists(cls, reward: Any) -> Any:
        if not isinstance(reward, dict):
            raise ValueError("expected the keys _target_, a function, and its further arguments")
        target = reward.get("_target_")
        try:
            function = get_method(target)
        except (ValueError, ImportError, TypeError, AttributeError) as error:
            raise ValueError(
                f"no such function ({reason(error)}); the folder of a module of your own must be on PYTHONPATH"
            ) from error
        arguments = {key: value for key, value in reward.items() if key not in HYDRA_KEYS}
        try:
            inspect.signature(function).bind("reference", ["sample"], **arguments)
        except TypeError as error:
            raise ValueError(f"method.reward._target_={target}(reference, samples, **{arguments}): {error}") from error
        return reward


class InitialResponseTrainer(UnlearningTrainer):
    """Generates the finetuned model's greedy answer to every forget question before training.

    Attributes:
        prompt_ids: token ids of the forget questions, by row index.
        initial_tokens: token ids of the answers.
        initial_responses: their texts.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: GenerationLimits
    ):
        super().__init__(model, args, data, settings)
        # A model that is already in bfloat16 needs no copy; FSDP2 gathers one.
        in_bf16 = args.bf16 and model.dtype != torch.bfloat16 and not self.is_fsdp_enabled
        self.replica = Replica(model, torch.bfloat16) if in_bf16 else None
        self.eos_token_ids = eos_token_ids(model, data.prompts.eos_token_id)
        self.prompt_ids = {row.index: data.prompts.prompt(row.question) for row in data.forget}
        self.initial_tokens: dict[int, list[int]] = {}
        self.initial_responses: dict[int, str] = {}
        self.seconds["sampling"] = 0.0

    def before_training(self) -> None:
        """Step 1: the initial responses."""
        s, rows = self.settings, self.data.forget
        greedy = SamplingSettings(s.max_length, batch_size=s.sampling_batch_size)
        prompts = [self.prompt_ids[row.index] for row in rows]
        with self.timing("sampling"), self.sampled_model() as model:
            answers = generate(model, prompts, greedy, self.eos_token_ids, description="initial responses")
        for row, answer in zip(rows, answers, strict=True):
            self.initial_tokens[row.index] = answer[0]
            self.initial_responses[row.index] = self.data.prompts.text(answer[0])

    @contextlib.contextmanager
    def sampled_model(self) -> Iterator[PreTrainedModel]:
        """A context with the current model, in the dtype that it is sampled in."""
        if self.replica:
            yield self.replica.refresh()
        else:
            with self.whole_model(torch.bfloat16 if self.args.bf16 else None) as model:
                yield model

    def state_to_save(self) -> dict[str, Any]:
        return super().state_to_save() | {"initial_tokens": list(self.initial_tokens.items())}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.initial_tokens = dict(state["initial_tokens"])
        self.initial_responses = {index: self.data.prompts.text(ids) for index, ids in self.initial_tokens.items()}


class OwnAnswerTrainer(InitialResponseTrainer):
    """Samples the model's own answers to the forget questions, and scores them against the initial responses."""

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, data: UnlearningData, settings: OwnAnswerSettings
    ):
        super().__init__(model, args, data, settings)
        reward = instantiate(settings.reward, _partial_=True)
        self.scorer = Scorer(reward, data.prompts.text, settings.min_len, data.prompts.text_of_beginning)

    def before_training(self) -> None:
        super().before_training()
        self.scorer.warn_of_references_without_words(list(self.initial_responses.values()))

    @contextlib.contextmanager
    def timing_of_step(self) -> Iterator[None]:
        """Add the duration of the block, the sampling of an optimizer step, to `seconds` and to the epoch's sums."""
        before = self.seconds["sampling"]
        with self.timing("sampling"):
            yield
        self.add_to_epoch(seconds_sampling=self.seconds["sampling"] - before)

    def sample(
        self,
        rows: list[Row],
        stopping_criteria: StoppingCriteria | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> list[list[list[int]]]:
        """Step 2: answers of the current model to each row's question, as token ids."""
        s, number = self.settings, self.number_of_samples()
        settings = SamplingSettings(s.max_length, number, s.temperature, s.top_k, s.top_p, s.sampling_batch_size)
        prompts = [self.prompt_ids[row.index] for row in rows]
        rng_keys = [(self.args.seed, self.state.global_step, row.index) for row in rows]
        with self.sampled_model() as model:  # also without rows, as the other processes may have some
            return generate(
                model,
                prompts,
                settings,
                self.eos_token_ids,
                rng_keys,
                description="sampling",
                stopping_criteria=stopping_criteria,
                temperatures=temperatures,
            )

    def number_of_samples(self) -> int:
        """How many samples of each question are drawn in a step."""
        return self.settings.num_samples

    def rewards(self, rows: list[Row], samples: list[list[list[int]]]) -> list[list[float]]:
        """Step 3: the reward of each sample of each row."""
        references = [self.initial_responses[row.index] for row in rows]
        return [self.scorer.rewards(*of_question) for of_question in zip(references, samples, strict=True)]
