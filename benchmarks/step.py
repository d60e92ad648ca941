"""Time an optimizer step of PMC, and the evaluation's greedy answers: a baseline and the optimized code, interleaved.

    python benchmarks/step.py -cn=benchmark/tiny
    python benchmarks/step.py -cn=benchmark/tiny-run
    python benchmarks/step.py -cn=benchmark/smollm2 training.bf16=false benchmark.steps=2

1. Two processes load the same weights (random ones, or a run's), one for each trainer; each measures its own peak memory.
2. They take turns: a step of the baseline, a step of the optimized trainer, on the same questions and sample lengths.
3. Means over the steps, their ratio and the arithmetic limit of the machine are printed and written as JSON, with the
   device and the versions, to models/benchmarks/<recipe>.json.

The baseline (benchmarks/baseline.py) runs with PyTorch's default thread and memory settings.
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
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from benchmarks.synthetic import word_tokenizer
from benchmarks.worker import BenchmarkSettings, RemoteTrainer, read, window_size, with_checkpoint
from common.cli import check_recipe, job_errors, launch, replace_mapping
from common.config import RunConfig
from common.files import CONFIGS, write_json
from common.hardware import device_name
from common.new_model import new_model
from common.redaction import without_secrets
from common.results import package_versions
from common.training_arguments import training_arguments

log = logging.getLogger(__name__)

TRAINERS = ("baseline", "optimized")


def measure(cfg: dict, settings: BenchmarkSettings, folder: str) -> dict[str, RemoteTrainer]:
    """Run both trainers' steps; returns the trainers, by name, with what they measured."""
    together = [list(TRAINERS)] if settings.interleaved else [[name] for name in TRAINERS]
    measured = {}
    for names in together:
        trainers = [RemoteTrainer(name, cfg, folder) for name in names]
        for round_ in range(settings.warmup_steps + settings.steps):
            for trainer in trainers:
                record = trainer.send("step")
                log.info("%s, step %d: %.3g s", trainer.name, round_ + 1, record["step"])
                if round_ >= settings.warmup_steps:
                    trainer.steps.append(record)
        for trainer in trainers:
            if settings.evaluation_questions:
                trainer.evaluation = trainer.send("evaluate")
            trainer.stop()
        measured |= {trainer.name: trainer for trainer in trainers}
    return measured


def summary(trainers: dict[str, RemoteTrainer], config: RunConfig, settings: BenchmarkSettings) -> dict[str, Any]:
    """Means over the steps of each trainer, and the ratios baseline / optimized."""
    result: dict[str, Any] = {"trainers": {}, "ratios": {}, "mean_recall": {}}
    for name, trainer in trainers.items():
        means = {key: statistics.fmean(step[key] for step in trainer.steps) for key in trainer.steps[0]}
        figures = {f"seconds_{part}": means[part] for part in ("step", "sampling", "scoring", "training")}
        figures["sampled_tokens_per_second"] = means["sampled_tokens"] / means["sampling"]
        figures["trained_tokens_per_second"] = means["trained_tokens"] / means["training"]
        figures["peak_memory_bytes"] = max(step["peak_memory_bytes"] for step in trainer.steps)
        if trainer.evaluation:
            figures["seconds_evaluation"] = trainer.evaluation["seconds"]
            figures["seconds_evaluation_answers"] = trainer.evaluation["seconds"] - trainer.evaluation["scoring"]
            result["mean_recall"][name] = trainer.evaluation["mean_recall"]
        if settings.questions:
            windows = settings.questions * config.training["num_epochs"] / window_size(config)
            figures["minutes_whole_run"] = windows * means["step"] / 60
        result["trainers"][name] = figures
    baseline, optimized = (result["trainers"][name] for name in TRAINERS)
    for key in baseline:
        faster_when_less = key.startswith(("seconds", "minutes", "peak"))
        result["ratios"][key] = baseline[key] / optimized[key] if faster_when_less else optimized[key] / baseline[key]
    return result


def table(result: dict[str, Any], settings: BenchmarkSettings) -> str:
    lines = ["| | baseline | optimized | ratio |", "|---|---:|---:|---:|"]
    for key, ratio in result["ratios"].items():
        baseline, optimized = (result["trainers"][trainer][key] for trainer in TRAINERS)
        name, scale = (key.replace("_bytes", ", GB"), 1e9) if key.endswith("bytes") else (key, 1)
        lines.append(f"| {name.replace('_', ' ')} | {baseline / scale:.3g} | {optimized / scale:.3g} | {ratio:.1f} |")
    if limit := result.get("limit"):
        lines += [
            "",
            f"Arithmetic limit of the optimized step: {limit['seconds_step']:.3g} s ({limit['gflop_step']:.3g} GFLOP at "
            f"{limit['gflop_per_second']:.0f} GFLOP/s, {limit['dtype']}). "
            f"The step takes {limit['step_over_limit']:.2f} times that.",
        ]
    if settings.published_minutes:
        lines.append(f"Published time of the whole run: {settings.published_minutes:g} minutes.")
    return "\n".join(lines)


def flop_per_token(config: RunConfig) -> tuple[float, float]:
    """FLOP of a forward pass for one token: without the head, and of the head. Attention is left out."""
    with torch.device("meta"):
        tokenizer = word_tokenizer(config.model.new.vocab_size)
        model = new_model(config.model.new, tokenizer, "float32")
    head = model.get_output_embeddings().weight.numel()
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return 2.0 * (linear - head), 2.0 * head


def step_flop(step: dict[str, float], config: RunConfig) -> float:
    """FLOP of the matrix products that an optimizer step's tokens need.

    Every prompt token and every sampled token counts once, every training token three times (forward, and backward for
    activations and for weights). The head runs where a token is drawn or has a label.
    """
    body, head = flop_per_token(config)
    sampling = (step["prompt_tokens"] + step["sampled_tokens"]) * body + step["sampled_tokens"] * head
    training = 3 * (step["trained_tokens"] * body + step["label_tokens"] * head)
    return sampling + training


def arithmetic_limit(trainer: RemoteTrainer, config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds that only the matrix products of a step would take on this machine."""
    flop = statistics.fmean(step_flop(step, config) for step in trainer.steps)
    rate = matmul_flop_per_second(config, dtype)
    return {
        "gflop_step": flop / 1e9,
        "gflop_per_second": rate / 1e9,
        "seconds_step": flop / rate,
        "step_over_limit": statistics.fmean(step["step"] for step in trainer.steps) * rate / flop,
        "dtype": str(dtype).removeprefix("torch."),
    }


def matmul_flop_per_second(config: RunConfig, dtype: torch.dtype) -> float:
    """The highest rate among some matrix products; one has the model's shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = config.model.new.settings.get("hidden_size", 1024)
    best = 0.0
    for rows, inner, outer in ((2048, 2048, 2048), (2048, width, 4 * width)):
        left = torch.randn(rows, inner, dtype=dtype, device=device)
        right = torch.randn(outer, inner, dtype=dtype, device=device)
        seconds = timed(lambda left=left, right=right: torch.nn.functional.linear(left, right))
        best = max(best, 2 * rows * inner * outer / seconds)
    return best


def timed(function: Callable[[], Any], at_least: float = 0.5) -> float:
    """Mean seconds per call, over calls that take `at_least` seconds in total, after one warm-up call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    function()
    synchronize()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < at_least:
        function()
        calls += 1
    synchronize()
    return (time.perf_counter() - started) / calls


def benchmark(cfg: DictConfig) -> None:
    """Measure, print and write the figures.

    Raises:
        UserError: when the configuration is invalid, or when a trainer's process dies.
    """
    cfg = with_checkpoint(cfg)
    config, settings = read(cfg)
    resolved = OmegaConf.to_container(cfg)
    with TemporaryDirectory() as folder:
        trainers = measure(resolved, settings, folder)
        bf16 = training_arguments(config, Path(folder), 0).bf16
    result = summary(trainers, config, settings)
    if config.model.new:
        result["limit"] = arithmetic_limit(trainers["optimized"], config, torch.bfloat16 if bf16 else torch.float32)
    result |= {"device": device_name(), "versions": package_versions(), "config": without_secrets(resolved)}
    print(table(result, settings))
    path = Path(config.models_dir) / "benchmarks" / f"{Path(HydraConfig.get().job.config_name).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"\nWritten to {path}")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="benchmark/tiny")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        check_recipe(cfg, "benchmarks/step.py")
        replace_mapping(cfg, "model.new.settings")
        benchmark(cfg)


if __name__ == "__main__":
    launch(main, one_process=True)
