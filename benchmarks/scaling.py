"""The cost of an epoch of PMC against the number of samples and against the number of forget questions.

    python benchmarks/scaling.py -cn=benchmark/tiny
    python benchmarks/scaling.py -cn=benchmark/smollm2

Sampling time should grow no faster than the number of answers. It grows more slowly while larger batches are more
efficient, and because each prompt is processed once for all of its samples. Prints two tables and writes them as JSON, with
a plot, to models/benchmarks/cost-<recipe>.json and .png.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the repository's root, not in this folder

    import common.interrupts  # noqa: F401

import logging
import math
import time
from dataclasses import replace
from tempfile import TemporaryDirectory

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import TrainerCallback

from benchmarks.timed_trainer import TimedPMC
from benchmarks.worker import make_trainer, read, window_size, with_checkpoint
from common.cli import check_recipe, job_errors, launch, replace_mapping
from common.config import RunConfig
from common.files import CONFIGS, write_json
from common.hardware import device_name
from common.results import package_versions
from evaluation.plots import BLUE, GRAY, RED, new_figure

log = logging.getLogger(__name__)

NUM_SAMPLES = (1, 2, 5, 10, 20)
QUESTIONS = (20, 40, 80)


class WarmUp(TrainerCallback):
    """Resets the trainer's counts after `steps` optimizer steps."""

    def __init__(self, trainer: TimedPMC, steps: int):
        self.trainer, self.steps, self.ended = trainer, steps, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            self.trainer.reset()
            self.ended = time.perf_counter()


def epoch(config: RunConfig, questions: int, num_samples: int) -> dict[str, float]:
    """Seconds of one epoch, after a warm-up epoch."""
    config = replace(config, settings=replace(config.settings, num_samples=num_samples))
    steps = math.ceil(questions / window_size(config))
    config = replace(config, training={**config.training, "max_steps": 2 * steps})
    with TemporaryDirectory() as folder:
        trainer = make_trainer("optimized", config, folder, questions)
        warm_up = WarmUp(trainer, steps)
        trainer.add_callback(warm_up)
        trainer.train()
    seconds = time.perf_counter() - warm_up.ended
    record = {"questions": questions, "num_samples": num_samples, "sampling": trainer.spent["sampling"]}
    record |= {"training": seconds - sum(trainer.spent.values()), "sampled_tokens": trainer.sampled_tokens}
    log.info("%d questions x %d samples: sampling %.3g s", questions, num_samples, record["sampling"])
    return record


def table(records: list[dict[str, float]], varied: str) -> str:
    lines = [
        f"| {varied.replace('_', ' ')} | sampling, s | sampling, ms per answer | training, s |",
        "|---:|---:|---:|---:|",
    ]
    for record in records:
        answers = record["questions"] * record["num_samples"]
        each = 1000 * record["sampling"] / answers
        lines.append(f"| {record[varied]} | {record['sampling']:.3g} | {each:.3g} | {record['training']:.3g} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Seconds of sampling and training against the varied quantity, with linear growth of sampling for comparison."""
    figure, panels = new_figure(9, 3.6, panels=len(curves), grid="y")
    for axes, (varied, records) in zip(panels, curves.items(), strict=True):
        x = [record[varied] for record in records]
        first = records[0]["sampling"] / x[0]
        axes.plot(x, [first * value for value in x], color=GRAY, linestyle="--", label="sampling, if linear")
        axes.plot(x, [record["sampling"] for record in records], marker="o", color=RED, label="sampling")
        axes.plot(x, [record["training"] for record in records], marker="o", color=BLUE, label="training")
        axes.set(xlabel=varied.replace("_", " "), ylabel="seconds per epoch", xlim=(0, None), ylim=(0, None))
        axes.set_xticks(x)
        axes.legend(frameon=False)
    figure.savefig(path)


def cost(cfg: DictConfig) -> None:
    """Measure, print and write the costs.

    Raises:
        UserError: when the configuration is invalid.
    """
    config, _ = read(with_checkpoint(cfg))
    curves = {
        "num_samples": [epoch(config, QUESTIONS[0], n) for n in NUM_SAMPLES],
        "questions": [epoch(config, questions, config.settings.num_samples) for questions in QUESTIONS],
    }
    for varied, records in curves.items():
        print(f"\n{table(records, varied)}")
    folder = Path(config.models_dir) / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"cost-{Path(HydraConfig.get().job.config_name).name}.json"
    write_json(path, {**curves, "device": device_name(), "versions": package_versions()})
    plot(curves, path.with_suffix(".png"))
    print(f"\nWritten to {path} and {path.with_suffix('.png').name}")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="benchmark/tiny")
def main(cfg: DictConfig) -> None:
    with job_errors(cfg.output_dir or cfg.models_dir):
        check_recipe(cfg, "benchmarks/step.py")
        replace_mapping(cfg, "model.new.settings")
        cost(cfg)


if __name__ == "__main__":
    launch(main, one_process=True)
