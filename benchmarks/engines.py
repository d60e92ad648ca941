"""Time sampling with three engines on the same prompts: the project's own, Hugging Face's `generate` and `generate_batch`.

vLLM is a fourth with generation.engine=vllm: in this process, or a server (docs/several-gpus.md). Weights are passed to it
before each round, as in training.

    python benchmarks/engines.py -cn=benchmark/smollm2
    python benchmarks/engines.py -cn=benchmark/tiny generation.engine=vllm generation.vllm_memory_fraction=0.1

`generate_batch` is transformers' continuous batching over a paged cache. All answers have the same length here, because
it takes one length for all. The engines take turns; the table has the median over the rounds.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory

import hydra
from omegaconf import DictConfig
from transformers import GenerationConfig

from benchmarks.baseline import baseline_answers
from benchmarks.timed_trainer import generate_lengths
from benchmarks.worker import make_trainer, read, window_size, with_checkpoint
from common.cli import check_recipe, job_errors, launch, replace_mapping
from common.config import RunConfig
from common.files import CONFIGS
from common.forward import evaluation_mode
from generation import vllm_engine
from generation.sampler import use_engine
from generation.token_sampling import SamplingSettings

ANSWER_LENGTH = 37  # the mean of TOFU's
ROUNDS = 3

log = logging.getLogger(__name__)


def engines(config: RunConfig, model, prompts: list[list[int]]) -> dict[str, Callable[[], list]]:
    """By name, a function that draws `num_samples` answers to every prompt."""
    s = config.settings
    repeated = [prompt for prompt in prompts for _ in range(s.num_samples)]
    options = {"do_sample": True, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    settings = SamplingSettings(s.max_length, s.num_samples, s.temperature, s.top_k, s.top_p)
    lengths = [[ANSWER_LENGTH] * s.num_samples for _ in prompts]
    rng_keys = [(0, index) for index in range(len(prompts))]
    of_vllm = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "n": s.num_samples}
    of_vllm |= {"max_tokens": ANSWER_LENGTH, "ignore_eos": True}
    paged = GenerationConfig(max_new_tokens=ANSWER_LENGTH, eos_token_id=-1, pad_token_id=0, **options)
    own = replace(config.generation, engine="own", vllm_server=None)

    def optimized() -> list:
        use_engine(own)
        return generate_lengths(lengths, model, prompts, settings, [], rng_keys)

    found = {
        "optimized": optimized,
        "generate": lambda: baseline_answers(model, repeated, [ANSWER_LENGTH] * len(repeated), [], 0, **options),
        "generate_batch": lambda: list(model.generate_batch(inputs=repeated, generation_config=paged).values()),
    }
    if config.generation.engine == "vllm":
        found["vllm"] = lambda: answers_of_vllm(model, prompts, config, of_vllm)
    return found


def answers_of_vllm(model, prompts: list[list[int]], config: RunConfig, params: dict) -> list[list[list[int]]]:
    use_engine(config.generation)
    engine = vllm_engine.current_engine()
    engine.load(model, config.settings.max_length)
    return engine.answers(prompts, [params] * len(prompts))


def compare(cfg: DictConfig) -> None:
    """Time the engines and print the table.

    Raises:
        UserError: when the configuration is invalid.
    """
    config, _ = read(with_checkpoint(cfg))
    with TemporaryDirectory() as folder:
        trainer = make_trainer("optimized", config, folder, window_size(config))
    prompts = [trainer.prompt_ids[row.index] for row in trainer.data.forget]
    tokens = len(prompts) * config.settings.num_samples * ANSWER_LENGTH
    seconds: dict[str, list[float]] = {}
    with evaluation_mode(trainer.model):
        for round_ in range(ROUNDS + 1):  # the first is a warm-up
            for name, draw in engines(config, trainer.model, prompts).items():
                started = time.perf_counter()
                draw()
                elapsed = time.perf_counter() - started
                log.info("%s, round %d: %.3g s", name, round_, elapsed)
                seconds.setdefault(name, []).append(elapsed)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    print("| engine | tokens/s | optimized is faster by |\n|---|---:|---:|")
    for name, median in medians.items():
        print(f"| {name} | {tokens / median:.4g} | {median / medians['optimized']:.1f} |")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="benchmark/tiny")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        check_recipe(cfg, "benchmarks/step.py")
        replace_mapping(cfg, "model.new.settings")
        compare(cfg)


if __name__ == "__main__":
    launch(main, one_process=True)
