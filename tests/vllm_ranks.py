"""Answers of a vLLM server to questions that the processes of torchrun share. No test in itself.

torchrun --nproc-per-node 2 tests/vllm_ranks.py http://127.0.0.1:8000
"""

import json
import sys

from accelerate import PartialState
from accelerate.utils import gather_object

from common.config import GenerationConfig
from common.errors import UserError
from generation.sampler import generate, use_engine
from generation.token_sampling import SamplingSettings
from tests.helpers import random_model

state = PartialState(cpu=True)
use_engine(GenerationConfig(engine="vllm", vllm_server=sys.argv[1]))
model, found = random_model(), []
for questions in (range(4), range(1), range(4)):
    own = list(questions)[state.process_index :: state.num_processes]
    settings = SamplingSettings(20, num_samples=2, temperature=1.0)
    answers = generate(model, [[3, 4, 5 + i] for i in own], settings, [7], [(0, 1, i) for i in own])
    found.append(sorted(gather_object(list(zip(own, answers, strict=True)))))
# The same questions in every process, as for the initial responses.
found.append(generate(model, [[3, 4]], SamplingSettings(20), [7]))
try:
    generate(model, [[3, 4]], SamplingSettings(1000), [7])
except UserError as error:  # in every process, though only the first asks the server
    messages = gather_object([str(error)])
    assert len(messages) == state.num_processes
if state.is_main_process:
    print(json.dumps(found))
