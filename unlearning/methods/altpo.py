"""AltPO (arXiv 2409.13474): prefer other plausible answers to the forget answer; the reference model samples them once.

The loss is that of DPO (`unlearning.methods.dpo`). In place of a refusal, each step draws one of the sampled answers.

    python unlearning/main.py -cd=configs -cn=unlearn-tiny method=altpo
"""

import logging
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from common.config import Fraction, section
from common.data import Row
from common.model import eos_token_ids
from common.prompts import Example
from common.rouge import rouge_l_recall
from generation.sampler import generate
from generation.token_sampling import SamplingSettings
from unlearning.methods.dpo import DPO
from unlearning.trainer import MethodSettings

log = logging.getLogger(__name__)

ALTERNATIVE_KEY = 4  # rng key of `UnlearningTrainer.draw_index`: the alternative of a step
SAMPLING_KEY = 5  # rng key of the sampler: the tokens of the alternatives
MAX_ATTEMPTS = 5  # how often to sample for a question that has too few alternatives
TEMPERATURE_FACTOR = 1.25  # multiplies the temperature at each further attempt


@section
class AltPOSettings(MethodSettings):
    beta: PositiveFloat = 0.1
    """Inverse temperature; the smaller, the further a pair may move from the reference model."""
    num_alternatives: PositiveInt = 5
    """Alternative answers sampled for each forget question."""
    max_recall: Fraction = 0.7
    """Samples with a higher ROUGE-L recall of the forget answer are discarded; 1: only exact copies are."""
    temperature: PositiveFloat = 1.0
    """The logits are divided by it; raised for questions with too few alternatives."""
    top_p: Fraction = 0.95
    """Draw from the smallest set of likeliest tokens with at least this total probability."""
    top_k: NonNegativeInt = 50
    """Draw from the k likeliest tokens; 0: all."""
    max_length: PositiveInt = 200
    """Maximum length of prompt and sampled answer together, in tokens."""


class AltPO(DPO):
    """Prefers other answers sampled from the model to the forget answer."""

    Settings = AltPOSettings

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.alternatives: dict[int, list[list[int]]] = {}  # token ids, by row index

    def before_training(self) -> None:
        rows, wanted = self.data.forget, self.settings.num_alternatives
        self.alternatives = {row.index: [] for row in rows}
        with self.timing("sampling"):
            for attempt in range(MAX_ATTEMPTS):
                lacking = [row for row in rows if len(self.alternatives[row.index]) < wanted]
                for row, answers in zip(lacking, self.sample(lacking, attempt), strict=True):
                    accepted = [answer for answer in answers if self.is_alternative(row, answer)]
                    self.alternatives[row.index] = (self.alternatives[row.index] + accepted)[:wanted]
        if without := sum(not found for found in self.alternatives.values()):
            log.warning(
                "for %d of %d questions no sample differs enough from the forget answer, even at a temperature of %.2f; they "
                "are not unlearned. Raise method.temperature (now %g), method.top_p or method.max_recall (now %g)",
                without,
                len(rows),
                self.settings.temperature * TEMPERATURE_FACTOR ** (MAX_ATTEMPTS - 1),
                self.settings.temperature,
                self.settings.max_recall,
            )

    def sample(self, rows: list[Row], attempt: int) -> list[list[list[int]]]:
        """`num_alternatives` answers to each row's question, as token ids; the temperature rises with each attempt."""
        s = self.settings
        temperature = s.temperature * TEMPERATURE_FACTOR**attempt
        settings = SamplingSettings(s.max_length, s.num_alternatives, temperature, s.top_k, s.top_p)
        prompts = [self.data.prompts.prompt(row.question) for row in rows]
        keys = [(self.args.seed, attempt, row.index, SAMPLING_KEY) for row in rows]
        eos = eos_token_ids(self.model, self.data.prompts.eos_token_id)
        with self.whole_model() as model:
            return generate(model, prompts, settings, eos, keys, description="alternatives")

    def is_alternative(self, row: Row, answer: list[int]) -> bool:
        """Whether an answer is neither empty nor too close to the forget answer."""
        text = self.data.prompts.text(answer)
        return text not in ("", row.answer.strip()) and rouge_l_recall(row.answer, text) <= self.settings.max_recall

    def preferred_example(self, row: Row) -> Example:
        """The question with an alternative drawn for this step; without alternatives the forget answer (no gradient)."""
        found = self.alternatives[row.index]
        if not found:
            return self.example(row)
        return Example(self.data.prompts.prompt(row.question), found[self.draw_index(ALTERNATIVE_KEY, row, len(found))])

    # --- checkpoints ---

    def state_to_save(self) -> dict[str, Any]:
        return super().state_to_save() | {"alternatives": list(self.alternatives.items())}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.alternatives = dict(state["alternatives"])
